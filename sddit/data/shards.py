"""Shards of images and labels: written once, then read through memory maps in any order. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from sddit.data.manifest import File, Manifest, Shard, array_digest, load_array, write_manifest
from sddit.errors import DataError, UsageError


def write_shards(
    images: np.ndarray, labels: np.ndarray, folder: Path, *, name: str, num_classes: int, shard_size: int = 10_000
) -> Manifest:
    """Writes a whole data set that is in memory.

    Args:
        images: uint8 (n, C, H, W).
        labels: integers (n,) in [0, num_classes).
        folder: made where missing; must not hold a manifest.
        shard_size: images in a file. It is part of the digest, so keep it for data that must stay the same.

    Raises:
        UsageError: wrong dtype, shape or labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), shard_size)
    shards = [
        write_shard(images[lo : lo + shard_size], labels[lo : lo + shard_size], folder, i, num_classes=num_classes)
        for i, lo in enumerate(starts)
    ]
    if not shards:
        raise UsageError("There are no images to write; a data set has at least one.")
    return write_manifest(folder, shards, name=name, shape=images.shape[1:], num_classes=num_classes)


def write_shard(images: np.ndarray, labels: np.ndarray, folder: Path, index: int, *, num_classes: int) -> Shard:
    """Writes the files of shard `index` and returns its line in the manifest. Arguments as for `write_shards`."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UsageError(f"Images are {images.dtype} {images.shape}, but must be uint8 (n, C, H, W).")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"Labels are {labels.dtype} {labels.shape}, but must be integers, one for each of {len(images)} images."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UsageError(f"Labels span {labels.min()} to {labels.max()}, but must be in [0, {num_classes}).")
    return Shard(
        images=_save(folder, f"images-{index:05d}.npy", images),
        labels=_save(folder, f"labels-{index:05d}.npy", labels.astype("<i8")),
        count=len(images),
    )


class Shards:
    """Random access to the images of a data set. Files are mapped when first read and stay mapped."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._ends = np.cumsum([shard.count for shard in manifest.shards])
        self._mapped: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels at `indices`, int64 (b,), in that order: uint8 (b, C, H, W) and int64 (b,).

        Raises:
            IndexError: an index is not in [0, len).
            DataError: a file is not what the manifest says.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices span {indices.min()} to {indices.max()}, but must be in [0, {len(self)})")
        images = np.empty((len(indices), *self.manifest.shape), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for i in np.unique(shard_of):
            where = shard_of == i
            rows = indices[where] - (self._ends[i] - self.manifest.shards[i].count)
            shard_images, shard_labels = self._open(int(i))
            images[where], labels[where] = shard_images[rows], shard_labels[rows]
        return images, labels

    def _open(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i not in self._mapped:
            manifest, shard = self.manifest, self.manifest.shards[i]
            images = _map(manifest.folder, shard.images, np.dtype(np.uint8), (shard.count, *manifest.shape))
            labels = _map(manifest.folder, shard.labels, np.dtype("<i8"), (shard.count,))
            if not 0 <= labels.min() <= labels.max() < manifest.num_classes:
                raise DataError(
                    f"{manifest.folder / shard.labels.file} has labels from {labels.min()} to {labels.max()}, but they "
                    f"must be in [0, {manifest.num_classes}). The file was changed; prepare the data again."
                )
            self._mapped[i] = (images, labels)
        return self._mapped[i]


def _map(folder: Path, file: File, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = load_array(folder, file)
    if (array.dtype, array.shape) != (dtype, shape):
        raise DataError(
            f"{folder / file.file} holds {array.dtype} {array.shape}, but its manifest says {dtype} {shape}. "
            "Prepare the data again."
        )
    return array


def _save(folder: Path, name: str, array: np.ndarray) -> File:
    """Writes `array` in C order and waits for the disk: the manifest must never be there before its shards."""
    array = np.ascontiguousarray(array)
    with open(folder / name, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return File(file=name, bytes=size, sha256=array_digest(array))
