"""The only writer to MLflow: the driver's `SweepRecord` and each cell's `CellRecord`. mlflow.md holds the reasons.

The driver alone creates experiment and runs. A cell writes points to its own run from one thread, in order, with
timestamps made from the step, so that a point sent twice is one point. What is not yet sent travels in the cell's
checkpoints: points before a checkpoint are in it or in MLflow, points after it are computed again by a resume. That is
exactly once without a journal on disk, which a lost node would lose anyway.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import io
import itertools
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sddit.config import Experiment
from sddit.errors import SupersededError, TrackingError, UsageError, without_password
from sddit.filesystem import PATIENCE_SECONDS, patiently

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_URI = "sqlite:///mlflow.db"
HEARTBEAT_SECONDS = 10.0
CLOCK_SECONDS = 5.0  # by which the start of one process may seem to differ
SILENT_SECONDS = 60.0  # a remote owner silent for so long is taken over
SEND_SECONDS = 5.0  # points wait at most so long
BATCH = 500  # points a call
# The store understood the call and will not take it; anything else may be an outage.
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "UNAUTHENTICATED")
GRID_KEY = "samples/grid"
VIEW = "sddit"  # the name of our view of a sweep in MLflow's UI


def resolve_uri(uri: str | None) -> str:
    """The tracking URI asked for, from the environment or by default; a sqlite path is made absolute, since workers
    run in other folders."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if "://" not in uri:
        raise UsageError(
            f"Tracking URI {uri!r} is not of a kind that can be used. Give sqlite:///mlflow.db or http://host:5000."
        )
    return uri


@functools.lru_cache(maxsize=4)
def open_client(uri: str) -> MlflowClient:
    """One client a process and URI. Creates a sqlite file's schema under a lock, in write-ahead mode.

    Raises:
        TrackingError: the server or file cannot be reached.
    """
    # An outage must not block a caller for minutes; waiting and retrying is done by our own sender.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):  # they announce every table
        logging.getLogger(name).setLevel(logging.WARNING)

    try:
        if not uri.startswith("sqlite:///"):
            client = MlflowClient(uri)
        else:
            path = Path(uri.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the schema is migrated without a lock of MLflow's own
                if not path.exists():
                    _create(path)
                client = MlflowClient(uri)
                with contextlib.closing(sqlite3.connect(path, timeout=30)) as db:
                    db.execute("PRAGMA journal_mode=WAL")
            _analyse(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"The tracking store {uri} cannot be reached: {_first_line(error)}. Start it, or give another one with "
            "--tracking-uri (default: sqlite:///mlflow.db in the current folder)."
        ) from None
    return client


def check_writable(uri: str) -> None:
    """Sets a tag of an experiment that is there, and takes it away again: the store is left as it was.

    Raises:
        TrackingError: it cannot be reached or written to.
    """
    client = open_client(uri)
    with _as_tracking_error(f"The tracking store {uri} cannot be written to"):
        for experiment in client.search_experiments(max_results=1):
            client.set_experiment_tag(experiment.experiment_id, "sddit.doctor", "")
            client.delete_experiment_tag(experiment.experiment_id, "sddit.doctor")


def _create(path: Path) -> None:
    """Makes a database and then puts it in its place: MLflow makes it table by table, and cannot go on with a part."""
    from mlflow import MlflowClient

    for left in path.parent.glob(f".{path.name}-new-*"):
        left.unlink()
    new = path.with_name(f".{path.name}-new-{uuid.uuid4().hex}")
    MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    new.replace(path)


def _analyse(uri: str) -> None:
    """Tells sqlite how few points a run has: else it looks through those of all runs for the history of one."""
    if uri.startswith("sqlite:///"):
        path = uri.removeprefix("sqlite:///")
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1)) as db:
            db.execute("PRAGMA analysis_limit=10000")  # with 1,000 it still chooses the slow way
            db.execute("ANALYZE metrics")


def _first_line(error: BaseException) -> str:
    text = without_password(str(error).strip()) or type(error).__name__  # before it is cut
    return text.splitlines()[0][:300].rstrip(".")


