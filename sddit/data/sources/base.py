"""What all kinds of source share: their files, and where each image lies in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sddit.errors import DataError

Kind = Literal["folder", "parquet", "webdataset", "npz"]
Place = list[Any]  # where images lie, in plain values: see `Index.places`

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
THREADS = 16  # requests at once to a storage that answers late
BUFFER = 2**20  # bytes read at once


@dataclass(frozen=True)
class Listing:
    """The files of a source: what they are, and (path, bytes) of each in order. `uri` opens their file system."""

    kind: Kind
    uri: str
    root: str
    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...] = ()  # below `root`: the classes of an image folder

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def digest(self) -> str:
        """Of names and sizes: the same wherever a copy of the source lies."""
        names = [[self.name(path), size] for path, size in self.files]
        return hashlib.sha256(json.dumps([self.kind, names]).encode()).hexdigest()

    def name(self, path: str) -> str:
        """A file's name below the source's root."""
        return path.removeprefix(self.root).lstrip("/") or path.rpartition("/")[2]


@dataclass(frozen=True)
class Index:
    """Every image of a source: `labels` int64 (n,), the names of the classes where it has any, and where they lie.

    `extents` holds [file, offset, bytes, name] of each image, or `rows` the number of images in each file.
    """

    labels: np.ndarray
    num_classes: int
    classes: tuple[str, ...] | None
    extents: Sequence[Place] = ()
    rows: tuple[tuple[str, int], ...] = ()

    def places(self, lo: int, hi: int) -> list[Place]:
        """Where images lo … hi-1 are: [file, offset, bytes, name] each, or [file, first row, row after the last]."""
        if self.extents:
            return list(self.extents[lo:hi])
        found, begin = [], 0
        for path, count in self.rows:
            first, last = max(lo - begin, 0), min(hi - begin, count)
            if first < last:
                found.append([path, first, last])
            begin += count
        return found


def suffix_of(path: str) -> str:
    name = path.rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def count_classes(labels: np.ndarray, classes: Sequence[str] | None) -> int:
    return len(classes) if classes else int(labels.max(initial=-1)) + 1


def check_no_class_is_empty(where: str, counts: np.ndarray, classes: Sequence[str] | None) -> None:
    """Raises DataError where a class has no images; `counts` has those of each class."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        names = [repr(classes[i]) if classes else str(i) for i in empty[:5]]
        raise DataError(
            f"{where} has no image of {len(empty)} of {len(counts)} classes: {', '.join(names)}"
            f"{', …' if len(empty) > 5 else ''}. Add some, or take the class out (labels run from 0 without a gap)."
        )
