"""A sweep: a question, its axes and its figure, declared in `sweeps/`, run here from the command line to the figure.

Running the same command again is resuming it: what is done is read from MLflow, and only what is missing runs.
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import pandas as pd
import tyro
from rich.console import Console
from rich.table import Table

from sddit import cost, presets
from sddit.config import Experiment, parse_assignment
from sddit.environment import check_environment
from sddit.errors import UsageError, run_script
from sddit.orchestration import cluster, plan, speed
from sddit.orchestration.plan import Cell, Planned
from sddit.orchestration.progress import duration
from sddit.tracking import Owner, SweepRecord, open_client, resolve_uri

GB = 1e9


@dataclass(frozen=True)
class Sweep:
    """A question asked of SD-DiT.

    Args:
        name: the question, and the sweep's default name in MLflow.
        question: one sentence.
        axes: dotted field → values of the grid.
        figure: the module whose `figure(sweep, tracking_uri, out)` draws the answer and returns the files written;
            by name, since drawing is imported when it is needed.
        method: the method of the base experiment.
        suggest: axis values of an Optuna trial, for `--search tpe`; by default a choice among the grid's values.
    """

    name: str
    question: str
    axes: dict[str, list[Any]]
    figure: str
    method: str = "sddit"
    suggest: Callable[[Any], dict[str, Any]] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The sweep's command; exits."""
        run_script(lambda: run(self, parse_flags(self, arguments)))


@dataclass(frozen=True)
class Flags:
    """The flags of every sweep."""

    preset: str = "digits"
    """Base experiment: digits, cifar10, imagenet256."""
    name: str | None = None
    """The sweep's name; default: the question, with -<preset> appended unless that is digits."""
    seeds: Annotated[int, tyro.conf.arg(metavar="K")] = 1
    """Seeds 0 … K-1 for every cell; a larger K only adds."""
    steps: int | None = None
    """Optimiser steps of every cell; more than before extends finished cells."""
    workers: int = 1
    """Workers per cell, anywhere in the cluster. Never changes a result."""
    search: Literal["grid", "tpe"] = "grid"
    """All cells of the grid, or cells that Optuna's TPE suggests."""
    trials: int | None = None
    """With --search tpe: cells in all, over all starts."""
    asha: bool = False
    """Stop cells early whose FID at a step is behind the others' (ASHA)."""
    plan: bool = False
    """Print cells, state and predicted time, memory and disk; write nothing."""
    retry_failed: bool = False
    """Also run cells that failed before."""
    tracking_uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    storage: str = "runs"
    """Folder or URI for checkpoints."""
    max_disk_gb: float | None = None
    """Ceiling for checkpoints: the oldest done cells are slimmed to their sampling weights."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """section.field=value, repeatable. On an axis, a value or a JSON list replaces the axis's values."""


def parse_flags(sweep: Sweep, arguments: Sequence[str] | None) -> Flags:
    """The command line; exits with status 2 on an unknown flag."""
    return tyro.cli(Flags, description=sweep.question, args=arguments)


@dataclass
class Job:
    """A sweep with its flags resolved."""

    sweep: Sweep
    flags: Flags
    name: str
    base: Experiment
    axes: dict[str, list[Any]]
    uri: str
    cells: list[Cell] = field(default_factory=list)

    @property
    def storage(self) -> str:
        root = self.flags.storage if "://" in self.flags.storage else str(Path(self.flags.storage).absolute())
        return f"{root.rstrip('/')}/{self.name}"


