"""WebDataset: plain tars in which the files of a sample have one name, an image and its class in a `.cls`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pyarrow import fs

from sddit.data.sources.base import BUFFER, IMAGES, THREADS, Index, Listing, Place, count_classes
from sddit.errors import DataError
from sddit.filesystem import is_remote


def index(listing: Listing, filesystem: fs.FileSystem) -> Index:
    """Reads the headers of all files, and the classes."""

    def get(file: tuple[str, int]) -> list[tuple[int, Place]]:
        return list(_samples(filesystem, *file, listing.name(file[0])))

    with ThreadPoolExecutor(THREADS if is_remote(listing.uri) else 1) as pool:
        found = [sample for samples in pool.map(get, listing.files) for sample in samples]
    labels = np.array([label for label, _ in found], dtype=np.int64)
    return Index(labels, count_classes(labels, None), None, [place for _, place in found])


def _samples(filesystem: fs.FileSystem, path: str, size: int, name: str) -> Iterator[tuple[int, Place]]:
    """(label, place) of the samples of a tar: files of one name up to the first dot, an image and its `.cls`."""
    images: dict[str, Place] = {}
    labels: dict[str, int] = {}
    # A buffer, so that headers are few requests: small images are read through, large ones passed over.
    with filesystem.open_input_file(path) as raw, io.BufferedReader(raw, BUFFER) as buffered:  # type: ignore[type-var]
        try:
            with tarfile.open(fileobj=buffered, mode="r:") as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
                    if not member.isfile() or not stem or suffix not in (*IMAGES, ".cls"):
                        continue
                    if member.offset_data + member.size > size:
                        raise DataError(f"{path} is cut short within {member.name}. Fetch it again.")
                    table: dict[str, Any] = labels if suffix == ".cls" else images
                    if key in table:
                        raise DataError(f"{path} has two {'labels' if table is labels else 'images'} for {key[1:]!r}.")
                    if suffix == ".cls":
                        labels[key] = _label(tar, member, path)
                    else:
                        images[key] = [path, member.offset_data, member.size, f"{name}, {member.name}"]
                buffered.seek(tar.offset)
                if buffered.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes half a header for the end
                    raise DataError(f"{path} is cut short after {len(images):,} images. Fetch it again.")
        except tarfile.TarError as error:
            raise DataError(
                f"{path} is not a plain tar ({error}). Unpack compressed ones, or fetch it again."
            ) from None
    if lonely := sorted(images.keys() ^ labels.keys()):
        what = "an image and no label (.cls)" if lonely[0] in images else "a label and no image (.jpg, .png, …)"
        raise DataError(f"{path}: {lonely[0].lstrip('/')} has {what}; {len(lonely):,} such. Each sample needs both.")
    return ((labels[key], place) for key, place in images.items())


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    file = tar.extractfile(member)
    text = file.read(32) if file else b""
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{path}: {member.name} holds {text!r}, but a .cls must hold a class as a number.") from None