@contextlib.contextmanager
def _as_tracking_error(what: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # the latter of the client that sends artifacts
        raise TrackingError(f"{what}: {_first_line(error)}.") from None  # whose text may hold a password


def _patiently(what: str, call: Callable[[], T], seconds: float | None = None) -> T:
    """The call's answer, asked for again while the store does not answer: an outage of minutes must not end a cell, nor
    a sweep. How long is for `seconds` to say (None: `PATIENCE_SECONDS`).

    Raises:
        TrackingError: it lasted longer, or the store refuses the call.
    """
    from mlflow.exceptions import MlflowException

    def passes(error: Exception) -> bool:
        return isinstance(error, failures) and getattr(error, "error_code", None) not in REFUSALS

    failures = (MlflowException, OSError)  # the latter of the client that asks for artifacts
    try:
        return patiently(call, what, seconds=seconds, passes=passes)
    except failures as error:
        raise TrackingError(f"{what}: {_first_line(error)}.") from error


# -------------------------------------------------------------------------------------------------------- the driver


class Owner:
    """The claim of this process on a run, its heart beating in a thread: one driver at a time (architecture.md §4).

    Raises:
        UsageError: another living process has it.
    """

    def __init__(self, client: MlflowClient, run_id: str, what: str) -> None:
        self.client, self.run_id, self.what = client, run_id, what
        self.token = uuid.uuid4().hex
        self.lost = False  # whether another process took it over
        run = client.get_run(run_id)
        tags, self.status_before = run.data.tags, run.info.status
        owner = json.loads(tags.get("sddit.owner") or "null")
        if owner and _alive(owner, float(tags.get("sddit.heartbeat") or 0)):
            raise UsageError(
                f"{what} is being run by process {owner['pid']} on {owner['host']}, started "
                f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(owner['start']))}. Wait for it, stop it, or "
                "choose another name with --name."
            )
        pid = os.getpid()
        me = {"host": socket.gethostname(), "pid": pid, "start": _process_start(pid), "token": self.token}
        client.set_tag(run_id, "sddit.heartbeat", repr(time.time()))
        client.set_tag(run_id, "sddit.owner", json.dumps(me))
        client.update_run(run_id, status="RUNNING")
        self._stop = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def ask_to_stop(self) -> None:
        """Cells that belong to this claim see it at their next record, and stop after a checkpoint."""
        with _as_tracking_error(f"{self.what} could not be stopped"):
            owner = read_owner(self.client, self.run_id)
            if owner.get("token") == self.token:
                self.client.set_tag(self.run_id, "sddit.owner", json.dumps({**owner, "stop": True}))

    def confirm(self) -> None:
        """Checks that the claim stood: of two that start at once, the later writer has it. Call it a moment later.

        Raises:
            UsageError: another process has it.
        """
        owner = _patiently(f"{self.what} could not be claimed", lambda: read_owner(self.client, self.run_id))
        if owner.get("token") != self.token:
            raise UsageError(
                f"{self.what} was started by process {owner.get('pid')} on {owner.get('host')} at the same moment. "
                "Wait for it, stop it, or choose another name with --name."
            )

    def holds(self) -> bool:
        """Whether the claim still stands, asked anew. An unreachable store is no proof that it does not."""
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            self.lost = self.lost or read_owner(self.client, self.run_id).get("token") != self.token
        return not self.lost

    def _beat(self) -> None:
        from mlflow.exceptions import MlflowException

        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(MlflowException):  # an outage; the next beat tries again
                if not self.holds():
                    return
                self.client.set_tag(self.run_id, "sddit.heartbeat", repr(time.time()))

    def release(self, status: str | None = None) -> None:
        """Gives the run free, ended with `status` (FINISHED, FAILED, KILLED) where one is given."""
        from mlflow.exceptions import MlflowException

        self._stop.set()
        with contextlib.suppress(MlflowException):  # an outage: a dead owner is taken over
            if self.holds():
                self.client.set_tag(self.run_id, "sddit.owner", "null")
                if status:
                    self.client.set_terminated(self.run_id, status=status)