def resolve(sweep: Sweep, flags: Flags) -> Job:
    """Flags to experiments; everything that can be wrong without looking at the record is found here.

    Raises:
        UsageError, DataError: with what to do.
    """
    for flag, value in {
        "seeds": flags.seeds,
        "workers": flags.workers,
        "trials": flags.trials,
        "steps": flags.steps,
    }.items():
        if value is not None and value < 1:
            raise UsageError(f"--{flag} is {value}, but must be at least 1.")
    if flags.search == "tpe" and flags.seeds > 1:
        raise UsageError(
            "--seeds cannot be used with --search tpe, which compares single cells. Leave one of them out."
        )
    if (flags.search == "tpe") != (flags.trials is not None):
        raise UsageError("--search tpe and --trials N (cells in all) must be given together.")
    changes = dict(parse_assignment(text) for text in flags.set)
    axes = {name: _values(changes.pop(name)) if name in changes else values for name, values in sweep.axes.items()}
    if "seed" in changes:
        raise UsageError("seed cannot be set on a sweep. Use --seeds K for seeds 0 … K-1.")
    method = changes.pop("method.name", sweep.method)
    changes["resources.workers"] = flags.workers
    if flags.steps:
        changes["train.steps"] = flags.steps
    base = presets.preset(flags.preset)(method=method).replace(changes)
    unknown = [axis for axis in axes if axis not in base.digest_fields()]
    if unknown:
        raise UsageError(f"The question {sweep.name!r} varies {unknown[0]}, which method {method!r} does not have.")
    name = flags.name or sweep.name + ("" if flags.preset == "digits" else f"-{flags.preset}")
    if not name or set(name) & set("/\\'\"`"):
        raise UsageError(f"--name {name!r} cannot be used: it must be a word without slashes or quotes.")
    job = Job(sweep, flags, name, base, axes, resolve_uri(flags.tracking_uri))
    if flags.search == "grid":
        job.cells = plan.grid(base, axes, flags.seeds)
    return job


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def run(sweep: Sweep, flags: Flags) -> int:
    """Runs what is missing of a sweep. Returns the exit status."""
    check_environment()
    console = Console(markup=False, highlight=False, soft_wrap=True)
    job = resolve(sweep, flags)
    check_inputs(job)
    if flags.plan:
        planned = look_up(job)
        show_plan(job, planned, console, speed.of_this_machine(job.base, console))
        return 0
    if job.uri.startswith("sqlite:///") and not Path(job.uri.removeprefix("sqlite:///")).exists():
        # Nothing is recorded, so everything is to be run: Ray starts while the record's tables are made.
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(open_client, job.uri)
            _connect(job)
            opening.result()
    record = SweepRecord(job.uri, job.name, question=sweep.question)
    owner = record.claim()
    status = owner.status_before  # a refused command leaves the sweep as it was
    try:
        planned = look_up(job, record)
        status = "FAILED"
        failed = _run_missing(job, record, owner, planned, console)
        finish(job, record, console)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        console.print(f"\nInterrupted. What is done is kept; this goes on:\n  {resume_line()}")
        return 130
    finally:
        owner.release(status)
    return 1 if failed else 0


def check_inputs(job: Job) -> None:
    """What would fail cells is found here: how they are evaluated, and the right to write."""
    from sddit.data import open_manifest
    from sddit.metrics.check import check_evaluation
    from sddit.training.store import CheckpointStore

    planned = [(cell.experiment, cell.manifest) for cell in job.cells]
    for experiment, manifest in planned or [(job.base, open_manifest(job.base.data.path))]:
        check_evaluation(experiment, manifest)
    if not job.flags.plan:
        CheckpointStore(job.storage).check_writable()


def look_up(job: Job, record: SweepRecord | None = None) -> list[Planned]:
    """The cells with what the record says of them; refuses a changed base. Without a `record`, only reads.

    Raises:
        UsageError: the name stands for another base.
        TrackingError: the record cannot be read.
    """
    from sddit import results

    recorded, parent = pd.DataFrame(columns=results.CELL_COLUMNS), {}
    if record is not None or job.name in results.sweep_names(job.uri):
        recorded = results.load_cells(job.name, job.uri)
        parent = results.load_sweep(job.name, job.uri).tags
    sample = job.cells[0] if job.cells else plan.make_cell(job.base, {k: v[0] for k, v in job.axes.items()}, 0)
    base = {"question": job.sweep.name, **plan.base_fields(job.base, job.axes, sample.manifest.digest)}
    if "sddit.base" in parent:
        plan.refuse_other_base(
            job.name,
            json.loads(parent["sddit.base"]),
            base,
            defaults=Experiment(method=type(job.base.method)()).digest_fields(),
            taken=results.sweep_names(job.uri),
        )
    elif record is not None:
        record.set_tag("sddit.base", json.dumps(base))
    if job.flags.search == "tpe":
        job.cells = [_recorded_cell(job, row) for row in recorded.to_dict("records")]
    return plan.plan(job.cells, recorded)


