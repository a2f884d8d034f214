"""Images that somebody else made, to be scored or scored against: a folder of files, or an `.npz` as the ADM suite's.

Read in batches, since 50,000 images of 256² are 10 GB. Nothing is unpickled; free of torch.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sddit.errors import DataError, UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm"}


def image_batches(path: Path, batch_size: int = 256) -> Iterator[np.ndarray]:
    """The images at `path` in order: uint8 (b, C, H, W), C 1 or 3.

    Args:
        path: a folder of image files (searched below too, in the order of their paths), or an `.npz` with `arr_0`
            uint8 (N, H, W, C) or (N, C, H, W).

    Raises:
        DataError: nothing there, images of different sizes, or a file that cannot be read.
    """
    batches = _from_npz(path, batch_size) if path.suffix == ".npz" else _from_folder(path, batch_size)
    for batch in batches:
        yield channels_first(batch)


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


def npz_statistics(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """`mu` (d,) and `sigma` (d, d) of Inception features in an `.npz`, float64, or None where it has images only.

    ADM's reference files hold both, and there the statistics are those of the whole training set.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file or "sigma" not in file:
                return None
            mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz: {error}. Fetch or write it again.") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise DataError(f"{path} holds mu {mu.shape} and sigma {sigma.shape}, but they must be (d,) and (d, d).")
    return mu, sigma


def _from_npz(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    """Slices of `arr_0` straight from the archive: `np.load` would hold all of it."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = header(file)
            if fortran_order or dtype != np.uint8 or len(shape) != 4:
                raise DataError(f"{path} has arr_0 {dtype} {shape}, but it must be uint8 (N, H, W, C) in C order.")
            for lo in range(0, shape[0], batch_size):
                part = (min(batch_size, shape[0] - lo), *shape[1:])
                yield np.frombuffer(file.read(math.prod(part)), dtype=np.uint8).reshape(part)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz with images arr_0: {error}. Write it again.") from error


def _from_folder(folder: Path, batch_size: int) -> Iterator[np.ndarray]:
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"No images at {folder}. Give a folder of image files ({', '.join(sorted(SUFFIXES))}).")
    first: np.ndarray | None = None
    for lo in range(0, len(files), batch_size):
        batch = []
        for path in files[lo : lo + batch_size]:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
            except OSError as error:
                raise DataError(f"{path} is not an image: {error}. Remove it, or write it again.") from error
            pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
            first = pixels if first is None else first
            if pixels.shape != first.shape:
                raise DataError(
                    f"{path} is {pixels.shape} (H, W, C), but {files[0]} is {first.shape}. "
                    "Bring all images to one size first: how they are resized is part of the score."
                )
            batch.append(pixels)
        yield np.stack(batch)
