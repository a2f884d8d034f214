"""The paired t-test, and its correction for several comparisons."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """A setting less the baseline, over the seeds that both have finished.

    Means over these seeds; the 95 % t-interval and p of the paired t-test are NaN with fewer than two. `adjusted` is
    p after Holm's correction for all comparisons made together.
    """

    seeds: tuple[int, ...]
    baseline: float
    other: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    adjusted: float = math.nan

    @property
    def mean(self) -> float:
        return self.other - self.baseline

    @property
    def shown(self) -> bool:
        """Whether there is a difference, at the 5 % level."""
        return self.adjusted < LEVEL


def paired(baseline: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Compares scores by seed, over the seeds that both have."""
    seeds = tuple(sorted(baseline.keys() & other.keys()))
    if not seeds:
        return Difference(seeds, math.nan, math.nan)
    a, b = (np.array([scores[seed] for seed in seeds], dtype=float) for scores in (baseline, other))
    means = Difference(seeds, float(a.mean()), float(b.mean()))
    if len(seeds) < 2:
        return means
    if np.array_equal(a, b):  # 0 / 0 to the t-test
        return replace(means, low=0.0, high=0.0, p=1.0, adjusted=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same difference at every seed
        test = stats.ttest_rel(b, a)
        low, high = test.confidence_interval(1 - LEVEL)
    return replace(means, low=float(low), high=float(high), p=float(test.pvalue), adjusted=float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's step-down correction: reject those below a level, and the chance of any false rejection
    stays below it. NaN is no test, and does not count.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]  # NaN sorts last
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted.tolist()
