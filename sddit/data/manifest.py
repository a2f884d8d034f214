"""What a prepared data set is: `manifest.json` beside `.npy` shards. Reads and checks it; free of torch.

    <folder>/manifest.json      counts, shape, classes, and the size and digest of every file
    <folder>/images-00000.npy   uint8 (n, C, H, W)
    <folder>/labels-00000.npy   int64 (n,)

The manifest is written last: a folder without one is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sddit.errors import DataError, did_you_mean

MANIFEST = "manifest.json"
VERSION: Literal[1] = 1  # of the folder's layout

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


class Manifest(_Frozen):
    """A prepared data set. `digest` stands for its content, wherever it lies and whatever it is called."""

    version: Literal[1] = VERSION
    name: str
    kind: Literal["pixels"] = "pixels"
    count: Count
    shape: tuple[Count, Count, Count]  # (C, H, W)
    dtype: Literal["uint8"] = "uint8"
    num_classes: Count
    shards: tuple[Shard, ...]
    digest: str
    folder: Path = Field(exclude=True)  # where it was read from; not in the file

    def verify(self) -> None:
        """Reads every shard and compares its values with the manifest's digests; seconds per GB.

        Raises:
            DataError: naming the first file that is not what was written.
        """
        for shard in self.shards:
            for file in (shard.images, shard.labels):
                if array_digest(load_array(self.folder, file)) != file.sha256:
                    raise DataError(
                        f"{self.folder / file.file} has a wrong checksum: its values are not those that were written. "
                        f"{_remake(self.folder)}"
                    )


def open_manifest(path: str | Path) -> Manifest:
    """The data set called `path`: a name in `DATASETS` (written into the cache on first use) or a folder.

    Names win over folders; write ``./digits`` for a folder of that name. Checks that every shard is there and has
    its size, reading none (for that, see `Manifest.verify`): milliseconds.

    Raises:
        DataError: missing, half-written, or not what its manifest says.
    """
    from sddit.data import DATASETS  # the table imports the data sets, which import this module

    if str(path) not in DATASETS:
        return read_manifest(Path(path).expanduser())
    folder = cache_dir() / "data" / str(path)
    if not folder.exists():
        _materialise(DATASETS[str(path)], folder)
    return read_manifest(folder)


def cache_dir() -> Path:
    """Where data sets, reference statistics and weights are kept: `$SDDIT_CACHE`, else ``~/.cache/sddit``."""
    return Path(os.environ.get("SDDIT_CACHE") or "~/.cache/sddit").expanduser()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`, checked against the sizes of its files. Raises as `open_manifest`."""
    values = _read_json(folder)
    if values.get("version") != VERSION:
        raise DataError(
            f"{folder / MANIFEST} is of version {values.get('version')}, but this sddit reads version {VERSION}. "
            f"Use the sddit that wrote it, or make the data anew. {_remake(folder)}"
        )
    try:
        manifest = Manifest.model_validate({**values, "folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{folder / MANIFEST}: {where}: {first['msg']}. {_remake(folder)}") from None
    if sum(shard.count for shard in manifest.shards) != manifest.count or _digest(manifest) != manifest.digest:
        raise DataError(f"{folder / MANIFEST} contradicts itself: its count or digest was edited. {_remake(folder)}")
    for shard in manifest.shards:
        for file in (shard.images, shard.labels):
            _check_size(folder, file)
    return manifest


def write_manifest(
    folder: Path, shards: Sequence[Shard], *, name: str, shape: tuple[int, int, int], num_classes: int
) -> Manifest:
    """Writes `manifest.json`, atomically and after all else: from here on the folder is a data set."""
    count = sum(shard.count for shard in shards)
    draft = Manifest(
        name=name, count=count, shape=shape, num_classes=num_classes, shards=tuple(shards), digest="", folder=folder
    )
    manifest = draft.model_copy(update={"digest": _digest(draft)})
    temporary = folder / f".{MANIFEST}-{uuid.uuid4().hex}"
    with open(temporary, "w") as file:
        file.write(json.dumps(manifest.model_dump(), indent=1) + "\n")
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
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / file.file} is not a .npy file of numbers: {error}. {_remake(folder)}") from error


def array_digest(array: np.ndarray) -> str:
    """sha256 of the values in C order. Not of the file, since numpy's header differs between versions of numpy."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _digest(manifest: Manifest) -> str:
    content = {
        "kind": manifest.kind,
        "shape": manifest.shape,
        "dtype": manifest.dtype,
        "num_classes": manifest.num_classes,
        "shards": [[shard.count, shard.images.sha256, shard.labels.sha256] for shard in manifest.shards],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def _read_json(folder: Path) -> dict:
    """The values in `manifest.json`, or what is wrong with the folder."""
    from sddit.data import DATASETS

    if not folder.exists():
        hint = did_you_mean(str(folder), DATASETS).replace("Known:", "Built-in:")
        raise DataError(f"No data set at {folder}. {hint} For images: sddit prepare <images> --out {folder}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, but a data set is a folder with a {MANIFEST}. Give the folder.")
    try:
        values = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        if any(folder.glob("*.npy")):
            raise DataError(
                f"{folder} is half-written: it has shards, but no {MANIFEST}, which comes last. {_remake(folder)}"
            ) from None
        raise DataError(
            f"{folder} is not a data set: it has no {MANIFEST}. For images: sddit prepare {folder} --out <folder>"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}. {_remake(folder)}") from error
    if not isinstance(values, dict):
        raise DataError(f"{folder / MANIFEST} is not a manifest: it holds no JSON object. {_remake(folder)}")
    return values


def _check_size(folder: Path, file: File) -> None:
    try:
        size = (folder / file.file).stat().st_size
    except OSError as error:
        raise DataError(f"{folder / file.file} is missing: {error.strerror}. {_remake(folder)}") from None
    if size != file.bytes:
        raise DataError(f"{folder / file.file} has {size:,} bytes, but {file.bytes:,} were written. {_remake(folder)}")


def _remake(folder: Path) -> str:
    """What to do about a broken data set: a built-in one comes back by itself, another has to be prepared again."""
    if folder.parent == cache_dir() / "data":
        return f"Delete {folder}: it is made anew on the next use."
    return f"Delete {folder} and prepare it again, or copy it again from where it is whole."
