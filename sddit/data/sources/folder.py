"""Folders of images, a subfolder for each class; and images that are parts of larger files, read the same way."""

from __future__ import annotations

import functools
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from pyarrow import fs

from sddit.data.sources.base import THREADS, Index, Listing, Place
from sddit.errors import DataError
from sddit.filesystem import patiently


def index(listing: Listing, filesystem: fs.FileSystem) -> Index:
    """Classes are the subfolders in sorted order, so ImageNet's synsets get the usual numbers."""
    names = [listing.name(path) for path, _ in listing.files]
    if loose := [name for name in names if "/" not in name]:
        raise DataError(
            f"{listing.uri} has images that are in no class, such as {loose[0]}. Put those of each class into a "
            "subfolder of its name (one subfolder for images of one kind)."
        )
    classes = listing.folders
    known: dict[str, str] = {}
    for name in classes:
        twin = known.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), name)
        if twin != name:
            raise DataError(f"{listing.uri} has the class folders {twin!r} and {name!r}. Join them, or rename one.")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.partition("/")[0]] for name in names], dtype=np.int64)
    extents = [[path, 0, size, name] for (path, size), name in zip(listing.files, names, strict=True)]
    return Index(labels, len(classes), classes, extents)


def read(filesystem: fs.FileSystem, places: Sequence[Place], remote: bool) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the parts of files at `places`; from a remote storage some dozens ahead."""
    open_file = functools.lru_cache(maxsize=4)(filesystem.open_input_file)  # of a tar, many parts are read

    def get(place: Place) -> tuple[str, bytes]:
        path, offset, size, name = place
        return name, patiently(lambda: open_file(path).read_at(size, offset), f"Reading {path}")

    if not remote:
        yield from map(get, places)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        left = iter(places)
        ahead = deque(pool.submit(get, place) for place in islice(left, 2 * THREADS))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(get, place) for place in islice(left, 1))
