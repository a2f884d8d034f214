"""The interval that every mean over seeds is given with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.special import stdtrit


def t_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval (mean, low, high) of independent values; with one value there is no interval (NaN)."""
    sample = np.asarray(list(values), dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, float("nan"), float("nan")
    half = float(stdtrit(len(sample) - 1, 0.975) * sample.std(ddof=1) / np.sqrt(len(sample)))
    return mean, mean - half, mean + half
