"""Images that somebody else made, to be scored or scored against: a folder of files, or an `.npz` as the ADM suite's.

Read in batches, since 50,000 images of 256² are 10 GB; number and size are known, and checked, before the first is
read. Nothing is unpickled; free of torch.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sddit.errors import DataError, UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm"}
BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what a torn `.npz` may raise
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Images:
    """`count` images of `shape` (C, H, W), read again at each call of ``batches(size)``: uint8 (b, C, H, W), in order.

    `name` is for messages.
    """

    name: str
    count: int
    shape: Shape
    batches: Callable[[int], Iterator[np.ndarray]]


def open_images(path: Path) -> Images:
    """The images at `path`, C 1 or 3.

    Args:
        path: a folder of image files (searched below too, in the order of their paths), or an `.npz` with `arr_0`
            uint8 (N, H, W, C) or (N, C, H, W).

    Raises:
        DataError: nothing there, images of different sizes, or a file that cannot be read. What only shows when the
            pixels are read is raised by the batches.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a folder of images, an .npz with arr_0, or a checkpoint.")
    return _open_npz(path) if path.suffix == ".npz" else _open_folder(path)


def images_in(array: np.ndarray) -> Images:
    """Images that are in memory: uint8 (N, H, W, C) or (N, C, H, W).

    Raises:
        UsageError: not such images.
    """
    images = channels_first(array)

    def batches(size: int) -> Iterator[np.ndarray]:
        return (images[lo : lo + size] for lo in range(0, len(images), size))

    return Images("the images", len(images), (images.shape[1], images.shape[2], images.shape[3]), batches)


def channels_first(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) or (N, C, H, W) as the latter. C is 1 or 3; where both ends could be C, it is the last.

    Raises:
        UsageError: not such images.
    """
    if images.dtype == np.uint8 and images.ndim == 4:
        if images.shape[3] in (1, 3):
            return images.transpose(0, 3, 1, 2)
        if images.shape[1] in (1, 3):
            return images
    raise UsageError(
        f"The images are {images.dtype} of shape {images.shape}, but must be uint8 (N, H, W, C) or (N, C, H, W) with "
        "C 1 or 3."
    )


def npz_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of these names that an `.npz` holds; others are not read.

    Raises:
        DataError: it cannot be read, or holds pickled objects under such a name.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except BROKEN as error:
        raise DataError(f"{path} cannot be read as an .npz: {error}. Fetch or write it again.") from error


def has_images(path: Path) -> bool:
    """Whether an `.npz` holds `arr_0`. Raises as `npz_arrays`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return "arr_0" in file
    except BROKEN as error:
        raise DataError(f"{path} cannot be read as an .npz: {error}. Fetch or write it again.") from error


def _open_npz(path: Path) -> Images:
    """`arr_0`, read straight from the archive: `np.load` would hold all of it."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            stored = _npy_header(path, file)
            there = archive.getinfo("arr_0.npy").file_size - file.tell()
    except BROKEN as error:
        raise _unreadable(path, error) from error
    if there != math.prod(stored):
        raise _unreadable(path, f"arr_0 has {there:,} values of {math.prod(stored):,}")
    shape = channels_first(np.empty((0, *stored[1:]), dtype=np.uint8)).shape[1:]

    def batches(size: int) -> Iterator[np.ndarray]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                _npy_header(path, file)
                for lo in range(0, stored[0], size):
                    part = (min(size, stored[0] - lo), *stored[1:])
                    values = np.frombuffer(file.read(math.prod(part)), dtype=np.uint8)
                    yield channels_first(values.reshape(part))
        except BROKEN as error:
            raise _unreadable(path, error) from error

    return Images(str(path), stored[0], (shape[0], shape[1], shape[2]), batches)


def _npy_header(path: Path, file: object) -> tuple[int, ...]:
    """The shape (N, …) of an array of images, from the head of its `.npy`; `file` is left where its values begin."""
    version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(file)  # type: ignore[arg-type]
    if fortran_order or dtype != np.uint8 or len(shape) != 4:
        raise DataError(f"{path} has arr_0 {dtype} {shape}, but it must be uint8 (N, H, W, C) in C order.")
    return shape


def _unreadable(path: Path, reason: object) -> DataError:
    return DataError(f"{path} cannot be read as an .npz with images arr_0: {reason}. Write it again.")


def _open_folder(folder: Path) -> Images:
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"No images at {folder}. Give a folder of image files ({', '.join(sorted(SUFFIXES))}).")

    def opened(path: Path) -> Image.Image:
        try:
            return Image.open(path)
        except OSError as error:
            raise _no_image(path, error) from error

    def size_of(path: Path) -> Shape:
        with opened(path) as image:
            return (1 if image.mode in ("1", "L") else 3, image.height, image.width)

    first = size_of(files[0])
    for path in files:
        if (shape := size_of(path)) != first:
            raise DataError(
                f"{path} is {shape} (C, H, W), but {files[0]} is {first}. "
                "Bring all images to one size first: how they are resized is part of the score."
            )

    def pixels(path: Path) -> np.ndarray:
        with opened(path) as image:
            try:
                values = np.asarray(image.convert("L" if first[0] == 1 else "RGB"))
            except (OSError, SyntaxError) as error:  # Pillow's way to say of a broken PNG
                raise _no_image(path, error) from error
        return values[None] if first[0] == 1 else values.transpose(2, 0, 1)

    def batches(size: int) -> Iterator[np.ndarray]:
        return (np.stack([pixels(path) for path in files[lo : lo + size]]) for lo in range(0, len(files), size))

    return Images(str(folder), len(files), first, batches)


def _no_image(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not an image: {error}. Remove it, or write it again.")
