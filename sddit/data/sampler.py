"""The batches of a run: which images are at which position of the global batch of a step. Free of torch."""

from __future__ import annotations

import numpy as np

from sddit import seeding
from sddit.config import Experiment
from sddit.data.manifest import Manifest, VaeInfo
from sddit.data.shards import Shards
from sddit.data.subset import subset
from sddit.errors import UsageError


class ImageSet:
    """A fixed list of images: those at `indices` int64 (n,) of a data set, by default all."""

    def __init__(self, shards: Shards, indices: np.ndarray | None = None) -> None:
        self.shards = shards
        self.indices = np.arange(len(shards)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """Images lo … hi-1 and their labels: uint8 (hi - lo, C, H, W), int64 (hi - lo,). Latents: as `Shards.read`."""
        return self.shards.read(self.indices[lo:hi])

    def sample(self, count: int) -> ImageSet:
        """`count` of them by a fixed permutation, or all where there are fewer: data may be sorted by class."""
        if count >= len(self):
            return self
        return ImageSet(self.shards, self.indices[np.sort(seeding.permuted("sample", np.arange(count), len(self)))])


class BatchSampler:
    """Batches as a pure function of (seed, step): no state, so any worker can make any slice of any step.

    Position j of the global batch at `step` is position q = step · batch_size + j of the endless stream of epochs, each
    a permutation of the data (architecture.md §1.1). Batches run across epochs and nothing is dropped; a batch may be
    larger than the data.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seed: int,
        batch_size: int,
        flip: bool = False,
        hold_out: float = 0.0,
        chosen: np.ndarray | None = None,
    ) -> None:
        """`batch_size` is the global one; `flip` mirrors each image left to right with probability 1/2; the fraction
        `hold_out` of the images is in no batch, the same ones whatever the seed. Of the data, only the images at the
        indices `chosen` int64 (k,) are used, by default all. Raises as `num_trained_on` and `check_flip`.
        """
        check_flip(shards.manifest, flip)
        self.shards, self.seed, self.batch_size, self.flip = shards, seed, batch_size, flip
        self.chosen = chosen
        self.used = len(shards) if chosen is None else len(chosen)
        self.count = num_trained_on(self.used, hold_out)

    @classmethod
    def of(cls, experiment: Experiment, shards: Shards, *, batch_size: int | None = None) -> BatchSampler:
        """The batches of an experiment, by default of its own size. Raises as `subset` and `num_trained_on`."""
        data = experiment.data
        return cls(
            shards,
            seed=experiment.seed,
            batch_size=batch_size or experiment.train.batch_size,
            flip=data.flip,
            hold_out=data.hold_out,
            chosen=subset(shards, data),
        )

    def indices(self, step: int, lo: int, hi: int) -> np.ndarray:
        """Which images are at positions lo … hi-1 of the batch at `step`: int64 (hi - lo,)."""
        assert 0 <= lo <= hi <= self.batch_size, (lo, hi, self.batch_size)
        return self._among_all(seeding.permuted(self.seed, step * self.batch_size + np.arange(lo, hi), self.count))

    def training_images(self) -> ImageSet:
        """The images that are trained on."""
        return ImageSet(self.shards, self._among_all(np.arange(self.count)))

    def held_out_images(self) -> ImageSet:
        """Those that are not."""
        return ImageSet(self.shards, self._among_all(np.arange(self.count, self.used)))

    def _among_all(self, positions: np.ndarray) -> np.ndarray:
        """Positions in a fixed order of the images used, training images first, to indices of the data."""
        if self.count < self.used:
            positions = seeding.permuted("hold_out", positions, self.used)
        return positions if self.chosen is None else self.chosen[positions]

    def batch(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions lo … hi-1 of the batch at `step`: x0 float32 (hi - lo, C, H, W) and y int64 (hi - lo,).

        Pixels are in [-1, 1]; latents are drawn from their posterior and scaled. Flipped is the image, never the
        latent: an autoencoder is not mirror-symmetric, and a mirrored latent decodes to another image.
        """
        manifest = self.shards.manifest
        images, y = self.shards.read(self.indices(step, lo, hi))
        if self.flip:
            mirrored = seeding.uniform(self.seed, "flip", step, lo, hi) < 0.5
            if manifest.vae:
                images[mirrored] = np.roll(images[mirrored], images.shape[1] // 2, axis=1)  # its other half
            else:
                images[mirrored] = images[mirrored][..., ::-1]
        noise = seeding.normal(self.seed, "posterior", step, lo, hi, manifest.shape) if manifest.vae else None
        return as_network_sees(images, manifest.vae, noise), y


def check_flip(manifest: Manifest, flip: bool) -> None:
    """Whether the data can be flipped.

    Raises:
        UsageError: they are latents, and the mirrored images were not encoded.
    """
    if flip and manifest.vae and not manifest.vae.mirrored:
        raise UsageError(
            f"data.flip is true, but {manifest.folder} holds the latents of the images alone, and a mirrored latent is "
            "not that of the mirrored image. Prepare it with --mirrored (twice the size), or set data.flip to false."
        )


def num_trained_on(count: int, hold_out: float) -> int:
    """How many of `count` images are left where a fraction `hold_out` is set aside.

    Raises:
        UsageError: the fraction sets aside no image, or all.
    """
    held_out = round(count * hold_out)
    if hold_out and not 0 < held_out < count:
        raise UsageError(
            f"data.hold_out {hold_out:g} of {count} images sets aside {held_out}, but must leave at least one on each "
            "side. Choose another fraction, or 0."
        )
    return count - held_out


def as_network_sees(images: np.ndarray, vae: VaeInfo | None, noise: np.ndarray | None = None) -> np.ndarray:
    """Stored images as x0, float32: pixels in [-1, 1]; latents of `vae` at mean + std · noise, by default their mean,
    scaled."""
    if vae is None:
        return images.astype(np.float32) / np.float32(127.5) - 1
    if vae.mirrored:
        images = images[:, : images.shape[1] // 2]
    mean, std = np.split(images.astype(np.float32), 2, axis=1)
    z = mean if noise is None else mean + std * noise.astype(np.float32)
    return (z - np.float32(vae.shift_factor)) * np.float32(vae.scaling_factor)