class SweepRecord:
    """A sweep in MLflow: its experiment, its parent run and the runs of its cells.

    Raises:
        TrackingError: the store cannot be reached, or the experiment was deleted.
    """

    def __init__(self, uri: str, sweep: str, *, question: str = "") -> None:
        self.uri, self.sweep = uri, sweep
        self.client = open_client(uri)
        with _as_tracking_error(f"Cannot open sweep {sweep!r} in {uri}"):
            self.experiment_id = self._experiment()
            self.parent_id = self._parent(question)

    def claim(self, run_id: str | None = None) -> Owner:
        """Makes this process the owner of the sweep, or of one cell's run."""
        what = f"Sweep {self.sweep!r}" if run_id is None else f"This experiment in {self.sweep!r}"
        with _as_tracking_error(f"{what} could not be claimed"):
            return Owner(self.client, run_id or self.parent_id, what)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(self.sweep)
        if experiment is None:
            # A server keeps artifacts itself; a sqlite client would resolve them against its current folder.
            local = self.uri.startswith("sqlite:///")
            location = str(Path("mlruns").absolute() / self.sweep) if local else None
            try:
                return self.client.create_experiment(self.sweep, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self.client.get_experiment_by_name(self.sweep)
        assert experiment is not None
        if experiment.lifecycle_stage == "deleted":
            raise TrackingError(
                f"Sweep {self.sweep!r} was deleted in MLflow, which keeps its name. Restore it with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, or choose --name."
            )
        return experiment.experiment_id

    def _parent(self, question: str) -> str:
        if found := self._parents():
            return found[0]
        tags = {"sddit.kind": "sweep", "mlflow.user": _user(), "mlflow.source.name": self.sweep}
        if question:
            tags["sddit.question"] = question
        mine = self.client.create_run(self.experiment_id, run_name=self.sweep, tags=tags).info.run_id
        if (oldest := self._parents()[0]) != mine:  # another driver opened the sweep at the same moment
            self.client.delete_run(mine)
        return oldest

    def _parents(self) -> list[str]:
        """The sweep's own runs, oldest first."""
        found = self.client.search_runs([self.experiment_id], "tags.`sddit.kind` = 'sweep'")
        return [run.info.run_id for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))]

    # ---- cells

    def start_cell(
        self,
        experiment: Experiment,
        *,
        identity: str,
        data_digest: str,
        label: str,
        run_id: str | None,
        more_tags: Mapping[str, str] | None = None,
    ) -> str:
        """The run of a cell, created or opened again, in state 'running'. Returns its run id.

        Raises:
            TrackingError: the store refuses it, or did not answer for minutes.
        """
        from mlflow.entities import Param, RunTag

        tags = {
            **(more_tags or {}),
            "sddit.kind": "cell",
            "sddit.identity": identity,
            "sddit.state": "running",
            "sddit.error": "",  # of an earlier start
            "sddit.steps": str(experiment.train.steps),
            "sddit.workers": str(experiment.resources.workers),
            "sddit.code": code_revision(),
            "sddit.data": experiment.data.path,
            "mlflow.parentRunId": self.parent_id,
            "mlflow.user": _user(),
            "mlflow.source.name": self.sweep,
            "mlflow.source.type": "LOCAL",
        }
        fields = {**experiment.digest_fields(), "data.digest": data_digest}
        params = [Param(k, _param(v)) for k, v in fields.items()]
        name = f"{label}-{experiment.method.name}-s{experiment.seed}-{identity}"
        tries = itertools.count()

        def write() -> str:
            found = run_id or (self._cell(identity) if next(tries) else None)  # made by a try that got no answer
            if found is None:
                found = self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
                self.client.log_batch(found, params=params)
                return found
            # Params are logged only where a kill came before them: later fields must not be added to a cell.
            known = self.client.get_run(found).data.params
            self.client.log_batch(found, tags=[RunTag(k, v) for k, v in tags.items()], params=[] if known else params)
            self.client.update_run(found, status="RUNNING")
            return found

        return _patiently(f"Cell {identity} could not be recorded", write)

    def _cell(self, identity: str) -> str | None:
        found = self.client.search_runs([self.experiment_id], f"tags.`sddit.identity` = '{identity}'")
        return found[0].info.run_id if found else None

    def end_cell(self, run_id: str, state: str, *, error: str = "", log_file: str = "") -> None:
        """Sets a cell's state: done, pruned or failed."""
        from mlflow.entities import RunTag

        tags = {"sddit.state": state, "sddit.error": error[:5000], "sddit.log": log_file}

        def write() -> None:
            self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            self.client.set_terminated(run_id, status="FAILED" if state == "failed" else "FINISHED")

        _patiently(f"The end of run {run_id} could not be recorded", write)
        _analyse(self.uri)

    def interrupt_cell(self, run_id: str) -> None:
        """A cell has stopped after a checkpoint and goes on with the next command: its state stays 'running'."""
        write = functools.partial(self.client.set_terminated, run_id, status="KILLED")
        _patiently(f"The stop of run {run_id} could not be recorded", write)

    def read_steps(self) -> dict[str, int]:
        """The step that each running cell has recorded last, by run id: one request, however many there are."""
        running = self.client.search_runs([self.experiment_id], "tags.`sddit.state` = 'running'", max_results=5000)
        return {run.info.run_id: int(run.data.tags.get("sddit.step", 0)) for run in running}

    def set_tags(self, tags: Mapping[str, str], *, seconds: float | None = None) -> None:
        """Tags of the parent run; refused when one is too long, since MLflow would cut it in silence. An outage is
        waited for as long as `seconds` (None: `PATIENCE_SECONDS`)."""
        from mlflow.entities import RunTag

        for name, value in tags.items():
            if len(value) > 8000:
                raise TrackingError(f"Tag {name} has {len(value)} characters; MLflow holds 8000.")
        write = functools.partial(self.client.log_batch, self.parent_id, tags=[RunTag(k, v) for k, v in tags.items()])
        _patiently(f"Tags of sweep {self.sweep!r} could not be set", write, seconds)

    def describe(self, question: str, axes: Sequence[str]) -> None:
        """What MLflow's UI shows of the sweep: the question with a link to the report, and a view of its cells."""
        link = f"#/experiments/{self.experiment_id}/runs/{self.parent_id}/artifacts/report.html"
        note = f"{question}\n\n[report.html]({link})"
        self.set_tags({"mlflow.note.content": note})
        for tag, value in (("mlflow.note.content", note), (f"mlflow.sharedViewState.{VIEW}", _view(axes))):
            write = functools.partial(self.client.set_experiment_tag, self.experiment_id, tag, value)
            _patiently(f"Sweep {self.sweep!r} could not be described", write)

    def artifact(self, path: Path, name: str | None = None) -> None:
        """A file on the parent run, under its own name or another; written over when it is there already."""
        with tempfile.TemporaryDirectory() as folder:
            if name and name != path.name:
                path = Path(shutil.copy(path, Path(folder) / name))
            write = functools.partial(self.client.log_artifact, self.parent_id, str(path))
            _patiently(f"{path} could not be put on the sweep's run", write)


