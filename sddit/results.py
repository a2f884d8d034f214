"""The record read back: MLflow → tidy tables. Reads only, and imports neither torch nor ray.

`load_results` is what figures draw from, `load_cells` what a sweep learns from (what is done, how far the rest is),
`read_sweep` all of it in one go. mlflow takes seconds to import, so it is imported when something is read.

MLflow gives the history of one metric of one run at a time, so most of the time goes there: histories of runs that are
finished are kept in the cache.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import json
import math
import os
import socket
import sqlite3
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
from pydantic import BaseModel, Json, ValidationError

from sddit.config import check_value
from sddit.errors import TrackingError, UsageError, did_you_mean, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

DEFAULT_URI = "sqlite:///mlflow.db"
PAGE = 200  # runs a request: MLflow cuts what is longer than its limit, so always page
THREADS = 4  # histories asked for side by side
INFINITE = 1.797e308  # MLflow stores ±inf as the largest double, 1.7976931348623157e308
RESULT_COLUMNS = ["identity", "run_id", "state", "seed", "step", "code", "protocol"]
CELL_COLUMNS = [
    "identity", "run_id", "name", "state", "step", "steps", "seed", "protocol", "code", "params", "metrics", "tags"
]  # fmt: skip
POINT = {"run_id": "str", "key": "str", "step": "int64", "value": "float64"}  # a row of a metric's history
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
STATE_WORDS = {"pruned": "stopped early", "failed": "failed", "running": "unfinished"}
AXIS_TAG = "axis."  # of a cell: its value on each axis of its sweep
FIRST_RUN = (
    "Run a sweep first, e.g. python sweeps/mask_ratio.py, or name another record with --tracking-uri or "
    "MLFLOW_TRACKING_URI."
)


@dataclass(frozen=True)
class SweepRecord:
    """Where a sweep is recorded: its MLflow experiment and, once it was started, its parent run."""

    experiment_id: str
    run_id: str | None
    tags: dict[str, str]

    @property
    def axes(self) -> list[str]:
        """The names of its axes, in order; none where an older version recorded it."""
        return json.loads(self.tags.get("sddit.axes", "[]"))


# ---------------------------------------------------------------------------------------------------------- reading


def load_results(
    sweep: str, tracking_uri: str | None = None, *, metrics: Collection[str] | None = None
) -> pd.DataFrame:
    """One row per (cell, evaluation step).

    Columns: identity, run_id, state, seed, step, code, protocol; then params, with the axes of the sweep that are no
    field (`system`), and metrics by their MLflow names. An evaluation step is one with an `eval/…` point; other
    metrics are filled in where they have a point at exactly that step. A cell that was never evaluated has no row:
    `load_cells` lists it.

    Args:
        sweep: the sweep's name, i.e. its MLflow experiment.
        tracking_uri: default MLFLOW_TRACKING_URI, else mlflow.db in the current folder.
        metrics: which metrics to fetch beside `eval/…`; each costs one request a cell. None fetches all.

    Raises:
        UsageError: no sweep has this name.
        TrackingError: the record does not exist or cannot be reached.
    """
    with open_record(sweep, tracking_uri) as (client, experiment):
        runs = _cells(_search(client, experiment, "cell"), sweep)
        return _results(client, experiment, runs, _cell_table(runs), metrics)


def load_cells(sweep: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """One row per cell, evaluated or not; cheap, since no metric history is read.

    Columns: identity, run_id, name, state, step (reached), steps (asked), seed, protocol, code, and three
    dictionaries: params (with the axes that are no field), metrics (the last value of each) and tags. Raises as
    `load_results` does.
    """
    with open_record(sweep, tracking_uri) as (client, experiment):
        return _cell_table(_cells(_search(client, experiment, "cell"), sweep))


def load_sweep(sweep: str, tracking_uri: str | None = None) -> SweepRecord:
    """The sweep's experiment and the tags of its parent run. Raises as `load_results` does."""
    with open_record(sweep, tracking_uri) as (client, experiment):
        return _parent(_search(client, experiment, "sweep"), experiment)


