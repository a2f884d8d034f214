"""Shards of images and labels: written once, then read through memory maps in any order. Free of torch."""

from __future__ import annotations

import mmap
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sddit.data import remote
from sddit.data.manifest import File, Manifest, Shard, array_digest, load_array, write_manifest
from sddit.errors import DataError, UsageError

_COPIES_AT_ONCE = 8  # of a remote data set, by one process
_OTHER_FILES = 1024  # that a process may hold open beside a data set


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
    """Writes the files of shard `index` and returns its line in the manifest.

    Arguments as for `write_shards`, or `images` float16 (n, 2C, h, w): mean and std of latents.
    """
    if images.dtype not in (np.uint8, np.float16) or images.ndim != 4:
        raise UsageError(
            f"Images are {images.dtype} {images.shape}, but must be uint8 (n, C, H, W), or float16 (n, 2C, h, w) for "
            "mean and std of latents."
        )
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
    """Random access to the images of a data set. Files are mapped when first read and stay mapped.

    Those of a remote data set are copied to this node when first read (`sddit.data.remote`).
    """

    def __init__(self, manifest: Manifest) -> None:
        """Raises DataError where this process may not open so many files."""
        self.manifest = manifest
        counts = [shard.count for shard in manifest.shards]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._opened: dict[int, _Opened] = {}
        self._lock = threading.Lock()
        _allow_open_files(len(counts))
        if isinstance(manifest.folder, str):
            total = sum(file.bytes for file in manifest.files)
            remote.warn_if_too_small(manifest.digest, manifest.folder, total)

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels at `indices`, int64 (b,), in that order: uint8 (b, C, H, W) and int64 (b,).

        Of latents, mean and std of their posterior: float16 (b, 2C, h, w). The system is told of all rows before the
        first is copied, so that a disk has them all to work on and no row is waited for page by page.

        Raises:
            IndexError: an index is not in [0, len).
            DataError: a file is not what the manifest says.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices span {indices.min()} to {indices.max()}, but must be in [0, {len(self)})")
        images = np.empty((len(indices), *self.manifest.stored_shape), dtype=self.manifest.dtype)
        labels = np.empty(len(indices), dtype=np.int64)
        order = np.argsort(indices, kind="stable")  # as they lie in the files
        shard_of = np.searchsorted(self._ends, indices[order], side="right")
        row_of = indices[order] - self._starts[shard_of]
        opened = self._open(np.unique(shard_of).tolist())
        places = list(zip(order.tolist(), [opened[i] for i in shard_of.tolist()], row_of.tolist(), strict=True))
        for _, shard, row in places:
            shard.will_need(row)
        for j, shard, row in places:
            images[j] = shard.images[row]  # numpy lets other threads run meanwhile
            labels[j] = shard.labels[row]
        return images, labels

    def labels(self) -> np.ndarray:
        """The labels of all images, int64 (n,). Reads no image."""
        with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
            return np.concatenate(list(pool.map(self._read_labels, range(len(self.manifest.shards)))))

    def _open(self, ids: list[int]) -> dict[int, _Opened]:
        """Those shards. Batches may be read side by side."""
        with self._lock:
            missing = [i for i in ids if i not in self._opened]
            if missing and isinstance(self.manifest.folder, str):
                with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
                    self._opened |= zip(missing, pool.map(self._map, missing), strict=True)
            else:
                self._opened |= {i: self._map(i) for i in missing}
            opened = {i: self._opened[i] for i in ids}
            if missing and isinstance(self.manifest.folder, str):
                # What has left the cache for what was copied keeps its place on the disk for as long as it is mapped.
                for i in list(self._opened):
                    if not remote.has_copy(self.manifest, self.manifest.shards[i].images):
                        del self._opened[i]
            return opened

    def _map(self, i: int) -> _Opened:
        manifest, shard = self.manifest, self.manifest.shards[i]
        images = self._load(shard.images, np.dtype(manifest.dtype), (shard.count, *manifest.stored_shape))
        return _Opened(images, self._read_labels(i))

    def _read_labels(self, i: int) -> np.ndarray:
        manifest, shard = self.manifest, self.manifest.shards[i]
        labels = np.array(self._load(shard.labels, np.dtype("<i8"), (shard.count,)))  # in memory: no file stays open
        if not 0 <= labels.min() <= labels.max() < manifest.num_classes:
            raise DataError(
                f"{manifest.folder}/{shard.labels.file} has labels from {labels.min()} to {labels.max()}, but they "
                f"must be in [0, {manifest.num_classes}). The file was changed; prepare the data again."
            )
        return labels

    def _load(self, file: File, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        folder = self.manifest.folder
        array = remote.load_copy(self.manifest, file) if isinstance(folder, str) else load_array(folder, file)
        if (array.dtype, array.shape) != (dtype, shape):
            raise DataError(
                f"{folder}/{file.file} holds {array.dtype} {array.shape}, but its manifest says {dtype} {shape}. "
                "Prepare the data again."
            )
        return array


class _Opened:
    """A shard whose images are mapped."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = np.asarray(images), labels  # np.memmap's own indexing is slow
        mapped: mmap.mmap = images._mmap  # type: ignore[attr-defined]  # there is no other way to it
        self._advise = mapped.madvise
        self._first, self._stride = len(mapped) - images.nbytes, images.strides[0]  # bytes of the header, of a row
        self._advise(mmap.MADV_RANDOM)  # a fault reads a page, not the rows around it

    def will_need(self, row: int) -> None:
        """Has the system read a row, without waiting for it."""
        start = self._first + row * self._stride
        before = start % mmap.PAGESIZE
        self._advise(mmap.MADV_WILLNEED, start - before, self._stride + before)


def _allow_open_files(count: int) -> None:
    """Makes sure that this process may hold `count` more files open: a map counts as one.

    Raises:
        DataError: the system does not allow it.
    """
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DataError(
            f"This data set has {count:,} shards, but a process may hold {hard:,} files open here. Raise that limit "
            "(ulimit -Hn), or prepare the data with more images in a shard."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _save(folder: Path, name: str, array: np.ndarray) -> File:
    """Writes `array` in C order and waits for the disk: the manifest must never be there before its shards."""
    array = np.ascontiguousarray(array)
    with open(folder / name, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return File(file=name, bytes=size, sha256=array_digest(array))
