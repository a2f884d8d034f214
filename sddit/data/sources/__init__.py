"""What data sets are made of: folders of images, parquet, WebDataset tars, `.npz`; here or on any storage.

Three steps, each dearer than the one before: `list_source` (names and sizes: all that a second run compares),
`index_source` (labels, and where each image lies) and `read_images` (the images, by whoever works on them). Free of
torch; nothing is unpickled. To add a kind: a module with these last two, and its lines in `KINDS` and `SUFFIXES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product

import numpy as np
import pyarrow as pa
from pyarrow import fs

from sddit.data.sources import folder, npz, parquet, webdataset
from sddit.data.sources.base import IMAGES, Index, Kind, Listing, Place, check_no_class_is_empty, suffix_of
from sddit.errors import DataError, StorageError
from sddit.filesystem import in_words, is_remote, open_filesystem, patiently


@dataclass(frozen=True)
class _Reading:
    index: Callable[[Listing, fs.FileSystem], Index]
    read: Callable[[fs.FileSystem, Sequence[Place], bool], Iterator[tuple[str, bytes | np.ndarray | None]]]


KINDS: dict[Kind, _Reading] = {
    "folder": _Reading(folder.index, folder.read),
    "parquet": _Reading(parquet.index, parquet.read),
    "webdataset": _Reading(webdataset.index, folder.read),
    "npz": _Reading(npz.index, npz.read),
}
SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".tar": "webdataset", ".npz": "npz"}
SPLIT = re.compile(r"(?:^|[-_./])(train|training|val|valid|validation|dev|test)(?=[-_./]|$)")
ALLOWED = "Give a folder with a subfolder of images for each class, .parquet, .tar or .npz"


def list_source(source: str) -> Listing:
    """The files at `source`: a folder, a file, or a pattern such as ``data/train-*.parquet`` or ``{000..146}.tar``.

    Raises:
        UsageError, StorageError: it cannot be opened.
        DataError: nothing there, several splits, or nothing that images are read from.
    """
    # A `?` of a pattern would look like an address's query, so only these are wildcards.
    where, pattern = source.rstrip("/"), ""
    if any(sign in source for sign in "*{"):
        where, _, pattern = source.rpartition("/")
        where = where or ("/" if source.startswith("/") else ".")
        if any(sign in where for sign in "*{"):
            raise DataError(f"{source} has a pattern in a folder's name. Only its last part may be one.")
    filesystem, root = open_filesystem(where)
    try:
        info = patiently(lambda: filesystem.get_file_info(root), f"Listing {where}")
        if info.type == fs.FileType.File and not pattern:
            kind = SUFFIXES.get(suffix_of(root))
            if kind is None:
                raise DataError(f"{source} is a file of another kind. {ALLOWED}.")
            return Listing(kind, where, root.rpartition("/")[0], ((root, info.size),))
        selector = fs.FileSelector(root, recursive=not pattern)
        infos = patiently(lambda: filesystem.get_file_info(selector), f"Listing {where}")
    except OSError as error:
        raise _storage_error(where, error) from error
    shown = [each for each in infos if not _hidden(each.path.removeprefix(root))]
    files = sorted((each.path, each.size) for each in shown if each.type == fs.FileType.File)
    if pattern:
        wanted = expand_braces(pattern)
        files = [file for file in files if any(fnmatch(file[0].rpartition("/")[2], each) for each in wanted)]
        if missing := [
            each for each in wanted if "*" not in each and not any(f[0].endswith(f"/{each}") for f in files)
        ]:
            raise DataError(f"{source}: {where} has no {missing[0]} ({len(missing)} of {len(wanted)} are missing).")
    by_kind = {kind: [f for f in files if suffix_of(f[0]) == suffix] for suffix, kind in SUFFIXES.items()}
    by_kind["folder"] = [f for f in files if suffix_of(f[0]) in IMAGES]
    kinds = [kind for kind, found in by_kind.items() if found]
    if not kinds:
        raise DataError(f"{source} has no images. {ALLOWED}.")
    if len(kinds) > 1 or (kinds[0] == "npz" and len(by_kind["npz"]) > 1) or (pattern and kinds[0] == "folder"):
        raise DataError(f"{source} holds {' and '.join(kinds)} files. {ALLOWED}, of one kind (an .npz alone).")
    folders = {each.path.removeprefix(root).lstrip("/") for each in shown if each.type == fs.FileType.Directory}
    found = tuple(by_kind[kinds[0]])
    folders |= {path.removeprefix(root).lstrip("/").rpartition("/")[0] for path, _ in found}
    top = sorted({folder.partition("/")[0] for folder in folders if folder})
    listing = Listing(kinds[0], where, root, found, tuple(top) if kinds[0] == "folder" else ())
    _check_one_split(source, listing)
    return listing


def expand_braces(pattern: str) -> list[str]:
    """The patterns that one with braces stands for.

    >>> expand_braces("train-{08..10}.{tar,tgz}")[:3]
    ['train-08.tar', 'train-08.tgz', 'train-09.tar']
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
        elif match := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = match.groups()
            choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(each) for each in product(*choices)]


