"""The batches of a run: which images are at which position of the global batch of a step. Free of torch."""

from __future__ import annotations

import numpy as np

from sddit import seeding
from sddit.data.shards import Shards


class BatchSampler:
    """Batches as a pure function of (seed, step): no state, so any worker can make any slice of any step.

    Position j of the global batch at `step` is position q = step · batch_size + j of the endless stream of epochs, each
    a permutation of the data (architecture.md §1.1). Batches run across epochs and nothing is dropped; a batch may be
    larger than the data.
    """

    def __init__(self, shards: Shards, *, seed: int, batch_size: int, flip: bool = False) -> None:
        """`batch_size` is the global one; `flip` mirrors each image left to right with probability 1/2."""
        self.shards, self.seed, self.batch_size, self.flip = shards, seed, batch_size, flip

    def indices(self, step: int, lo: int, hi: int) -> np.ndarray:
        """Which images are at positions lo … hi-1 of the batch at `step`: int64 (hi - lo,)."""
        assert 0 <= lo <= hi <= self.batch_size, (lo, hi, self.batch_size)
        return seeding.permuted(self.seed, step * self.batch_size + np.arange(lo, hi), len(self.shards))

    def batch(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions lo … hi-1 of the batch at `step`: x0 float32 (hi - lo, C, H, W) in [-1, 1], y int64 (hi - lo,)."""
        images, y = self.shards.read(self.indices(step, lo, hi))
        if self.flip:
            mirrored = seeding.uniform(self.seed, "flip", step, lo, hi) < 0.5
            images[mirrored] = images[mirrored][..., ::-1]
        return images.astype(np.float32) / np.float32(127.5) - 1, y
