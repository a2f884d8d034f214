"""Checkpoints in a folder or on object storage: written atomically, verified when read, never unpickled.

    <root>/step-00000600/sampling.safetensors    the averaged network: enough to sample
    <root>/step-00000600/training.safetensors    what going on needs: parameters, optimiser, teacher, centres
    <root>/step-00000600/manifest.json           sizes, digests and plain values; written last

A folder without a manifest is not a checkpoint; the newest one that verifies wins (architecture.md §4). Imports torch
only where tensors are read or written, so the driver can keep house.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyarrow import fs

from sddit.errors import CheckpointError, CorruptCheckpointError, OutageError
from sddit.filesystem import in_words, open_filesystem, patiently

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")
MANIFEST = "manifest.json"
SAMPLING, TRAINING = "sampling", "training"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is complete. `values` are plain; tensors are read by `load`."""

    uri: str
    step: int
    values: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def load(self, group: str) -> dict[str, Tensor]:
        """The tensors of 'sampling' or 'training', on the CPU.

        Raises:
            CorruptCheckpointError: the file is missing, or has another size or digest.
            CheckpointError: it was slimmed away.
            OutageError: the storage cannot be read.
        """
        if group not in self.files:
            raise CheckpointError(
                f"{self.uri} was slimmed to its sampling weights, so it cannot be trained further. "
                "Train the cell anew under another sweep name, or raise --max-disk-gb before slimming."
            )
        import safetensors.torch

        filesystem, root = open_filesystem(self.uri)
        expected = self.files[group]
        try:
            data = patiently(lambda: _read(filesystem, f"{root}/{group}.safetensors"), f"Reading {self.uri}")
            if len(data) != expected["bytes"] or _digest(data) != expected["blake2b"]:
                raise ValueError(f"{len(data)} bytes of {expected['bytes']}, or other content than was written")
            return safetensors.torch.load(data)
        except (FileNotFoundError, ValueError, safetensors.SafetensorError) as error:
            raise CorruptCheckpointError(f"Corrupt checkpoint {self.uri}/{group}.safetensors: {error}.") from error
        except OSError as error:  # perhaps whole, so nothing may start again and write over it
            raise OutageError(
                f"Cannot read {self.uri}/{group}.safetensors: {in_words(self.uri, error)}. Run again."
            ) from error