def _recorded_cell(job: Job, row: Mapping[Any, Any]) -> Cell:
    return plan.make_cell(job.base, {axis: row["params"][axis] for axis in job.axes}, row["seed"])


def missing_of(planned: Sequence[Planned], flags: Flags) -> list[Planned]:
    """The cells that this command runs."""
    wanted = {"new", "interrupted", "extend"} | ({"failed"} if flags.retry_failed else set())
    wanted |= set() if flags.asha else {"pruned"}
    return [p for p in planned if p.state in wanted]


# ------------------------------------------------------------------------------------------------------------ running


def _run_missing(job: Job, record: SweepRecord, owner: Owner, planned: list[Planned], console: Console) -> bool:
    """Runs the cells that are missing on the cluster. Returns whether any has failed, now or before."""
    missing = missing_of(planned, job.flags)
    _say_failed_before(planned, job.flags, console)
    budget = (job.flags.trials or 0) - sum(p.state in ("done", "pruned", "failed") for p in planned if p not in missing)
    samples = budget if job.flags.search == "tpe" else len(missing)
    done = sum(p not in missing for p in planned)
    if samples <= 0:
        over = sum(p.state != "failed" for p in planned)
        console.print(f"Sweep {job.name}: all {over} cells are done; nothing to run.")
        return over < len(planned)
    logs = _connect(job)
    console.print(
        f"Sweep {job.name}: {samples} cells to run, {done} done. Record: {job.uri}. Checkpoints: {job.storage}."
    )
    import ray

    try:
        shape, classes = _shape(job)
        placement = cluster.place(cluster.nodes(), job.base.resources, cost.worker_bytes(job.base, shape, classes))
        console.print(f"Concurrency: {placement.arithmetic}.")
        console.print(f"Logs of Ray and of the cells: {logs}")
        owner.confirm()
        from sddit.orchestration.driver import Driver  # imports ray, which must be configured first

        driver = Driver(job, record, owner, planned, missing, placement, logs, console)
        driver.fit(samples)
    finally:
        ray.shutdown()
    failed = [row for row in driver.progress.rows if row.state == "failed" and row.started is not None]
    for row in failed:
        console.print(f"Failed: {row.label} seed {row.seed} ({row.identity}): {row.note}", style="red")
    if failed:
        console.print(f"Logs: {logs}. Run them again with: {resume_line('--retry-failed')}")
    return any(row.state == "failed" for row in driver.progress.rows)


def _connect(job: Job) -> str:
    # Nested cells that are stopped early need the dashboard to give their workers back (ray.md §4).
    return cluster.connect(dashboard=job.base.resources.workers > 1 and job.flags.asha)


def _say_failed_before(planned: Sequence[Planned], flags: Flags, console: Console) -> None:
    failed = [p for p in planned if p.state == "failed"]
    for p in failed:
        cause = p.tags.get("sddit.error", "").strip().splitlines()[-1:] or ["cause not recorded"]
        console.print(
            f"Failed before: {p.cell.label} seed {p.cell.experiment.seed} ({p.cell.identity}): {cause[0]}",
            style="yellow",
        )
    if failed and not flags.retry_failed:
        console.print(f"Run {'it' if len(failed) == 1 else 'them'} again with --retry-failed.")


def _shape(job: Job) -> tuple[tuple[int, int, int], int]:
    from sddit.data import open_manifest

    manifest = open_manifest(job.base.data.path)
    return manifest.shape, manifest.num_classes


# ------------------------------------------------------------------------------------------------- before and after


