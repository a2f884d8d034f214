"""Shards of remote data sets, copied once per node into a bounded cache and verified. Free of torch.

    $SDDIT_CACHE/shards/<digest of the data set>/images-00000.npy
    $SDDIT_CACHE/shards/.locks/             one process of the node copies a file, the others wait for it

A copy is moved into place when it is whole and its values are those of the manifest, so what has its name is what was
written. Each process checks again what it opens first: a copy that has changed since is made anew. Where the cache is
full, what was used longest ago leaves; who has it mapped reads on, as an unlinked file stays until it is unmapped. That
holds on a local disk: SDDIT_CACHE should be on one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sddit.data.manifest import File, Manifest, array_digest, cache_dir, load_array, wrong_checksum, wrong_size
from sddit.errors import DataError, StorageError
from sddit.filesystem import in_words, open_filesystem, patiently

log = logging.getLogger(__name__)
_PART_BYTES = 16 << 20  # held in memory while copying
_STALE_NS = 3600 * 10**9  # since a copy that is being made was written to last: who made it is gone
_FREE_SHARE = 0.1  # of the disk, left free where SDDIT_CACHE_GB says nothing

_verified: set[tuple[str, int, int, int]] = set()  # copies that this process has checked: path, inode, size, mtime


def load_copy(manifest: Manifest, file: File) -> np.ndarray:
    """A file of a remote data set as a read-only memory map of this node's verified copy, made if need be.

    An outage of the storage is waited for some minutes (`patiently`).

    Raises:
        DataError: the remote file is not what the manifest says, or the cache cannot be written.
        StorageError: the remote file cannot be read.
    """
    folder = shards_dir() / manifest.digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(file.sha256[0]):  # a sixteenth of all files: copies go side by side
            if (array := _mapped(folder, file)) is not None:
                return array
            return patiently(lambda: _copy(manifest, file, folder), f"Copying {manifest.folder}/{file.file}")
    except OSError as error:
        if error.errno is None:  # not this machine's
            where = f"{manifest.folder}/{file.file}"
            raise StorageError(f"Cannot read {where}: {in_words(manifest.folder, error)}.") from error
        raise DataError(
            f"Cannot copy {manifest.folder}/{file.file} to {folder}: {in_words(folder, error)}. Set SDDIT_CACHE to a "
            "folder on a local disk that can be written to and has room, or SDDIT_CACHE_GB to what it may hold."
        ) from error


def has_copy(manifest: Manifest, file: File) -> bool:
    """Whether this node has a copy at the moment."""
    return (shards_dir() / manifest.digest / file.file).exists()


def shards_dir() -> Path:
    """Where the copies are."""
    return cache_dir() / "shards"


def limit_bytes() -> int:
    """What all copies together may take: `SDDIT_CACHE_GB`, else all but the last tenth of the disk.

    Raises:
        DataError: it is not a positive number.
    """
    if text := os.environ.get("SDDIT_CACHE_GB"):
        with contextlib.suppress(ValueError):
            if (gigabytes := float(text)) > 0:
                return int(gigabytes * 1e9)
        raise DataError(f"SDDIT_CACHE_GB is {text!r}, but must be a number of gigabytes above 0.")
    disk = shutil.disk_usage(next(folder for folder in (shards_dir(), *shards_dir().parents) if folder.is_dir()))
    return sum(size for _, size, _ in _copies()) + disk.free - int(_FREE_SHARE * disk.total)


@functools.cache
def warn_if_too_small(digest: str, folder: str, total_bytes: int) -> None:
    """Says once that a data set will not fit into the cache."""
    with contextlib.suppress(OSError):  # said where it matters
        shards_dir().mkdir(parents=True, exist_ok=True)
    if total_bytes > (limit := limit_bytes()):
        log.warning(
            "%s has %.3g GB, but the cache %s holds %.3g GB: shards will be copied again and again, and training waits "
            "for them. Raise SDDIT_CACHE_GB, or set SDDIT_CACHE to a folder on a larger disk.",
            folder, total_bytes / 1e9, shards_dir(), max(limit, 0) / 1e9,
        )  # fmt: skip


def _mapped(folder: Path, file: File) -> np.ndarray | None:
    """The copy, if it is there and whole; one that is not is removed."""
    path = folder / file.file
    try:
        array = load_array(folder, file)
        info = path.stat()
    except (DataError, OSError):
        path.unlink(missing_ok=True)
        return None
    if (stamp := _stamp(path, info)) not in _verified:
        if info.st_size != file.bytes or array_digest(array) != file.sha256:
            log.warning("%s is not what was copied, so it is copied anew.", path)
            path.unlink(missing_ok=True)
            return None
        _verified.add(stamp)
    with contextlib.suppress(OSError):  # its last use, whatever the disk is mounted with
        os.utime(path, ns=(time.time_ns(), info.st_mtime_ns))
    return array


def _copy(manifest: Manifest, file: File, folder: Path) -> np.ndarray:
    """Copies, verifies and maps a file. The caller holds its lock, so a part that is there is a killed process's."""
    assert isinstance(manifest.folder, str)
    part, path = folder / f".{file.file}", folder / file.file
    try:
        filesystem, root = open_filesystem(manifest.folder)
        with filesystem.open_input_stream(f"{root}/{file.file}") as source, open(part, "wb") as target:
            with _lock("room"):
                make_room(file.bytes)
                target.truncate(file.bytes)  # from here on it counts
            shutil.copyfileobj(source, target, _PART_BYTES)
            if (size := target.tell()) != file.bytes:
                raise wrong_size(manifest.folder, file, size)
            target.flush()
            os.fsync(target.fileno())  # a name must never stand for values that a power cut took
        array = _load_part(part, manifest.folder)
        if array_digest(array) != file.sha256:
            raise wrong_checksum(manifest.folder, file)
        os.replace(part, path)
    except FileNotFoundError:
        raise DataError(
            f"{manifest.folder}/{file.file} is no longer there. Copy the data there again from where they are whole."
        ) from None
    finally:
        part.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process made room; what is mapped stays readable
        _verified.add(_stamp(path, path.stat()))
    return array


def _stamp(path: Path, info: os.stat_result) -> tuple[str, int, int, int]:
    return str(path), info.st_ino, info.st_size, info.st_mtime_ns


def _load_part(part: Path, folder: str) -> np.ndarray:
    try:
        return np.load(part, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{folder}/{part.name[1:]} is not a .npy file of numbers: {error}. Prepare the data again."
        ) from None


def make_room(size: int) -> None:
    """Removes the copies that were used longest ago until `size` more bytes fit, if they can."""
    copies = sorted(_copies())
    excess = sum(held for _, held, _ in copies) + size - limit_bytes()
    for used, held, path in copies:
        if excess <= 0:
            break
        if path.name.startswith(".") and time.time_ns() - used < _STALE_NS:
            continue
        path.unlink(missing_ok=True)
        excess -= held
        with contextlib.suppress(OSError):  # the last of its data set takes the folder with it
            path.parent.rmdir()


def _copies() -> Iterator[tuple[int, int, Path]]:
    """Last use in ns, bytes and path of every copy, and of those being made, whose names begin with a dot."""
    for path in shards_dir().glob("*/*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another process made room
            info = path.stat()
            yield info.st_mtime_ns if path.name.startswith(".") else info.st_atime_ns, info.st_size, path


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Held by one process of this node, and one thread of it."""
    folder = shards_dir() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as lock:
        with contextlib.suppress(OSError):  # some cluster file systems have no locks: then the last copy wins
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
