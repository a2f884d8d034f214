"""The record read back: MLflow → tidy tables. Reads only, and imports neither torch nor ray.

`load_results` is what figures draw from, `load_cells` what a sweep learns from (what is done, how far the rest is).
mlflow takes seconds to import, so it is imported when something is read.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import os
import re
import socket
import sqlite3
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pandas as pd

from sddit.errors import TrackingError, UsageError, did_you_mean

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

DEFAULT_URI = "sqlite:///mlflow.db"
PAGE = 200  # runs a request: MLflow cuts what is longer than its limit, so always page
THREADS = 8  # histories asked for side by side
INFINITE = 1.797e308  # MLflow stores ±inf as the largest double, 1.7976931348623157e308
RESULT_COLUMNS = ["identity", "run_id", "state", "seed", "step", "code", "protocol"]
CELL_COLUMNS = [
    "identity", "run_id", "name", "state", "step", "steps", "seed", "protocol", "code", "params", "metrics", "tags"
]  # fmt: skip
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
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


# ---------------------------------------------------------------------------------------------------------- reading


def load_results(
    sweep: str, tracking_uri: str | None = None, *, metrics: Collection[str] | None = None
) -> pd.DataFrame:
    """One row per (cell, evaluation step).

    Columns: identity, run_id, state, seed, step, code, protocol; then params and metrics by their MLflow names. An
    evaluation step is one with an `eval/…` point; other metrics are filled in where they have a point at exactly
    that step. A cell that was never evaluated has no row: `load_cells` lists it.

    Args:
        sweep: the sweep's name, i.e. its MLflow experiment.
        tracking_uri: default MLFLOW_TRACKING_URI, else mlflow.db in the current folder.
        metrics: which metrics to fetch beside `eval/…`; each costs one request a cell. None fetches all.

    Raises:
        UsageError: no sweep has this name.
        TrackingError: the record does not exist or cannot be reached.
    """
    with _open(sweep, tracking_uri) as (client, experiment):
        runs = _cell_runs(client, experiment)
        points = _points_at_evaluations(client, runs, metrics)
    rows = []
    param_names: set[str] = set()
    metric_names: set[str] = set()
    for run in runs:
        tags, params = run.data.tags, _params(run)
        seed = params.pop("seed", None)
        param_names |= params.keys()
        for step, values in sorted(points[run.info.run_id].items()):
            metric_names |= values.keys()
            head = {
                "identity": tags.get("sddit.identity", ""),
                "run_id": run.info.run_id,
                "state": tags.get("sddit.state", "unknown"),
                "seed": seed,
                "step": step,
                "code": tags.get("sddit.code", ""),
                "protocol": tags.get("sddit.protocol", ""),
            }
            rows.append({**params, **values, **head})
    return pd.DataFrame(rows, columns=[*RESULT_COLUMNS, *sorted(param_names), *sorted(metric_names)])


def load_cells(sweep: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """One row per cell, evaluated or not; cheap, since no metric history is read.

    Columns: identity, run_id, name, state, step (reached), steps (asked), seed, protocol, code, and three
    dictionaries: params, metrics (the last value of each) and tags. Raises as `load_results` does.
    """
    with _open(sweep, tracking_uri) as (client, experiment):
        runs = _cell_runs(client, experiment)
    rows = []
    for run in runs:
        tags, params = run.data.tags, _params(run)
        rows.append(
            {
                "identity": tags.get("sddit.identity", ""),
                "run_id": run.info.run_id,
                "name": run.info.run_name,
                "state": tags.get("sddit.state", "unknown"),
                "step": int(tags.get("sddit.step", 0)),
                "steps": int(tags.get("sddit.steps", 0)),
                "seed": params.get("seed"),
                "protocol": tags.get("sddit.protocol", ""),
                "code": tags.get("sddit.code", ""),
                "params": params,
                "metrics": {key: _finite_or_inf(value) for key, value in run.data.metrics.items()},
                "tags": dict(tags),
            }
        )
    return pd.DataFrame(rows, columns=CELL_COLUMNS)


def load_sweep(sweep: str, tracking_uri: str | None = None) -> SweepRecord:
    """The sweep's experiment and the tags of its parent run. Raises as `load_results` does."""
    with _open(sweep, tracking_uri) as (client, experiment):
        parents = _runs_of_kind(client, experiment, "sweep")
    if not parents:
        return SweepRecord(experiment.experiment_id, None, {})
    return SweepRecord(experiment.experiment_id, parents[0].info.run_id, dict(parents[0].data.tags))


