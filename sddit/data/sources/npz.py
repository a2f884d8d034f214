"""An `.npz` of images uint8 (N, H, W, C) and labels, as numpy and the ADM suite write it; nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from pyarrow import fs

from sddit.data.sources.base import BUFFER, Index, Listing, Place, count_classes
from sddit.errors import DataError

BROKEN = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what a torn one may raise


def index(listing: Listing, filesystem: fs.FileSystem) -> Index:
    """Images are `images` or `arr_0`, labels `labels` or `arr_1`; of the images only the header is read."""
    ((path, _),) = listing.files
    with filesystem.open_input_file(path) as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                images = _images_of(arrays.files)
                names = [name for name in ("labels", "arr_1") if name in arrays.files]
                if images is None or not names:
                    raise DataError(
                        f"{path} holds {', '.join(arrays.files)}, but training data need images (or arr_0), uint8 "
                        "(N, H, W, C), and labels (or arr_1), integers (N,). Write it with np.savez(images=, labels=)."
                    )
                labels = arrays[names[0]]
            shape = _header(file, path, images)[0]
        except BROKEN as error:
            raise DataError(f"{path} cannot be read as an .npz: {error}. Write it again.") from error
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{path} has {names[0]} {labels.dtype} {labels.shape}, but {shape[0]:,} integers are needed.")
    labels = labels.astype(np.int64)
    return Index(labels, count_classes(labels, None), None, rows=((path, shape[0]),))


def _images_of(names: Iterable[str]) -> str | None:
    there = set(names)
    return next((name for name in ("images", "arr_0") if name in there), None)


def _header(file: Any, path: str, name: str) -> tuple[tuple[int, ...], int]:
    """Shape of the images in an `.npz`, and bytes of the header before their values."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)  # type: ignore[arg-type]
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = header(member)  # type: ignore[arg-type]
        if (
            dtype != np.uint8
            or fortran_order
            or len(shape) not in (3, 4)
            or (len(shape) == 4 and shape[3] not in (1, 3))
        ):
            raise DataError(
                f"{path} has {name} {dtype} {shape}, but images are uint8 (N, H, W, C) with C 1 or 3, or (N, H, W), in "
                "C order."
            )
        return shape, member.tell()


def read(filesystem: fs.FileSystem, places: Sequence[Place], remote: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels (H, W) or (H, W, C) of the images at `places`."""
    for path, lo, hi in places:
        yield from _slice(filesystem, path, lo, hi)


def _slice(filesystem: fs.FileSystem, path: str, lo: int, hi: int) -> Iterator[tuple[str, np.ndarray]]:
    """Straight from the file where it is not compressed; else what is before image `lo` is unpacked and thrown away."""
    with filesystem.open_input_file(path) as file:
        with zipfile.ZipFile(file) as archive:
            name = _images_of(each.removesuffix(".npy") for each in archive.namelist())
            assert name is not None, path  # as indexed
            shape, skip = _header(file, path, name)
            each = math.prod(shape[1:])
            info = archive.getinfo(f"{name}.npy")
        begin = skip + lo * each
        try:
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)
                head = file.read(4)  # lengths of name and extra field, after which the values come
                file.seek(info.header_offset + 30 + int.from_bytes(head[:2], "little")
                          + int.from_bytes(head[2:], "little") + begin)  # fmt: skip
                yield from _pixels(file.read, shape, lo, hi, path)
            else:
                with zipfile.ZipFile(file) as archive, archive.open(info) as member:
                    while begin > 0:
                        begin -= len(member.read(min(begin, BUFFER))) or begin
                    yield from _pixels(member.read, shape, lo, hi, path)
        except BROKEN as error:
            raise DataError(f"{path} cannot be read as an .npz: {error}. Write it again.") from error


def _pixels(
    read: Callable[[int], bytes], shape: tuple[int, ...], lo: int, hi: int, path: str
) -> Iterator[tuple[str, np.ndarray]]:
    for i in range(lo, hi):
        values = read(math.prod(shape[1:]))
        if len(values) < math.prod(shape[1:]):
            raise DataError(f"{path} is cut short at image {i:,} of {shape[0]:,}. Write it again.")
        yield f"{path.rpartition('/')[2]}, image {i}", np.frombuffer(values, np.uint8).reshape(shape[1:])
