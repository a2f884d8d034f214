"""What scores are computed from, and their formulas: torch-fidelity's wherever it has them. Imports no torch by itself.

`Moments` (FID, sFID) and `SplitSums` (Inception score) do not grow with the number of samples; those of parts merge
into those of the whole, so workers share the work and the result does not depend on how (up to rounding in float64).
Precision, recall and KID need the features themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sddit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SPLIT = 5000  # consecutive samples that make one Inception score (methods.md §11.1)
NEIGHBOURS = 3  # the radius of a point's ball reaches to its third neighbour
KID_SUBSETS, KID_SUBSET, KID_SEED = 100, 1000, 2020  # torch-fidelity's own


class Moments:
    """Count, mean (d,) and M2 = Σ (x − mean)(x − mean)ᵀ (d, d) of features seen so far, in float64.

    Updated by the pairwise rule of Chan, Golub and LeVeque (1979), which loses no digits where the naive sum of squares
    would. `dim` may be left out until the first features arrive; give it where a worker may get none.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.count = 0
        self.mean = np.zeros(dim or 0)
        self.m2 = np.zeros((dim or 0, dim or 0))

    def update(self, features: np.ndarray | Tensor) -> None:
        """Adds a batch of features (b, d).

        Raises:
            UsageError: they are not finite, or of another width than before.
        """
        batch = _finite(features)
        part = Moments(batch.shape[1])
        if len(batch):
            part.count = len(batch)
            part.mean = batch.mean(axis=0)
            centred = batch - part.mean
            part.m2 = centred.T @ centred
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Adds what `other` has seen."""
        if len(self.mean) == 0:
            self.mean, self.m2 = np.zeros_like(other.mean), np.zeros_like(other.m2)
        if len(other.mean) != len(self.mean) and other.count:
            raise UsageError(f"Features of width {len(other.mean)} cannot be added to features of {len(self.mean)}.")
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.m2 += other.m2 + np.outer(delta, delta) * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """The sample covariance (ddof 1), float64 (d, d).

        Raises:
            UsageError: fewer than two samples.
        """
        if self.count < 2:
            raise UsageError(f"A covariance needs at least 2 samples; there are {self.count}. Raise eval.samples.")
        return self.m2 / (self.count - 1)

    def to_array(self) -> np.ndarray:
        """All of it as one float64 vector (1 + d + d²,), to be gathered or stored."""
        return np.concatenate([[self.count], self.mean, self.m2.ravel()])

    @classmethod
    def from_array(cls, array: np.ndarray) -> Moments:
        """The inverse of `to_array`.

        Raises:
            ValueError: `array` is not of a length that `to_array` gives.
        """
        dim = (math.isqrt(max(4 * array.size - 3, 0)) - 1) // 2  # 1 + d + d² = size
        if array.ndim != 1 or 1 + dim + dim * dim != array.size:
            raise ValueError(f"an array of shape {array.shape} holds no moments")
        moments = cls(dim)
        moments.count = int(array[0])
        moments.mean = array[1 : 1 + dim].astype(np.float64)
        moments.m2 = array[1 + dim :].astype(np.float64).reshape(dim, dim)
        return moments


class SplitSums:
    """What the Inception score needs of class probabilities p (n, C): by split of 5,000 consecutive samples their
    number, Σ Σ p ln p and Σ p, in float64.

    Splits are those of the global index and nothing is shuffled, as in the ADM suite; a last split may be shorter.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.sums: dict[int, np.ndarray] = {}  # split → (2 + C,)

    def update(self, logits: np.ndarray | Tensor, first: int) -> None:
        """Adds logits (b, C) of samples first … first + b - 1.

        Raises:
            UsageError: they are not finite.
        """
        from scipy.special import log_softmax

        log_p = log_softmax(_finite(logits), axis=1)
        p = np.exp(log_p)
        rows = np.concatenate([np.ones((len(p), 1)), (p * log_p).sum(axis=1, keepdims=True), p], axis=1)
        splits = (first + np.arange(len(p))) // SPLIT
        for split in np.unique(splits):
            self._add(int(split), rows[splits == split].sum(axis=0))

    def merge(self, other: SplitSums) -> None:
        """Adds what `other` has seen."""
        for split, sums in other.sums.items():
            self._add(split, sums)

    def score(self) -> float:
        """The mean over the splits of exp(mean over samples of KL(p ‖ mean p))."""
        from scipy.special import xlogy

        scores = []
        for _, sums in sorted(self.sums.items()):
            count, p_log_p, mean = sums[0], sums[1], sums[2:] / sums[0]
            scores.append(np.exp(p_log_p / count - xlogy(mean, mean).sum()))
        return float(np.mean(scores))

    def to_array(self) -> np.ndarray:
        """All of it as float64 (splits, 3 + C), to be gathered: a row is the split and its sums."""
        rows = [np.concatenate([[split], sums]) for split, sums in sorted(self.sums.items())]
        return np.array(rows).reshape(len(rows), 3 + self.classes)

    @classmethod
    def from_array(cls, array: np.ndarray) -> SplitSums:
        """The inverse of `to_array`."""
        sums = cls(array.shape[1] - 3)
        sums.sums = {int(row[0]): row[1:].copy() for row in array}
        return sums

    def _add(self, split: int, sums: np.ndarray) -> None:
        self.sums[split] = self.sums[split] + sums if split in self.sums else sums


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ (FID, arXiv 1706.08500), in float64; Σ are (d, d).

    The trace is the sum of the roots of the eigenvalues of Σ₁Σ₂, as in torch-fidelity, but found by symmetric matrices:
    with the Cholesky factor of Σ₂, or with its root where it is singular (fewer images than features).

    Raises:
        UsageError: the two are of different widths.
    """
    from scipy.linalg import eigh

    if mean_1.shape != mean_2.shape:
        raise UsageError(
            f"Statistics of width {len(mean_1)} cannot be compared with a reference of width {len(mean_2)}. "
            "Make both with the same extractor."
        )
    means = np.asarray(mean_1, np.float64), np.asarray(mean_2, np.float64)
    covariances = np.asarray(covariance_1, np.float64), np.asarray(covariance_2, np.float64)
    try:
        eigenvalues = eigh(*covariances, eigvals_only=True, type=2, driver="gv")
    except np.linalg.LinAlgError:
        squares, vectors = eigh(covariances[1])
        root = vectors * np.sqrt(squares.clip(min=0))
        eigenvalues = eigh(root.T @ covariances[0] @ root, eigvals_only=True)
    trace = np.sqrt(eigenvalues.clip(min=0)).sum()  # rounding may leave a zero below it
    return float(((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * trace)


def precision_and_recall(samples: Tensor, real: Tensor, block: int = 1000) -> tuple[float, float]:
    """How many samples lie in a ball around a real image, and the other way round (arXiv 1904.06991), k = 3.

    torch-fidelity's, on features float32 (n, d) and (m, d), on their device. ADM rounds the distances to float16 first,
    which moves the third digit (methods.md §11.2).

    Memory beyond the features, on the CPU: some 17 · block · max(n, m) bytes, of the distances of `block` points
    at once and their sorting (measured: 0.83 GB for 50,000 and 10,000).
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        samples, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=block, save_cpu_ram=True, verbose=False
    )
    inside = round(found[KEY_METRIC_PRECISION] * len(samples)), round(found[KEY_METRIC_RECALL] * len(real))
    return inside[0] / len(samples), inside[1] / len(real)  # its means are float32


def kernel_distance(samples: Tensor, real: Tensor) -> float:
    """KID (arXiv 1801.01401): squared MMD under (x·y / d + 1)³, unbiased, the mean over 100 pairs of random subsets.

    torch-fidelity's, on features float32 (n, d) and (m, d). Subsets have 1,000 features, or as many as there are.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KID_SUBSET, len(samples), len(real))
    found = kid_features_to_metric(
        samples, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=KID_SEED, verbose=False
    )
    return float(found[KEY_METRIC_KID_MEAN])


def _finite(values: np.ndarray | Tensor) -> np.ndarray:
    """`values` in float64 numpy.

    Raises:
        UsageError: one is not finite.
    """
    array = np.asarray(values if isinstance(values, np.ndarray) else values.detach().cpu(), dtype=np.float64)
    if not np.isfinite(array).all():
        raise UsageError("The extractor gave features that are not finite. Check its weights and its precision.")
    return array