def show_plan(job: Job, planned: Sequence[Planned], console: Console, measured: cost.Speed) -> None:
    """The cells with state and predicted time, and what the whole asks for."""
    shape, classes = _shape(job)
    missing = missing_of(planned, job.flags)
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"Sweep {job.name}", title_justify="left")
    for column in ("cell", "seed", "state", "step", "predicted", "identity"):
        table.add_column(column, justify="right" if column in ("seed", "step", "predicted") else "left")
    total = 0.0
    for p in planned:
        experiment = p.cell.experiment
        seconds = measured.seconds(experiment, shape, p.step if p.state != "new" else 0) if p in missing else 0.0
        total += seconds * experiment.resources.workers
        table.add_row(
            p.cell.label,
            str(experiment.seed),
            p.state,
            f"{p.step}/{experiment.train.steps}",
            duration(seconds) if p in missing else "",
            p.cell.identity,
        )
    console.print(table)
    if job.flags.search == "tpe":
        known = sum(p.state in ("done", "pruned") for p in planned)
        new = max(0, (job.flags.trials or 0) - known - len(missing))
        total += new * measured.seconds(job.base, shape) * job.base.resources.workers
        console.print(f"and {new} cells that TPE will suggest.")
    cells = (
        len(missing) if job.flags.search == "grid" else max(0, (job.flags.trials or 0) - len(planned) + len(missing))
    )
    memory = cost.worker_bytes(job.base, shape, classes) * job.base.resources.workers
    disk = cost.checkpoint_bytes(job.base, shape, classes)
    console.print(
        f"{cells} cells to run: about {duration(total)} of one device ({total / 3600:.2f} device-hours), "
        f"{memory / GB:.1f} GB of memory a cell, {disk / GB:.3g} GB of disk a done cell (twice that while it runs)."
    )


def finish(job: Job, record: SweepRecord, console: Console) -> None:
    """The best cell, the figure and table on the parent run, and how to look at it all."""
    from sddit import results

    cells = results.load_cells(job.name, job.uri)
    done = cells[(cells["state"] == "done") & cells["metrics"].map(lambda m: "eval/fid" in m)]
    if done.empty:
        console.print("No cell is done, so there is no figure yet.")
        return
    best = min(done.to_dict("records"), key=lambda row: row["metrics"]["eval/fid"])
    values = ", ".join(
        f"{axis.rpartition('.')[2]} {best['params'][axis]:g}"
        if isinstance(best["params"][axis], float)
        else f"{axis.rpartition('.')[2]} {best['params'][axis]}"
        for axis in job.axes
    )
    console.print(
        f"Lowest FID at the last step: {best['metrics']['eval/fid']:.2f} ({values}, seed {best['seed']}, step "
        f"{best['step']}, {best['identity']}); the lowest of {len(done)}, so itself a lucky draw."
    )
    files = importlib.import_module(job.sweep.figure).figure(job.name, job.uri, Path("figures"))
    for path in files:
        record.artifact(path)
    speed.remember(job.base, cells)
    console.print(f"MLflow UI: {ui_line(job.uri)}")
    console.print(f"  then open {ui_link(job.uri, record.experiment_id)}")


def ui_line(uri: str) -> str:
    """The command that opens the MLflow UI on this record."""
    if uri.startswith("http"):
        return f"it runs at {uri}"
    mlflow = Path(sys.executable).parent / "mlflow"
    return shlex.join([str(mlflow), "ui", "--workers", "1", "--backend-store-uri", uri])


def ui_link(uri: str, experiment_id: str) -> str:
    """The cells of a sweep as a table sorted by FID (mlflow.md §9)."""
    root = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    search = quote("tags.`sddit.kind` = 'cell'")
    order = quote("metrics.`eval/fid`")
    return (
        f"{root}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&searchFilter={search}"
        f"&orderByKey={order}&orderByAsc=true&startTime=ALL&lifecycleFilter=Active"
        "&modelVersionFilter=All+Runs&datasetsFilter=W10%3D"
    )


def resume_line(*extra: str) -> str:
    """The command that goes on with this sweep: the one that was given."""
    return shlex.join([*sys.orig_argv, *extra])