class CheckpointStore:
    """The checkpoints of one cell under `root`, a local path or a URI such as ``s3://bucket/runs/name/identity``.

    `fence` is called before anything is written and raises if another driver owns the cell by now.
    """

    def __init__(self, root: str | Path, *, keep: int = 2, fence: Callable[[], None] | None = None) -> None:
        self.root = str(root).rstrip("/")
        self.keep = keep
        self.fence = fence or (lambda: None)
        self.filesystem, self.path = open_filesystem(self.root)

    def check_writable(self) -> None:
        """Writes and removes a file.

        Raises:
            CheckpointError: with the folder and the reason.
        """
        probe = f"{self.path}/.writable"
        try:
            self.filesystem.create_dir(self.path, recursive=True)
            with self.filesystem.open_output_stream(probe) as file:
                file.write(b"")
            self.filesystem.delete_file(probe)
        except OSError as error:
            raise CheckpointError(
                f"Cannot write checkpoints to {self.root}: {in_words(self.root, error)}. "
                "Choose another place with --storage, or give this user the right to write there."
            ) from error

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> str:
        """Writes a checkpoint and removes all but the newest `keep`. Returns its URI. `values` must fit into JSON.

        Raises:
            OutageError: the storage did not answer for minutes, or it is full.
        """
        self.fence()
        folder = f"{self.path}/step-{step:08d}"
        self._patiently(lambda: self.filesystem.create_dir(folder, recursive=True), "write")
        files = {}
        with ThreadPoolExecutor(1) as beside:  # the digest takes as long as the writing
            for group, tensors in groups.items():
                pieces = _safetensors(tensors)
                digest = beside.submit(_digest, *pieces)
                self._write(f"{folder}/{group}.safetensors", pieces)
                files[group] = {"bytes": sum(map(len, pieces)), "blake2b": digest.result()}
        self.fence()  # an outage may have lasted long enough for another driver to take over
        self._write_manifest(folder, {"step": step, "files": files, "values": dict(values)})
        self.prune(self.keep)
        return f"{self.root}/step-{step:08d}"

    def checkpoints(self) -> list[Checkpoint]:
        """All complete checkpoints, newest first; incomplete ones are named in the log.

        Raises:
            OutageError: the storage cannot be read, so what looks missing may be there.
        """
        found = []
        for step in sorted(self._steps(), reverse=True):
            uri = f"{self.root}/step-{step:08d}"
            try:
                found.append(read_checkpoint(uri))
            except OutageError:
                raise
            except CheckpointError as error:
                log.warning("%s Using an older one if there is any.", error)
        return found

    def latest(self) -> tuple[Checkpoint, dict[str, dict[str, Tensor]]] | None:
        """The newest checkpoint that verifies, with its tensors by group; corrupt ones are named and passed over.

        None where none is left: the cell then starts again, which costs time and changes no result.

        Raises:
            CheckpointError: the newest was slimmed to its sampling weights.
            OutageError: the storage cannot be read.
        """
        for checkpoint in self.checkpoints():
            try:
                return checkpoint, {group: checkpoint.load(group) for group in (SAMPLING, TRAINING)}
            except CorruptCheckpointError as error:
                log.warning("%s An older one is used if there is any, else the cell starts again.", error)
        return None

    def prune(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints, and torn ones older than them."""
        for step in sorted(self._steps(), reverse=True)[keep:]:
            self._patiently(functools.partial(self._delete, f"{self.path}/step-{step:08d}"), "clean up")

    def slim(self) -> int:
        """Drops what going on needs from every checkpoint and keeps the sampling weights. Returns the bytes freed."""
        self.fence()
        freed = 0
        for checkpoint in self.checkpoints():
            if TRAINING not in checkpoint.files or SAMPLING not in checkpoint.files:
                continue
            folder = f"{self.path}/step-{checkpoint.step:08d}"
            files = {k: v for k, v in checkpoint.files.items() if k != TRAINING}
            # The manifest first: a kill in between leaves a stray file, never a checkpoint that lies.
            self._write_manifest(folder, {"step": checkpoint.step, "files": files, "values": checkpoint.values})
            stray = f"{folder}/{TRAINING}.safetensors"
            self._patiently(functools.partial(self.filesystem.delete_file, stray), "clean up")
            freed += checkpoint.files[TRAINING]["bytes"]
        return freed

    def is_slimmed(self) -> bool:
        """Whether there is a checkpoint, but none to go on from."""
        found = self.checkpoints()
        return bool(found) and not any(TRAINING in checkpoint.files for checkpoint in found)

    def total_bytes(self) -> int:
        """Bytes of all files under the root."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        infos = self._patiently(lambda: self.filesystem.get_file_info(selector), "read")
        return sum(info.size or 0 for info in infos)

    def _steps(self) -> list[int]:
        selector = fs.FileSelector(self.path, allow_not_found=True)
        names = [info.base_name for info in self._patiently(lambda: self.filesystem.get_file_info(selector), "read")]
        return [int(m.group(1)) for m in (re.fullmatch(r"step-(\d+)", name) for name in names) if m]

    def _write_manifest(self, folder: str, manifest: Mapping[str, Any]) -> None:
        self._write(f"{folder}/{MANIFEST}", [json.dumps(manifest, indent=1).encode()])

    def _write(self, path: str, pieces: Sequence[bytes | memoryview]) -> None:
        """One file at once: renamed into place where the file system can, one PUT on object storage."""
        local = isinstance(self.filesystem, fs.LocalFileSystem)
        target = f"{path}.part" if local else path

        def write() -> None:
            with self.filesystem.open_output_stream(target) as file:
                for piece in pieces:
                    file.write(piece)
            if local:
                self.filesystem.move(target, path)

        self._patiently(write, "write")

    def _delete(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # an earlier try got so far
            self.filesystem.delete_dir(folder)

    def _patiently(self, action: Callable[[], T], verb: str) -> T:
        """The action's result, waited for while an outage lasts."""
        try:
            return patiently(action, f"Checkpoints under {self.root}")
        except OSError as error:
            raise OutageError(
                f"Cannot {verb} checkpoints under {self.root}: {in_words(self.root, error)}. "
                "What was reached before is kept, and the same command goes on."
            ) from error


def read_checkpoint(uri: str | Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: no such folder, or it has no readable manifest.
        OutageError: the storage cannot be read.
    """
    uri = str(uri).rstrip("/")
    filesystem, path = open_filesystem(uri)
    try:
        manifest = json.loads(patiently(lambda: _read(filesystem, f"{path}/{MANIFEST}"), f"Reading {uri}"))
        return Checkpoint(uri, int(manifest["step"]), manifest["values"], manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"No checkpoint at {uri}: it has no {MANIFEST}, so it was never completed.") from None
    except OSError as error:
        raise OutageError(f"Cannot read {uri}/{MANIFEST}: {in_words(uri, error)}. Run again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"Corrupt checkpoint {uri}: {MANIFEST} is not readable ({error}).") from error


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_file(path) as file:
        return file.read()


def _safetensors(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """A file in the safetensors format, in pieces that are the tensors' own memory where they lie on the CPU.

    The library's own writers make one or two copies of all of it, which takes longer than the writing.
    """
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    header, pieces, end = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so all are aligned
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        begin, end = end, end + len(data)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        pieces.append(data)
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)  # the data begins at a multiple of eight
    return [len(described).to_bytes(8, "little"), described, *pieces]


def _digest(*pieces: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