def index_source(listing: Listing) -> Index:
    """Labels, classes and places of all images; reads labels and headers, no image.

    Raises:
        DataError: labels are missing, doubled or have gaps, or a file is broken.
    """
    filesystem, _ = open_filesystem(listing.uri)
    try:
        index = KINDS[listing.kind].index(listing, filesystem)
    except OSError as error:
        raise _storage_error(listing.uri, error) from error
    _check_classes(listing, index)
    return index


def read_images(uri: str, kind: Kind, places: Sequence[Place]) -> Iterator[tuple[str, bytes | np.ndarray | None]]:
    """(name, content) of the images at `places`: a file's bytes, or of an `.npz` pixels uint8 (H, W) or (H, W, C).

    None where a row of a parquet holds no bytes. Few are in memory at once.

    Raises:
        StorageError: what was listed cannot be read.
        DataError: a file is broken.
    """
    filesystem, _ = open_filesystem(uri)
    try:
        yield from KINDS[kind].read(filesystem, places, is_remote(uri))
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} cannot be read: {error}. Fetch it again.") from error
    except OSError as error:
        raise _storage_error(uri, error) from error


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _check_classes(listing: Listing, index: Index) -> None:
    """Labels 0 … K-1, each with images."""
    if not len(index.labels):
        raise DataError(f"{listing.uri} has no images.")
    low, high = index.labels.min(), index.labels.max()
    if low < 0 or high >= index.num_classes:
        raise DataError(
            f"{listing.uri} has labels from {low} to {high}, but they must be in [0, {index.num_classes}). A test set "
            "whose labels are kept back has -1 and cannot be trained on."
        )
    check_no_class_is_empty(listing.uri, np.bincount(index.labels, minlength=index.num_classes), index.classes)


def _check_one_split(source: str, listing: Listing) -> None:
    """Training and test images of one folder must not be mixed by mistake."""
    if listing.kind == "folder":
        if listing.folders and all(SPLIT.fullmatch(name) for name in listing.folders):
            raise DataError(
                f"{source} has the subfolders {', '.join(listing.folders)}, which are no classes. Give one of them: "
                f"{source.rstrip('/')}/{listing.folders[0]}"
            )
        return
    splits = {match[1] for path, _ in listing.files if (match := SPLIT.search(listing.name(path)))}
    if len(splits) > 1:
        suffix = suffix_of(listing.files[0][0])
        raise DataError(
            f"{source} holds several splits ({', '.join(sorted(splits))}). Give one by a pattern, as in "
            f"'{source.rstrip('/')}/{sorted(splits)[0]}*{suffix}'"
        )


def _storage_error(uri: str, error: OSError) -> StorageError | DataError:
    if isinstance(error, FileNotFoundError) and not is_remote(uri):
        return DataError(f"{error.filename or uri} does not exist. {ALLOWED}.")
    return StorageError(f"Cannot read {uri}: {in_words(uri, error)}.")


__all__ = ["Index", "Kind", "Listing", "Place", "check_no_class_is_empty", "index_source", "list_source", "read_images"]