def sweep_names(tracking_uri: str | None = None) -> list[str]:
    """The names of all recorded sweeps; none where there is no record yet. Raises TrackingError as `load_results`."""
    uri = tracking_uri or default_tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return []
    try:
        with _open("Default", uri) as (client, _):
            return [experiment.name for experiment in _all_experiments(client)]
    except UsageError:  # somebody deleted MLflow's own experiment
        return []


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


# ------------------------------------------------------------------------------------------------------------- runs


def _cell_runs(client: MlflowClient, experiment: Experiment) -> list[Run]:
    """The sweep's cells, oldest first; of several runs with one identity the oldest."""
    runs: dict[str, Run] = {}
    extra = 0
    for run in _runs_of_kind(client, experiment, "cell"):
        identity = run.data.tags.get("sddit.identity", run.info.run_id)
        extra += identity in runs
        runs.setdefault(identity, run)
    if extra:
        warnings.warn(f"{experiment.name}: {extra} runs repeat a recorded cell; the oldest is used.", stacklevel=3)
    return list(runs.values())


def _runs_of_kind(client: MlflowClient, experiment: Experiment, kind: str) -> list[Run]:
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id], f"tags.`sddit.kind` = '{kind}'", max_results=PAGE, page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _points_at_evaluations(
    client: MlflowClient, runs: list[Run], metrics: Collection[str] | None
) -> dict[str, dict[int, dict[str, float]]]:
    """run_id → evaluation step → metric → value; the first of several points of one (run, metric, step).

    Points carry timestamps computed from their step, so 'first' is the store's order where a value was recorded
    twice: by timestamp, then step, then value.
    """

    def wanted(key: str) -> bool:
        if key.startswith("system/"):  # their steps count samples of the machine, not optimiser steps
            return False
        return metrics is None or key in metrics or key.startswith("eval/")

    evaluated = [run for run in runs if any(key.startswith("eval/") for key in run.data.metrics)]
    series = [(run.info.run_id, key) for run in evaluated for key in run.data.metrics if wanted(key)]
    points: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    repeated: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        histories = pool.map(lambda pair: client.get_metric_history(*pair), series)
        for (run_id, key), history in zip(series, histories, strict=True):
            for point in history:
                at_step = points[run_id][point.step]
                if key in at_step:
                    repeated.append(f"{key} at step {point.step} of run {run_id}")
                at_step.setdefault(key, _finite_or_inf(point.value))
    if repeated:
        warnings.warn(
            f"{len(repeated)} points were recorded twice, e.g. {repeated[0]}; the first is used.", stacklevel=3
        )
    at_evaluations: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for run_id, steps in points.items():
        for step, values in steps.items():
            if any(key.startswith("eval/") for key in values):
                at_evaluations[run_id][step] = values
    return at_evaluations


# ----------------------------------------------------------------------------------------------------------- values


def _params(run: Run) -> dict[str, Any]:
    return {key: parse_param(key, text) for key, text in sorted(run.data.params.items())}


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
def _open(sweep: str, tracking_uri: str | None) -> Iterator[tuple[MlflowClient, Experiment]]:
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
                f"The sweep {sweep!r} was deleted in {_shown(uri)}. Bring it back with: "
                f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            )
        with _bounded_http(retries=2, seconds=60):  # somebody is; a long table may take a while
            yield client, experiment
    except (MlflowException, SQLAlchemyError, requests.RequestException, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrackingError(
            f"Cannot read the MLflow record {_shown(uri)}: {_shown(reason)}\n"
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
        return f"No sweep {sweep!r} in {_shown(uri)}, which holds none yet. {FIRST_RUN}"
    if len(known) > 20:  # a shared server can hold thousands
        known = difflib.get_close_matches(sweep, known, n=20, cutoff=0.0)
    return f"No sweep {sweep!r} in {_shown(uri)}. {did_you_mean(sweep, known)}"


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
            raise TrackingError(f"Cannot reach the MLflow database {_shown(uri)}: {error}") from error
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


def _shown(text: str) -> str:
    """Without the password that an address may carry."""
    return re.sub(r"//([^/@:\s]*):[^/@\s]*@", r"//\1:…@", text)