def read_sweep(
    sweep: str, tracking_uri: str | None = None, *, metrics: Collection[str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, SweepRecord]:
    """What `load_results`, `load_cells` and `load_sweep` give, from one search. Arguments and errors are theirs."""
    with open_record(sweep, tracking_uri) as (client, experiment):
        everything = _search(client, experiment)
        runs = _cells(everything, sweep)
        cells = _cell_table(runs)
        return _results(client, experiment, runs, cells, metrics), cells, _parent(everything, experiment)


def sweep_names(tracking_uri: str | None = None) -> list[str]:
    """The names of all recorded sweeps; none where there is no record yet. Raises TrackingError as `load_results`."""
    uri = tracking_uri or default_tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return []
    try:
        with open_record("Default", uri) as (client, _):
            return [experiment.name for experiment in _all_experiments(client)]
    except UsageError:  # somebody deleted MLflow's own experiment
        return []


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


# ------------------------------------------------------------------------------------------------------------- runs


def _search(client: MlflowClient, experiment: Experiment, kind: str | None = None) -> list[Run]:
    """The sweep's runs (of one kind: 'cell' or 'sweep'), oldest first."""
    runs: list[Run] = []
    token = None
    wanted = f"tags.`sddit.kind` = '{kind}'" if kind else ""
    while True:
        page = client.search_runs([experiment.experiment_id], wanted, max_results=PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _cells(runs: list[Run], sweep: str) -> list[Run]:
    """The cells among them; of several with one identity the oldest."""
    cells: dict[str, Run] = {}
    extra = 0
    for run in runs:
        if run.data.tags.get("sddit.kind") == "cell":
            identity = run.data.tags.get("sddit.identity", run.info.run_id)
            extra += identity in cells
            cells.setdefault(identity, run)
    if extra:
        warnings.warn(f"{sweep}: {extra} runs repeat a recorded cell; the oldest is used.", stacklevel=3)
    return list(cells.values())


def _parent(runs: list[Run], experiment: Experiment) -> SweepRecord:
    for run in runs:
        if run.data.tags.get("sddit.kind") == "sweep":
            _checked(run, _params(run))
            return SweepRecord(experiment.experiment_id, run.info.run_id, dict(run.data.tags))
    return SweepRecord(experiment.experiment_id, None, {})


def _cell_table(runs: list[Run]) -> pd.DataFrame:
    rows = []
    for run in runs:
        tags, params = run.data.tags, _params(run)
        known = _checked(run, params)
        rows.append(
            {
                "identity": tags.get("sddit.identity", ""),
                "run_id": run.info.run_id,
                "name": run.info.run_name,
                "state": tags.get("sddit.state", "unknown"),
                "step": known.step,
                "steps": known.steps,
                "seed": params.get("seed"),
                "protocol": tags.get("sddit.protocol", ""),
                "code": tags.get("sddit.code", ""),
                "params": params,
                "metrics": {key: _finite_or_inf(value) for key, value in run.data.metrics.items()},
                "tags": dict(tags),
            }
        )
    return pd.DataFrame(rows, columns=CELL_COLUMNS)


# ----------------------------------------------------------------------------------------------------------- points


def _results(
    client: MlflowClient, experiment: Experiment, runs: list[Run], cells: pd.DataFrame, metrics: Collection[str] | None
) -> pd.DataFrame:
    """The table of `load_results`, of runs and `_cell_table` of them.

    Of several points of one (run, metric, step) the first is used. Points carry timestamps computed from their step,
    so 'first' is the store's order where a value was recorded twice: by timestamp, then step, then value.
    """

    def wanted(key: str) -> bool:
        if key.startswith("system/"):  # their steps count samples of the machine, not optimiser steps
            return False
        return metrics is None or key in metrics or key.startswith("eval/")

    params = sorted({name for values in cells["params"] for name in values} - {"seed"})
    head = [name for name in RESULT_COLUMNS if name != "step"]
    evaluated = [i for i, run in enumerate(runs) if any(key.startswith("eval/") for key in run.data.metrics)]
    heads = pd.DataFrame(
        [row["params"] | {name: row[name] for name in head} for row in cells.iloc[evaluated].to_dict("records")],
        columns=[*head, *params],
    )
    points = _histories(client, experiment, [runs[i] for i in evaluated], wanted)
    repeated = points.duplicated(["run_id", "key", "step"])
    if repeated.any():
        first = points[repeated].iloc[0]
        warnings.warn(
            f"{repeated.sum()} points were recorded twice, e.g. {first['key']} at step {first['step']} of run "
            f"{first['run_id']}; the first is used.",
            stacklevel=3,
        )
        points = points[~repeated]
    large = points["value"].abs() >= INFINITE
    points = points.assign(value=points["value"].mask(large, np.copysign(math.inf, points["value"])))
    points["cell"] = points["run_id"].map({run_id: i for i, run_id in enumerate(heads["run_id"])}).astype(int)
    where = pd.MultiIndex.from_frame(points[["cell", "step"]])
    points = points[where.isin(where[points["key"].str.startswith("eval/")])]
    wide = points.pivot(index=["cell", "step"], columns="key", values="value").rename_axis(columns=None)
    heads = heads.iloc[wide.index.get_level_values("cell")].reset_index(drop=True)
    table = pd.concat([heads, wide.reset_index("step").reset_index(drop=True)], axis=1)
    return table[[*RESULT_COLUMNS, *params, *wide.columns]]


def _histories(
    client: MlflowClient, experiment: Experiment, runs: list[Run], wanted: Callable[[str], bool]
) -> pd.DataFrame:
    """All points of the metrics that are wanted, in the store's order: run_id, key, step, value.

    A point needs no second reading once its run is finished: those are kept in one file a sweep, under a fingerprint
    that is another one when the run is taken up again.
    """
    store = hashlib.sha256(f"{without_password(client.tracking_uri)}/{experiment.experiment_id}".encode()).hexdigest()[
        :24
    ]
    folder = os.path.expanduser(os.environ.get("SDDIT_CACHE") or "~/.cache/sddit")  # as sddit.data.cache_dir
    cache = Path(folder, "results", f"{store}.parquet")
    finished = {run.info.run_id: mark for run in runs if (mark := _fingerprint(run))}
    series = [(run.info.run_id, key) for run in runs for key in run.data.metrics if wanted(key)]
    kept = _kept(cache, finished, sorted({key for _, key in series}))
    known = set(pd.MultiIndex.from_frame(kept[["run_id", "key"]]).unique())
    missing = [pair for pair in series if pair not in known]
    if not missing:
        return kept
    with ThreadPoolExecutor(THREADS) as pool:
        histories = pool.map(lambda pair: client.get_metric_history(*pair), missing)
        points = [
            (*pair, point.step, point.value)
            for pair, history in zip(missing, histories, strict=True)
            for point in history
        ]
    fetched = pd.DataFrame(points, columns=list(POINT)).astype(POINT)
    _keep(cache, finished, fetched[fetched["run_id"].isin(finished)])
    return pd.concat([kept, fetched], ignore_index=True)


def _fingerprint(run: Run) -> str | None:
    """Of a run that is finished: what cannot stay the same when points are added. None of one that is not."""
    tags = run.data.tags
    if run.info.status != "FINISHED" or tags.get("sddit.state") not in ("done", "pruned"):
        return None
    seen = [tags.get("sddit.step"), tags["sddit.state"], run.info.end_time, sorted(run.data.metrics.items())]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _kept(cache: Path, finished: Mapping[str, str], keys: list[str] | None = None) -> pd.DataFrame:
    """The points in the cache (of these keys) whose runs are as they were; none where it cannot be read."""
    try:
        frame = pd.read_parquet(cache, filters=None if keys is None else [("key", "in", keys)])
        frame = frame[frame["fingerprint"] == frame["run_id"].map(finished)]
        return frame[list(POINT)].astype(POINT)
    except Exception:  # whatever is wrong with it, the record itself is there to be read
        return pd.DataFrame(columns=list(POINT)).astype(POINT)


def _keep(cache: Path, finished: Mapping[str, str], fetched: pd.DataFrame) -> None:
    """Adds to the cache, in one go. What cannot be kept is fetched again next time."""
    if fetched.empty:
        return
    part = cache.with_suffix(f".{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        kept = _kept(cache, finished)
        series = [pd.MultiIndex.from_frame(frame[["run_id", "key"]]) for frame in (kept, fetched)]
        frame = pd.concat([kept[~series[0].isin(series[1])], fetched])
        cache.parent.mkdir(parents=True, exist_ok=True)
        frame.assign(fingerprint=frame["run_id"].map(finished)).to_parquet(part, index=False)
        part.replace(cache)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- values


def _params(run: Run) -> dict[str, Any]:
    """The params as values, and the cell's place on the axes that are no field: their names have no dot."""
    axes = {
        name: text
        for tag, text in run.data.tags.items()
        if tag.startswith(AXIS_TAG) and "." not in (name := tag.removeprefix(AXIS_TAG)) and name not in RESULT_COLUMNS
    }
    return {key: parse_param(key, text) for key, text in sorted({**axes, **run.data.params}.items())}


class _NoiseFloor(BaseModel):
    mean: float
    sd: float
    draws: int


class _Owner(BaseModel):
    pid: int
    host: str
    token: str


class _Tags(BaseModel):
    """What tags must hold, where they are there, for others to read them."""

    step: int = 0
    steps: int = 0
    workers: int = 1
    reference_images: int = 1
    axes: Json[list[str]] | None = None
    base: Json[dict[str, Any]] | None = None
    excluded: Json[dict[str, str]] | None = None
    reference: Json[dict[str, Any]] | None = None
    noise_floor: Json[_NoiseFloor] | None = None
    prediction: Json[dict[str, float]] | None = None
    owner: Json[_Owner | None] | None = None
    heartbeat: float = 0.0
    device_hours: float = 0.0
    sampling_flops: float = 0.0
    budget_hours: float = 0.0
    price: float = 0.0


def _checked(run: Run, params: Mapping[str, Any]) -> _Tags:
    """The tags, read. Raises TrackingError where a run holds what the tracker cannot have written."""
    tags = {tag[6:]: text for tag, text in run.data.tags.items() if tag.startswith("sddit.") and text}
    name = ""
    try:
        for name in run.data.params:
            check_value(name, params[name])
        return _Tags.model_validate(tags)
    except ValidationError as error:
        first = error.errors()[0]
        name, text, reason = f"sddit.{first['loc'][0]}", tags[str(first["loc"][0])], first["msg"]
    except ValueError as error:
        text, reason = run.data.params[name], str(error)
    raise TrackingError(
        f"Run {run.info.run_id} ({run.info.run_name}) holds {name} = {text[:100]!r}, which nothing here records: "
        f"{reason}. If it was changed by hand, change it back in MLflow, or delete the run there to go on without it."
    )


def parse_param(key: str, text: str) -> Any:
    """The value that MLflow keeps as text: a number, true or false, None, a list, else the text itself.

    >>> parse_param("method.mask_ratio", "0.3"), parse_param("eval.metrics", "['fid']"), parse_param("model.size", "S")
    (0.3, ['fid'], 'S')
    """
    if key.endswith("digest"):  # twelve hexadecimal digits can look like a number: 123e45678901
        return text
    words = {"true": True, "True": True, "false": False, "False": False, "None": None, "null": None}
    if text in words:
        return words[text]
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            return text
        if isinstance(value, int | float | list | dict):
            return value
        if isinstance(value, tuple):
            return list(value)
    return text


def _finite_or_inf(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) >= INFINITE else value


# ---------------------------------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def open_record(sweep: str, tracking_uri: str | None) -> Iterator[tuple[MlflowClient, Experiment]]:
    """The client and the sweep's experiment; failures inside become TrackingError."""
    uri = _readable(tracking_uri or default_tracking_uri())
    # MLflow reports usage to its makers unless told not to; what the user has set stays.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import requests
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _bounded_http(retries=0, seconds=5):  # is anybody there?
            client = MlflowClient(uri)
            experiment = client.get_experiment_by_name(sweep)
            known = [] if experiment else [e.name for e in _all_experiments(client)]
        if experiment is None:
            raise UsageError(_unknown_sweep(sweep, known, uri))
        if experiment.lifecycle_stage == "deleted":
            raise UsageError(
                f"The sweep {sweep!r} was deleted in {uri}. Bring it back with: "
                f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            )
        with _bounded_http(retries=2, seconds=60):  # somebody is; a long table may take a while
            yield client, experiment
    except (MlflowException, SQLAlchemyError, requests.RequestException, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrackingError(
            f"Cannot read the MLflow record {uri}: {reason}\n"
            "Check that the server is up and the address right (--tracking-uri or MLFLOW_TRACKING_URI)."
        ) from error


@contextlib.contextmanager
def _bounded_http(retries: int, seconds: int) -> Iterator[None]:
    """Bounds MLflow's requests, which by default block for minutes; what the user has set stays."""
    bounds = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds)}
    ours = {name: value for name, value in bounds.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _all_experiments(client: MlflowClient) -> list[Experiment]:
    experiments: list[Experiment] = []
    token = None
    while True:
        page = client.search_experiments(page_token=token)
        experiments += page
        token = page.token
        if not token:
            return experiments


def _unknown_sweep(sweep: str, known: list[str], uri: str) -> str:
    known = sorted(name for name in known if name != "Default")  # MLflow's own, always there
    if not known:
        return f"No sweep {sweep!r} in {uri}, which holds none yet. {FIRST_RUN}"
    if len(known) > 20:  # a shared server can hold thousands
        known = difflib.get_close_matches(sweep, known, n=20, cutoff=0.0)
    return f"No sweep {sweep!r} in {uri}. {did_you_mean(sweep, known)}"


def _readable(uri: str) -> str:
    """The address with an absolute path, after a look whether there is something to read.

    MLflow creates a database that is missing, fills one that is empty, and tries a silent database server for most
    of an hour; reading must do none of these.
    """
    parts = urlsplit(uri)
    dialect = parts.scheme.partition("+")[0]
    if dialect == "sqlite":
        path = Path(uri.partition(":///")[2].partition("?")[0]).absolute()
        _check_sqlite(path)
        return f"sqlite:///{path}"
    if dialect in ("", "file"):
        folder = Path(parts.path or uri).absolute()
        if not folder.is_dir():
            raise TrackingError(f"No MLflow record at {folder}. {FIRST_RUN}")
        return folder.as_uri()
    if dialect in DATABASE_PORTS and parts.hostname:
        try:
            socket.create_connection((parts.hostname, parts.port or DATABASE_PORTS[dialect]), timeout=5).close()
        except OSError as error:
            raise TrackingError(f"Cannot reach the MLflow database {uri}: {error}") from error
    return uri


def _check_sqlite(path: Path) -> None:
    if not path.is_file():
        raise TrackingError(f"No MLflow record at {path}. {FIRST_RUN}")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=20)) as database:
            found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
    except sqlite3.Error as error:
        raise TrackingError(f"Cannot read {path}: {error}. {FIRST_RUN}") from error
    if not found:
        raise TrackingError(f"{path} is not an MLflow record: it has no experiments. {FIRST_RUN}")
