"""What a prepared data set is: `manifest.json` beside `.npy` shards. Reads and checks it; free of torch.

    <folder>/manifest.json      counts, shape, classes, and the size and digest of every file
    <folder>/images-00000.npy   uint8 (n, C, H, W); of latents float16 (n, 2C, h, w): their posterior's mean, then std
                                (n, 4C, h, w): of the image, then of the mirrored image
    <folder>/labels-00000.npy   int64 (n,)

The manifest is written last: a folder without one is not a data set. The folder may be an address such as
``s3://bucket/data``; its shards are then read through the node's copies (`sddit.data.remote`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sddit.errors import DataError, StorageError, did_you_mean
from sddit.filesystem import in_words, is_remote, open_filesystem, patiently

MANIFEST = "manifest.json"
VERSION: Literal[1] = 1  # of the folder's layout
_FRESH_SECONDS = 30  # a plan of many cells asks a remote folder once

Count = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Frozen):
    """One `.npy` file: its size on disk, and the digest of its values."""

    file: str = Field(pattern=r"^\w[\w.-]*\.npy$")  # a bare name: a manifest never points outside its folder
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # see `array_digest`


class Shard(_Frozen):
    """`count` images with their labels."""

    images: File
    labels: File
    count: Count


class VaeInfo(_Frozen):
    """The autoencoder behind latents: x = scaling_factor · (z − shift_factor), z from the posterior (diffusers)."""

    name: str  # what it was loaded by: a folder, or a name on the Hugging Face hub
    digest: str  # of its weights and configuration
    scaling_factor: float
    shift_factor: float = 0.0
    image_shape: tuple[Count, Count, Count]  # (C, H, W) of the pixels
    mirrored: bool = False  # whether the mirrored images were encoded as well


class Manifest(_Frozen):
    """A prepared data set. `digest` stands for its content, wherever it lies and whatever it is called."""

    version: Literal[1] = VERSION
    name: str
    kind: Literal["pixels", "latents"] = "pixels"
    count: Count
    shape: tuple[Count, Count, Count]  # (C, H, W) as the network sees it
    dtype: Literal["uint8", "float16"] = "uint8"
    num_classes: Count
    classes: tuple[str, ...] | None = None  # their names, where the source has any
    vae: VaeInfo | None = None  # of latents
    shards: tuple[Shard, ...]
    digest: str
    folder: Path | str = Field(exclude=True)  # where it was read from, a str if remote; not in the file

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image in a file: latents are stored as mean and std, then perhaps those of the mirrored."""
        channels, height, width = self.shape
        planes = 1 if self.vae is None else 4 if self.vae.mirrored else 2
        return planes * channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pixels."""
        return self.vae.image_shape if self.vae else self.shape

    @property
    def files(self) -> list[File]:
        """All files but the manifest."""
        return [file for shard in self.shards for file in (shard.images, shard.labels)]

    def verify(self) -> None:
        """Reads every shard and compares its values with the manifest's digests; a second per GB and core.

        Raises:
            DataError: naming the first file that is not what was written.
        """
        from sddit.data.remote import load_copy  # which imports this module

        def check(file: File) -> None:
            if isinstance(self.folder, str):
                load_copy(self, file)  # verifies
            elif array_digest(load_array(self.folder, file)) != file.sha256:
                raise wrong_checksum(self.folder, file)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(check, self.files))

    def verify_once(self) -> None:
        """`verify`, unless this machine has done so and no file has changed since. Remote data are left to the copying,
        which verifies what it copies. Raises as `verify`."""
        if isinstance(self.folder, str):
            return
        stats = [(self.folder / file.file).stat() for file in self.files]
        seen = repr([str(self.folder.absolute()), *((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)])
        mark = cache_dir() / "verified" / f"{self.digest[:16]}-{hashlib.sha256(seen.encode()).hexdigest()[:16]}"
        if not mark.exists():
            self.verify()
            with contextlib.suppress(OSError):  # then again the next time
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()


def open_manifest(path: str | Path, *, patience_seconds: float = 0.0) -> Manifest:
    """The data set called `path`: a name in `DATASETS` (written into the cache on first use), a folder, or the address
    of one on remote storage (see `open_filesystem`).

    Names win over folders; write ``./digits`` for a folder of that name. Checks that every shard is there and has
    its size, reading none (for that, see `Manifest.verify`): milliseconds, of remote storage a request or two. An
    outage of remote storage is waited for as long as `patience_seconds`.

    Raises:
        DataError: missing, half-written, or not what its manifest says.
        StorageError: remote storage cannot be read.
        UsageError: an unknown scheme.
    """
    from sddit.data import DATASETS  # the table imports the data sets, which import this module

    if is_remote(path):
        uri, now = str(path).rstrip("/"), int(time.monotonic() // _FRESH_SECONDS)
        return patiently(lambda: _read_remote(uri, now), f"Reading {uri}", seconds=patience_seconds)
    if str(path) not in DATASETS:
        return read_manifest(Path(open_filesystem(path)[1]) if "://" in str(path) else Path(path).expanduser())
    folder = cache_dir() / "data" / str(path)
    if not folder.exists():
        _materialise(DATASETS[str(path)], folder)
    return read_manifest(folder)


def cache_dir() -> Path:
    """Where data sets, reference statistics and weights are kept: `$SDDIT_CACHE`, else ``~/.cache/sddit``."""
    return Path(os.environ.get("SDDIT_CACHE") or "~/.cache/sddit").expanduser()


@functools.lru_cache(maxsize=16)
def _read_remote(uri: str, now: int) -> Manifest:
    """`now` is part of the key: what is remembered is forgotten after a while."""
    return read_manifest(uri)


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest in `folder`, checked against the sizes of its files. Raises as `open_manifest`."""
    values, sizes = _read_folder(folder)
    where = f"{folder}/{MANIFEST}"
    if values.get("version") != VERSION:
        raise DataError(
            f"{where} is of version {values.get('version')}, but this sddit reads version {VERSION}. "
            f"Use the sddit that wrote it, or make the data anew. {_remake(folder)}"
        )
    try:
        manifest = Manifest.model_validate({**values, "folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {field}: {first['msg']}. {_remake(folder)}") from None
    latents = manifest.vae is not None
    if (manifest.kind == "latents") != latents or (manifest.dtype == "float16") != latents:
        raise DataError(f"{where} contradicts itself: latents have a vae, pixels none. {_remake(folder)}")
    if sum(shard.count for shard in manifest.shards) != manifest.count or _digest(manifest) != manifest.digest:
        raise DataError(f"{where} contradicts itself: its count or digest was edited. {_remake(folder)}")
    _check_classes(manifest)
    for file in manifest.files:
        _check_size(folder, file, sizes.get(file.file))
    return manifest


def write_manifest(
    folder: Path,
    shards: Sequence[Shard],
    *,
    name: str,
    shape: tuple[int, int, int],
    num_classes: int,
    classes: Sequence[str] | None = None,
    vae: VaeInfo | None = None,
) -> Manifest:
    """Writes `manifest.json`, atomically and after all else: from here on the folder is a data set.

    `shape` is what the network sees: (C, H, W) of pixels, (C, h, w) of the latents of `vae`.
    """
    draft = Manifest(
        name=name,
        kind="latents" if vae else "pixels",
        count=sum(shard.count for shard in shards),
        shape=shape,
        dtype="float16" if vae else "uint8",
        num_classes=num_classes,
        classes=tuple(classes) if classes else None,
        vae=vae,
        shards=tuple(shards),
        digest="",
        folder=folder,
    )
    manifest = draft.model_copy(update={"digest": _digest(draft)})
    temporary = folder / f".{MANIFEST}-{uuid.uuid4().hex}"
    with open(temporary, "w") as file:
        file.write(json.dumps(manifest.model_dump(exclude_none=True), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    return manifest


def load_array(folder: Path, file: File) -> np.ndarray:
    """A shard's file as a read-only memory map; never unpickles.

    Raises:
        DataError: it is not a `.npy` file of plain values.
    """
    try:
        return np.load(folder / file.file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder / file.file} is not a .npy file of numbers: {error}. {_remake(folder)}") from error


def array_digest(array: np.ndarray) -> str:
    """sha256 of the values in C order. Not of the file, since numpy's header differs between versions of numpy."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _digest(manifest: Manifest) -> str:
    content: dict[str, Any] = {
        "kind": manifest.kind,
        "shape": manifest.shape,
        "dtype": manifest.dtype,
        "num_classes": manifest.num_classes,
        "shards": [[shard.count, shard.images.sha256, shard.labels.sha256] for shard in manifest.shards],
    }
    if manifest.vae:  # where it was loaded from is not content
        content["vae"] = manifest.vae.model_dump(exclude={"name"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def wrong_checksum(folder: Path | str, file: File) -> DataError:
    """For a file whose values are not those that were written."""
    return DataError(
        f"{folder}/{file.file} has a wrong checksum: its values are not those that were written. {_remake(folder)}"
    )


def wrong_size(folder: Path | str, file: File, size: int) -> DataError:
    """For a file of another `size` than was written."""
    return DataError(f"{folder}/{file.file} has {size:,} bytes, but {file.bytes:,} were written. {_remake(folder)}")


def _materialise(write: Callable[[Path], Manifest], folder: Path) -> None:
    """Lets `write` fill a folder of its own and moves that into place; of several processes, the first one wins."""
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / MANIFEST).exists():  # else another process was faster, with the same content
                raise
    except OSError as error:
        raise DataError(
            f"Cannot write the data set {folder.name!r} to {folder}: {error}. "
            "Set SDDIT_CACHE to a folder that can be written to."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_folder(folder: Path | str) -> tuple[dict, dict[str, int]]:
    """The values in `manifest.json` and the size of every file beside it, or what is wrong with the folder."""
    where = f"{folder}/{MANIFEST}"
    try:
        filesystem, path = open_filesystem(folder)
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            raise DataError(f"{folder} is a file, but a data set is a folder with a {MANIFEST}. Give the folder.")
        listed = filesystem.get_file_info(fs.FileSelector(path)) if info.type == fs.FileType.Directory else []
        sizes = {entry.base_name: entry.size for entry in listed if entry.type == fs.FileType.File}
        if MANIFEST not in sizes:
            raise DataError(_no_manifest(folder, [entry.base_name for entry in listed]))
        with filesystem.open_input_file(f"{path}/{MANIFEST}") as file:
            values = json.loads(file.read())
    except OSError as error:
        kind = StorageError if isinstance(folder, str) else DataError
        raise kind(f"{where} cannot be read: {in_words(folder, error)}.") from error
    except ValueError as error:
        raise DataError(f"{where} cannot be read: {error}. {_remake(folder)}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where} is not a manifest: it holds no JSON object. {_remake(folder)}")
    return values, sizes


def _no_manifest(folder: Path | str, names: Sequence[str]) -> str:
    """What to say of a folder that holds `names`, but no manifest."""
    from sddit.data import DATASETS

    if any(name.endswith(".npy") for name in names):
        return f"{folder} is half-written: it has shards, but no {MANIFEST}, which comes last. {_remake(folder)}"
    if names or (isinstance(folder, Path) and folder.exists()):
        return f"{folder} is not a data set: it has no {MANIFEST}. For images: sddit prepare {folder} --out <folder>"
    if isinstance(folder, str):  # a bucket that does not exist looks like a folder that does not
        words = in_words(folder, FileNotFoundError(errno.ENOENT, "no such folder"))
        hint = f"{words[0].upper()}{words[1:]}."
    else:
        hint = did_you_mean(str(folder), DATASETS).replace("Known:", "Built-in:")
    return f"No data set at {folder}. {hint} For images: sddit prepare <images> --out {folder}"


def _check_classes(manifest: Manifest) -> None:
    names = manifest.classes or ()
    if names and len(names) != manifest.num_classes:
        raise DataError(
            f"{manifest.folder}/{MANIFEST} contradicts itself: it names {len(names)} classes, and has "
            f"{manifest.num_classes}. {_remake(manifest.folder)}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"{manifest.folder}/{MANIFEST} has the class {twice[0]!r} twice, so one class would be trained as two "
            "labels. Rename or merge them in the source, and prepare the data again."
        )


def _check_size(folder: Path | str, file: File, size: int | None) -> None:
    if size is None:
        raise DataError(f"{folder}/{file.file} is missing: no such file. {_remake(folder)}")
    if size != file.bytes:
        raise wrong_size(folder, file, size)


def _remake(folder: Path | str) -> str:
    """What to do about a broken data set: a built-in one comes back by itself, another has to be prepared again."""
    if isinstance(folder, Path) and folder.parent == cache_dir() / "data":
        return f"Delete {folder}: it is made anew on the next use."
    return f"Delete {folder} and prepare it again, or copy it again from where it is whole."
