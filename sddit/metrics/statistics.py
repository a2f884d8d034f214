"""Streaming moments of features, and the Fréchet distance between two of them. Imports no torch by itself.

Memory does not grow with the number of samples, and moments of parts merge into those of the whole, so workers share
the work and the result does not depend on how (up to rounding in float64).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sddit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


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
        batch = np.asarray(features if isinstance(features, np.ndarray) else features.detach().cpu(), dtype=np.float64)
        if not np.isfinite(batch).all():
            raise UsageError("The extractor gave features that are not finite. Check its weights and its precision.")
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


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ (FID, arXiv 1706.08500) as torch-fidelity computes it, in float64.

    torch-fidelity takes the root's trace from the eigenvalues of Σ₁Σ₂, which also serves singular covariances (fewer
    samples than features).

    Raises:
        UsageError: the two are of different widths.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # seconds to import

    if mean_1.shape != mean_2.shape:
        raise UsageError(
            f"Statistics of width {len(mean_1)} cannot be compared with a reference of width {len(mean_2)}. "
            "Make both with the same extractor."
        )
    pairs = ((mean_1, covariance_1), (mean_2, covariance_2))
    # It asserts equal dtypes, and its own means are float32: hand over float64 on both sides.
    stats = [{"mu": np.asarray(mu, np.float64), "sigma": np.asarray(sigma, np.float64)} for mu, sigma in pairs]
    return float(fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID])