def _view(axes: Sequence[str]) -> str:
    """The state of MLflow's runs page that shows a sweep: its axes as columns, FID by step, parallel coordinates and
    grids. Its form is MLflow's own and no public interface; a browser test says whether it still holds."""

    def card(name: str, kind: str, **settings: Any) -> dict[str, Any]:
        common = {"deleted": False, "isGenerated": False, "metricSectionId": VIEW, "runsCountToCompare": 10}
        return {"uuid": f"{VIEW}-{name}", "type": kind, **common, **settings}

    fields = [axis for axis in axes if "." in axis]
    columns = [f"params.`{axis}`" if axis in fields else f"tags.`axis.{axis}`" for axis in axes]
    state = {
        "searchFilter": "tags.`sddit.kind` = 'cell'", "orderByKey": "metrics.`eval/fid`", "orderByAsc": True,
        "startTime": "ALL", "lifecycleFilter": "Active", "modelVersionFilter": "All Runs", "datasetsFilter": [],
        "selectedColumns": [
            "metrics.`eval/fid`", *columns, "params.`seed`", "tags.`sddit.state`", "tags.`sddit.step`"
        ],
        "isAccordionReordered": True,
        "compareRunCharts": [
            card("fid", "LINE", metricKey="eval/fid", selectedMetricKeys=["eval/fid"], lineSmoothness=0),
            card("parallel", "PARALLEL", selectedParams=[*fields, "seed"], selectedMetrics=["eval/fid"],
                 showAllRuns=True),
            card("grid", "IMAGE", imageKeys=[GRID_KEY], step=0, showRunParams=False),
        ],
        "compareRunSections": [
            {"uuid": VIEW, "name": "FID", "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        ],
    }  # fmt: skip
    return json.dumps(state)


def read_owner(client: MlflowClient, parent_id: str) -> dict[str, Any]:
    """Who drives the sweep of this parent run; empty when nobody does."""
    return json.loads(client.get_run(parent_id).data.tags.get("sddit.owner") or "null") or {}


def _alive(owner: Mapping[str, Any], heartbeat: float) -> bool:
    """A local owner lives while its process does; a remote one while its heart beats."""
    beats = time.time() - heartbeat < SILENT_SECONDS
    if owner["host"] == socket.gethostname():
        start = _process_start(owner["pid"])
        # The start is wall-clock time counted from boot, which moves a little as the clock is adjusted.
        return start is not None and (abs(start - owner["start"]) < CLOCK_SECONDS or beats)
    return beats


def _process_start(pid: int) -> float | None:
    """When a process began, so that a reused pid is not taken for it; None if there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 2)
    except psutil.Error:
        return None


# ---------------------------------------------------------------------------------------------------------- the cell


class CellRecord:
    """A cell's own run, written by one thread: points, grids and tags, each once (`sddit.training.loop.Reporter`).

    Args:
        uri, run_id: where to write; the run exists.
        owned_run, token: whose it is. When another driver has taken it over, nothing more is written.
        report: called with (step, metrics) when an evaluation is done; may not return.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        owned_run: str | None = None,
        token: str | None = None,
        report: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    ) -> None:
        # An outage may begin while the cell's process starts.
        self.client = patiently(lambda: open_client(uri), uri, passes=lambda error: isinstance(error, TrackingError))
        self.run_id, self.owned_run, self.token, self.report = run_id, owned_run, token, report
        run, self._known, self._grids = _patiently(f"Run {run_id} could not be read", self._recorded)
        self._start_time = run.info.start_time
        self._queue: deque[list[Any]] = (
            deque()
        )  # ['points', step, {…}], ['grid', step, png in base64], ['tag', name, value]
        self._wake = threading.Condition()
        self._closing = self._urgent = False
        self._unsure = False  # whether what was sent last arrived
        self._failure: BaseException | None = None
        self.stop_asked = False  # by the driver, through its claim
        self._thread = threading.Thread(target=self._send_loop, name="mlflow-sender", daemon=True)
        self._thread.start()

    def _recorded(self) -> tuple[Run, set[tuple[str, int]], set[int]]:
        """The run, its points and its grids. The first value recorded for a step stays: speeds and costs differ when a
        resume computes them again."""
        run = self.client.get_run(self.run_id)
        known = {(key, m.step) for key in run.data.metrics for m in self.client.get_metric_history(self.run_id, key)}
        return run, known, _recorded_grids(self.client, self.run_id)

    # ---- Reporter

    def points(self, step: int, metrics: Mapping[str, float]) -> None:
        new = {k: float(v) for k, v in metrics.items() if (k, step) not in self._known}
        self._known.update((k, step) for k in new)
        if new:
            self._put(["points", step, new])

    def grid(self, step: int, image: np.ndarray) -> None:
        if step in self._grids:
            return
        from PIL import Image

        self._grids.add(step)
        png = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(png, "png")
        self._put(["grid", step, base64.b64encode(png.getvalue()).decode()])

    def tag(self, name: str, value: str) -> None:
        self._put(["tag", name, value])

    def pending(self) -> list[Any]:
        self._raise_failure()
        with self._wake:
            return list(self._queue)

    def restore(self, pending: list[Any]) -> None:
        for kind, key, value in pending:
            if kind == "points":
                self.points(key, value)
            elif kind == "tag" or key not in self._grids:
                if kind == "grid":
                    self._grids.add(key)
                self._put([kind, key, value])

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.flush(timeout=SEND_SECONDS)
        self.report(step, metrics)

    # ---- sending

    def fence(self) -> None:
        """Raises SupersededError when another driver owns the sweep. An unreachable store is no such proof."""
        from mlflow.exceptions import MlflowException

        self._raise_failure()
        if self.owned_run is None:
            return
        with contextlib.suppress(MlflowException):
            owner = read_owner(self.client, self.owned_run)
            self.stop_asked = bool(owner.get("stop"))
            if owner.get("token") != self.token:
                raise SupersededError("Another driver has taken this sweep over; this cell stops without writing.")

    def flush(self, timeout: float) -> bool:
        """Waits until everything is sent. False when it was not in time."""
        with self._wake:
            self._urgent = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._queue or self._failure is not None, timeout)
            return not self._queue

    def close(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Sends what is left.

        Raises:
            TrackingError: the store did not answer in time; the points are in the cell's last checkpoint.
        """
        sent = self.flush(timeout)
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout=SEND_SECONDS)
        self._raise_failure()
        if not sent:
            raise TrackingError(
                f"{len(self._queue)} records of run {self.run_id} could not be sent. They are in its last checkpoint "
                "and are sent when the same command is run again."
            )

    def _put(self, item: list[Any]) -> None:
        with self._wake:
            self._queue.append(item)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send_loop(self) -> None:
        backoff = 1.0
        while True:
            with self._wake:
                self._urgent = self._urgent and bool(self._queue)
                self._wake.wait_for(lambda: self._urgent or self._closing, SEND_SECONDS)
                if self._closing and not self._queue:
                    return
                batch = self._next_batch()
            if not batch:
                continue
            try:
                self.fence()
                self._send(batch)
            except SupersededError as error:
                with self._wake:
                    self._failure = error
                    self._wake.notify_all()
                return
            except Exception as error:  # of MLflow's, or of the client through which it keeps artifacts
                if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                    if self._closing:
                        return
                    log.warning("MLflow does not answer (%s); %d records wait.", _first_line(error), len(self._queue))
                    time.sleep(backoff)
                    backoff = min(30.0, 2 * backoff)
                    self._unsure = True
                    continue
                log.error("MLflow refuses a record, which is left out: %s. %s", _first_line(error), batch)
            backoff, self._unsure = 1.0, False
            with self._wake:
                for _ in batch:
                    self._queue.popleft()
                self._wake.notify_all()

    def _next_batch(self) -> list[list[Any]]:
        """The longest run of items at the head that one call can send: points and tags together, a grid alone."""
        batch: list[list[Any]] = []
        points = 0
        for item in self._queue:
            points += len(item[2]) if item[0] == "points" else 0
            if (item[0] == "grid" and batch) or points > BATCH:
                break
            batch.append(item)
            if item[0] == "grid":
                break
        return batch or list(self._queue)[:1]

    def _send(self, batch: list[list[Any]]) -> None:
        from mlflow.entities import Metric, RunTag

        if batch[0][0] == "grid":
            _, step, png = batch[0]
            if self._unsure and step in _recorded_grids(self.client, self.run_id):
                return
            from PIL import Image

            image = Image.open(io.BytesIO(base64.b64decode(png)))
            self.client.log_image(self.run_id, image, key=GRID_KEY, step=step, timestamp=self._start_time + step)
            return
        # The timestamp comes from the record and the step, so the same point sent twice has the same primary key.
        metrics = [
            Metric(key, value, self._start_time + step, step)
            for kind, step, values in batch
            if kind == "points"
            for key, value in values.items()
        ]
        tags = [RunTag(key, value) for kind, key, value in batch if kind == "tag"]
        if steps := [step for kind, step, _ in batch if kind == "points"]:
            tags.append(RunTag("sddit.step", str(max(steps))))
        self.client.log_batch(self.run_id, metrics=metrics, tags=tags)


class NullRecord:
    """The reporter of workers other than the first: they report evaluations and record nothing."""

    stop_asked = False

    def __init__(self, report: Callable[[int, dict[str, float]], None]) -> None:
        self.report = report

    def points(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def grid(self, step: int, image: np.ndarray) -> None: ...

    def tag(self, name: str, value: str) -> None: ...

    def pending(self) -> list[Any]:
        return []

    def restore(self, pending: list[Any]) -> None: ...

    def fence(self) -> None: ...

    def close(self, timeout: float = 60.0) -> None: ...

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.report(step, metrics)


def _recorded_grids(client: MlflowClient, run_id: str) -> set[int]:
    head = "images/" + GRID_KEY.replace("/", "~") + "+step+"
    return {
        int(artifact.path.removeprefix(head).split("+")[0])
        for artifact in client.list_artifacts(run_id, "images")
        if artifact.path.startswith(head)
    }


def _param(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        return "unknown"


@functools.cache
def code_revision() -> str:
    """The git revision of the project's code, with '-dirty' when files differ from it; 'unknown' outside git."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        revision = git("rev-parse", "--short=12", "HEAD").strip()
        return revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
