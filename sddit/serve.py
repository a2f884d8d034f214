"""The tracking server of a cluster: MLflow's own over sqlite, its database copied to storage and restored from there.

A copy is made with sqlite's backup API, so it is consistent whatever is written meanwhile. Under the backup folder lie

    mlflow-20260102T030405.678901Z.db    complete copies, the newest two of a server
    latest.json                          names them, newest first; written last

and beside the database `copied.json`, what latest.json said when this server last wrote or restored it. If both agree,
the database goes on from the copy; if not, another server wrote since: the newer is used, and the other kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psutil

from sddit.errors import SdditError, StorageError, TrackingError, UsageError

KEEP = 2  # copies
START_SECONDS = 300.0  # a server may take so long to answer
STOP_SECONDS = 30.0  # and so long to end, before it is killed
LAST_COPY_SECONDS = 600.0  # `stop` waits so long for it
LATEST = "latest.json"
SETTINGS = {  # of MLflow's server, where the user's environment says nothing else
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight more processes that nothing here uses
    # A process serves 40 requests at once, and one that writes points takes a second connection while it holds the
    # first: with its own limit of 15, a few dozen cells that report at once wait for each other, and it stands still.
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "50",
}
Copies = list[dict[str, Any]]  # newest first: file, saved (UTC), bytes, sha256


# -------------------------------------------------------------------------------------- the database and its copies


class Record:
    """The database in a folder, and its copies under `backup` (a folder or a URI; None: there are none)."""

    def __init__(self, folder: Path, backup: str | None) -> None:
        self.folder, self.backup = folder, backup
        self.path, self.memory = folder / "mlflow.db", folder / "copied.json"
        remembered = _read(self.memory)
        self.known: Copies = remembered.get("known", [])  # what latest.json said when this record was last copied
        self.ours: Copies = remembered.get("ours", [])  # of these, the copies of this record
        self.source: sqlite3.Connection | None = None
        self.version: int | None = None  # of the database, when it was last copied

    def restore(self) -> str:
        """Makes the database in the folder the one to go on with; says in a sentence which it is.

        Raises:
            StorageError: the backup folder cannot be read or written, or holds a copy that is not what was written.
        """
        if self.backup is not None:
            self._make_folder()
            self._write(".writable", b"")
            self._delete(".writable")
        latest = self._latest()
        if not latest:
            return f"Going on with {self.path}." if self.path.exists() else "A new record."
        copy = f"{self.backup}/{latest[0]['file']}"
        if not self.path.exists():
            self._fetch(latest)
            return f"Restored from {copy}."
        if latest == self.known:
            return f"Going on with {self.path}."
        written = _written(self.path)
        if written > latest[0]["saved"] and _runs(self.path):
            self._remember(latest, [])
            return (
                f"{self.path}, last written {written}, does not go on from {copy} and is newer, so it is used. "
                "That copy stays where it is."
            )
        aside = self.folder / f"mlflow-{written.replace(':', '')}.db"
        for end in ("", "-wal", "-shm"):  # sqlite finds the others by their names
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{end}").rename(f"{aside}{end}")
        self._fetch(latest)
        return (
            f"Restored from {copy}, which is newer than the database that was here, last written {written}. "
            f"That one stays as {aside}."
        )

    def save(self) -> bool:
        """Copies the database if it has changed since the last copy. Returns whether it had.

        Raises:
            StorageError: it cannot be read or written, or another server has written to the backup folder meanwhile.
        """
        if self.backup is None or _runs(self.path) is None:
            return False
        now = datetime.now(UTC)
        file = f"mlflow-{now:%Y%m%dT%H%M%S.%fZ}.db"
        local = self.folder / f"{file}.part"
        try:
            version = self._copy(local)
            if version is None:
                return False
            if not self.known:
                self._make_folder()
            new = {"file": file, "saved": _iso(now), "bytes": local.stat().st_size, "sha256": _digest(local)}
            self._upload(local, file)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"Cannot copy {self.path}: {error}.") from error
        finally:
            local.unlink(missing_ok=True)
        if self._latest() != self.known:
            raise StorageError(
                f"Another server has written to {self.backup} since this one did, so {LATEST} there is left to it; "
                f"this record lies beside it as {file}. Stop one of the two, or give each its own backup folder."
            )
        copies, old = [new, *self.ours[: KEEP - 1]], self.ours[KEEP - 1 :]
        self._write(LATEST, json.dumps({"copies": copies}, indent=1).encode())
        for each in old:
            self._delete(each["file"])
        self.version = version
        self._remember(copies, copies)
        return True

    def _copy(self, to: Path) -> int | None:
        """A consistent copy of the database in one file. Returns its version; None, and no copy, if that is known."""
        if self.source is None:
            self.source = sqlite3.connect(self.path, timeout=30)
        with contextlib.suppress(sqlite3.Error):  # as in tracking.py: else the history of a run is looked for in all
            self.source.execute("PRAGMA analysis_limit=10000")
            self.source.execute("ANALYZE metrics")
        version = self.source.execute("PRAGMA data_version").fetchone()[0]
        if version == self.version:
            return None
        with contextlib.closing(sqlite3.connect(to)) as copy:
            self.source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        return version

    def _remember(self, known: Copies, ours: Copies) -> None:
        self.known, self.ours = known, ours
        part = self.memory.with_suffix(".part")
        part.write_text(json.dumps({"known": known, "ours": ours}, indent=1))
        part.replace(self.memory)

    def _fetch(self, copies: Copies) -> None:
        """The newest copy, verified, as the database."""
        newest, part = copies[0], self.path.with_suffix(".part")
        with (
            self._storage() as (filesystem, root),
            filesystem.open_input_stream(f"{root}/{newest['file']}") as source,
            open(part, "wb") as target,
        ):
            shutil.copyfileobj(source, target, 2**22)
        if _digest(part) != newest["sha256"]:
            raise StorageError(
                f"{self.backup}/{newest['file']} is not what was written there. Remove its entry from "
                f"{self.backup}/{LATEST}, so that the copy before it is used, or give another --backup."
            )
        part.replace(self.path)
        self._remember(copies, copies)

    # ---- storage

    @contextlib.contextmanager
    def _storage(self) -> Iterator[tuple[Any, str]]:
        from sddit.filesystem import in_words, open_filesystem

        assert self.backup is not None
        try:
            yield open_filesystem(self.backup)
        except OSError as error:
            raise StorageError(f"The backup folder {self.backup}: {in_words(self.backup, error)}.") from error

    def _make_folder(self) -> None:
        with self._storage() as (filesystem, root):
            filesystem.create_dir(root, recursive=True)

    def _latest(self) -> Copies:
        """The copies that count."""
        from pyarrow import fs

        if self.backup is None:
            return []
        with self._storage() as (filesystem, root):
            if filesystem.get_file_info(f"{root}/{LATEST}").type == fs.FileType.NotFound:
                return []
            with filesystem.open_input_stream(f"{root}/{LATEST}") as file:
                return json.loads(file.read())["copies"]

    def _upload(self, local: Path, name: str) -> None:
        with (
            self._storage() as (filesystem, root),
            open(local, "rb") as source,
            filesystem.open_output_stream(f"{root}/{name}") as target,
        ):
            shutil.copyfileobj(source, target, 2**22)

    def _write(self, name: str, data: bytes) -> None:
        """One file at once: renamed into place where the file system can, one PUT on object storage."""
        from pyarrow import fs

        with self._storage() as (filesystem, root):
            local = isinstance(filesystem, fs.LocalFileSystem)
            with filesystem.open_output_stream(f"{root}/{name}{'.part' if local else ''}") as file:
                file.write(data)
            if local:
                filesystem.move(f"{root}/{name}.part", f"{root}/{name}")

    def _delete(self, name: str) -> None:
        with contextlib.suppress(StorageError, FileNotFoundError), self._storage() as (filesystem, root):
            filesystem.delete_file(f"{root}/{name}")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _iso(when: datetime) -> str:
    return f"{when:%Y-%m-%dT%H:%M:%S.%fZ}"


def _written(database: Path) -> str:
    files = [Path(f"{database}{end}") for end in ("", "-wal")]
    return _iso(datetime.fromtimestamp(max(f.stat().st_mtime for f in files if f.exists()), UTC))


def _runs(database: Path) -> int | None:
    """How many runs are recorded; None where there is no record yet."""
    if not database.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=30)) as db:
            return db.execute("SELECT count(*) FROM runs").fetchone()[0]
    except sqlite3.OperationalError:
        return None


# ------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Server:
    """What to serve and where. `database` is the URI of a database server, instead of sqlite in `folder`."""

    folder: Path
    artifacts: str
    backup: str | None = None
    database: str | None = None
    host: str = "127.0.0.1"
    port: int = 5000
    names: tuple[str, ...] = ()  # by which others may call it, beside its addresses
    workers: int = 1
    every: float = 60.0  # seconds between copies

    @property
    def url(self) -> str:
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '::') else self.host}:{self.port}"

    @property
    def state(self) -> Path:
        """A file that says which processes serve the folder, and how the last one ended."""
        return self.folder / "serve.json"

    def run(self) -> None:
        """Serves until SIGTERM or Ctrl-C, then copies the database once more.

        Raises:
            UsageError: the folder is served already, the port is taken, or the database's driver is missing.
            StorageError: the backup folder cannot be read at the start, or the last copy cannot be written.
            TrackingError: MLflow's server did not start, or ended by itself.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _only_one(self.folder):
            _end(_process(self.state, "server"))  # of a `sddit serve` that was killed
            self._check()
            record = Record(self.folder, self.backup)
            opened = ""
            if self.database is None:
                opened = record.restore()
                _say(opened)
                with contextlib.closing(sqlite3.connect(record.path)) as db:
                    db.execute("PRAGMA journal_mode=WAL")  # a copy then never waits for a writer, nor a writer for it
            self._serve(record, opened)

    def _check(self) -> None:
        if self.database is not None:
            import sqlalchemy

            try:
                sqlalchemy.engine.make_url(self.database).get_dialect().import_dbapi()
            except ModuleNotFoundError as error:
                raise UsageError(
                    f"--database {self.database.partition(':')[0]} needs {error.name}, which is not installed. Run: "
                    f".bootstrap/bin/uv pip install --python {sys.executable} {error.name}"
                ) from None
            except sqlalchemy.exc.ArgumentError:
                raise UsageError(
                    "--database is not the URI of a database. Give one as in postgresql://user@host/mlflow."
                ) from None
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise UsageError(
                    f"Cannot listen on {self.host}:{self.port}: {os.strerror(error.errno or 0)}. Give another --port "
                    "or --host, or stop what listens there."
                ) from None

    def _serve(self, record: Record, opened: str) -> None:
        ending = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ending.set())
        # In a session of its own, so that Ctrl-C comes to this process alone, which then ends both in order.
        child = subprocess.Popen(self._command(), env=self._environment(), stdout=sys.stderr, start_new_session=True)
        me = psutil.Process()
        state = {"process": _name(me), "server": _name(psutil.Process(child.pid)), "backup": self.backup}
        self.state.write_text(json.dumps(state))
        error: SdditError | None = None
        try:
            self._wait_until_it_answers(child, ending)
            if not ending.is_set():
                where = self.database.partition(":")[0] if self.database else str(record.path)
                copies = f"copied to {record.backup} every {self.every:g} s" if record.backup else "not copied"
                ready = f"MLflow: {self.url}. Database: {where}, {copies}. Artifacts: {self.artifacts}."
                _say(ready)
                self.state.write_text(json.dumps(state | {"ready": f"{opened}\n{ready}".strip()}))
            self._copy_until(ending, child, record)
            if child.poll() is not None and not ending.is_set():
                raise TrackingError(f"MLflow's server ended by itself with status {child.returncode}. See above.")
        except SdditError as caught:
            error = caught
        finally:
            _end(psutil.Process(child.pid) if child.poll() is None else None)
            child.wait()
            how: dict[str, Any] = {"backup": self.backup, "error": str(error) if error else None}
            try:
                if record.save():
                    _say(f"Copied to {record.backup} for the last time.")
            except StorageError as failed:
                error = error or failed
                how["error"] = f"The last copy failed, so keep {self.folder}: {failed}"
            self.state.write_text(json.dumps(how))
        if error:
            raise error

    def _copy_until(self, ending: threading.Event, child: subprocess.Popen, record: Record) -> None:
        """Copies the database now and then. An outage of the storage is said once, and waited for."""
        trouble, due = "", time.monotonic()
        while not ending.is_set() and child.poll() is None:
            if time.monotonic() >= due:
                due = time.monotonic() + self.every
                try:
                    if record.save() and trouble:
                        _say("Copying again.")
                        trouble = ""
                except StorageError as error:
                    if str(error) != trouble:
                        trouble = str(error)
                        _say(f"Not copied: {trouble} Trying again every {self.every:g} s.")
            ending.wait(min(1.0, self.every))

    def _wait_until_it_answers(self, child: subprocess.Popen, ending: threading.Event) -> None:
        until = time.monotonic() + START_SECONDS
        while not ending.is_set():
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            if child.poll() is not None:
                raise TrackingError(f"MLflow's server did not start: it ended with {child.returncode}. See above.")
            if time.monotonic() > until:
                raise TrackingError(f"MLflow's server does not answer at {self.url} after {START_SECONDS:g} s.")
            ending.wait(0.2)

    def _command(self) -> list[str]:
        return [
            sys.executable, "-m", "mlflow", "server", "--host", self.host, "--port", str(self.port),
            "--workers", str(self.workers), "--artifacts-destination", self.artifacts, "--serve-artifacts",
            "--allowed-hosts", ",".join(self.allowed_hosts()), "--uvicorn-opts", "--log-level warning",
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        environment = SETTINGS | os.environ
        environment.pop("MLFLOW_TRACKING_URI", None)  # on a cluster's head it names this very server
        database = self.database or f"sqlite:///{self.folder.absolute()}/mlflow.db"
        return environment | {"MLFLOW_BACKEND_STORE_URI": database}

    def allowed_hosts(self) -> list[str]:
        """The Host headers that are answered: this machine through any tunnel, else its addresses with the port."""
        if self.host in ("0.0.0.0", "::"):
            found = [a for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET]
            hosts = [*(a.address for a in found), socket.gethostname(), socket.getfqdn()]
        else:
            hosts = [self.host]
        ours = [f"{name}:{self.port}" for name in [*hosts, *self.names]]
        return list(dict.fromkeys(["localhost:*", "127.0.0.1:*", *ours]))

    def start(self, arguments: Sequence[str]) -> None:
        """Runs ``sddit serve ARGUMENTS`` in the background, in place of one that serves the folder; waits for it.

        Raises:
            SdditError: it did not start, in its own words.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if _process(self.state, "process"):
            _say(stop(self.folder))
        log = self.folder / "serve.log"
        with open(log, "w") as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "sddit", "serve", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        while child.poll() is None:
            state = _read(self.state)
            if state.get("ready") and state["process"][0] == child.pid:  # not of one that was killed
                return _say(f"{state['ready']}\nLog: {log}")
            time.sleep(0.2)
        lines = log.read_text().strip().splitlines()[-20:]
        raise TrackingError("\n".join(["The tracking server did not start:", *lines]))


def stop(folder: Path) -> str:
    """Ends the server of a folder after a last copy of its database; without one, copies at once. Says what was done.

    Raises:
        UsageError: the folder was never served.
        StorageError: the last copy could not be written.
    """
    state = folder / "serve.json"
    if not state.exists():
        raise UsageError(f"No tracking server has run on {folder}. Give the folder of one with --data.")
    process = _process(state, "process")
    if process is None:
        with _only_one(folder):
            backup = _read(state).get("backup")
            _end(_process(state, "server"))
            copied = Record(folder, backup).save()
            return f"No server was running on {folder}; " + (f"copied to {backup}." if copied else "nothing to copy.")
    backup = _read(state).get("backup")
    process.terminate()
    try:
        process.wait(LAST_COPY_SECONDS)
    except psutil.TimeoutExpired:
        raise StorageError(
            f"The server of {folder} (process {process.pid}) has not ended after {LAST_COPY_SECONDS:g} s. See "
            f"{folder}/serve.log."
        ) from None
    if error := _read(state).get("error"):
        raise StorageError(error)
    return "The tracking server has ended" + (f"; its record is in {backup}." if backup else ".")


def _say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[IO[str]]:
    with open(folder / "serve.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{folder} is served already. Stop that server with: sddit serve --data {folder} --stop"
            ) from None
        yield lock


def _read(state: Path) -> dict[str, Any]:
    try:
        return json.loads(state.read_text())
    except (OSError, ValueError):
        return {}


def _name(process: psutil.Process) -> list[float]:
    """What tells a process from a later one with its number."""
    return [process.pid, process.create_time()]


def _process(state: Path, which: str) -> psutil.Process | None:
    pid, created = _read(state).get(which) or (0, 0)
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(int(pid))
        if pid and process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _end(process: psutil.Process | None) -> None:
    """Ends a process and all it has started."""
    if process is None:
        return
    family = [process]
    with contextlib.suppress(psutil.Error):
        family += process.children(recursive=True)
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    _, left = psutil.wait_procs(family, STOP_SECONDS)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(left, STOP_SECONDS)
