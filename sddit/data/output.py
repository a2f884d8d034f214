"""A folder that is written to, here or on any storage: its files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from sddit.errors import StorageError
from sddit.filesystem import in_words, open_filesystem, patiently

SCRATCH = ".parts"  # the folder of what is unfinished, in the output; may be removed when all is done
T = TypeVar("T")


class Output:
    """The folder at `uri`, which need not exist.

    Raises:
        UsageError, StorageError: it cannot be opened; each method, StorageError if it cannot be read or written.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem, self.path = open_filesystem(uri)
        self.local = Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def files(self) -> dict[str, int]:
        """Bytes of all files in it and below, by their names."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with self._in_words("read"):
            infos = self._patiently(lambda: self.filesystem.get_file_info(selector))
        return {i.path.removeprefix(self.path).lstrip("/"): i.size for i in infos if i.type == fs.FileType.File}

    def read(self, name: str) -> bytes:
        """What is in a file."""

        def action() -> bytes:
            with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
                return file.read()

        with self._in_words("read"):
            return self._patiently(action)

    def write(self, name: str, text: str) -> None:
        """Writes a file, in place of the one that is there."""
        into, _, base = name.rpartition("/")
        with self.staging(into) as staging, open(staging / base, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def staging(self, into: str = "") -> Iterator[Path]:
        """A folder here whose files come to stand in the folder `into` of this one when the block ends."""
        with self._in_words("write to"):
            # On the same disk, so that renaming is all that is left to do.
            staging = Path(tempfile.mkdtemp()) if self.local is None else self.local / SCRATCH / uuid.uuid4().hex
            staging.mkdir(parents=True, exist_ok=True)
            try:
                yield staging
                self._take(staging, f"{self.path}/{into}".rstrip("/"))
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def delete(self, name: str) -> None:
        """Removes a folder."""
        with self._in_words("write to"):
            self._patiently(lambda: self.filesystem.delete_dir(f"{self.path}/{name}"))

    def _take(self, staging: Path, target: str) -> None:
        if self.local is None:
            self._patiently(lambda: self.filesystem.create_dir(target, recursive=True))
            self._patiently(lambda: fs.copy_files(str(staging), target, fs.LocalFileSystem(), self.filesystem))
            return
        Path(target).mkdir(parents=True, exist_ok=True)
        for file in staging.iterdir():
            os.replace(file, f"{target}/{file.name}")

    def _patiently(self, action: Callable[[], T]) -> T:
        return patiently(action, self.uri)

    @contextlib.contextmanager
    def _in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"Cannot {what} {self.uri}: {in_words(self.uri, error)}.") from error
