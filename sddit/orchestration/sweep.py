"""A sweep: a question, its axes and its figures, declared in `sweeps/`, run here from the command line to the report.

Running the same command again is resuming it: what is done is read from MLflow, and only what is missing runs.
"""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from sddit import cost
from sddit.config import FRESH_SEED, Experiment, parse_assignment
from sddit.environment import check_environment
from sddit.errors import UsageError, did_you_mean, run_script, without_password
from sddit.orchestration import cluster, plan
from sddit.orchestration.plan import Cell, Planned, Point, Settings, Space, Times
from sddit.orchestration.progress import OVER, make_console
from sddit.tracking import Owner, SweepRecord, open_client, resolve_uri

__all__ = ["Sweep", "Times"]


@dataclass(frozen=True)
class Sweep:
    """A question asked of SD-DiT.

    Args:
        name: the question, and the sweep's default name in MLflow.
        question: one sentence.
        axes: dotted field → values of the grid, or a word of one's own → named settings.
        figures: the modules whose `figure(sweep, tracking_uri, out)` draws the answer and returns the files written;
            by name, since drawing is imported when it is needed.
        method: the method of the base experiment.
        ties: field → the axis whose value it takes as well.
        suggest: settings of an Optuna trial, for `--search tpe`; by default a choice among the grid's values.
        fields: the fields that `suggest` sets, where they are not the axes.
        first: the points that a search begins with, given the base experiment.
        defaults: flags that this sweep has by default.
    """

    name: str
    question: str
    axes: dict[str, list[Any] | dict[str, Settings]]
    figures: tuple[str, ...]
    method: str = "sddit"
    ties: dict[str, str] = field(default_factory=dict)
    suggest: Callable[[Any], Settings] | None = None
    fields: tuple[str, ...] = ()
    first: Callable[[Experiment], list[Point]] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The sweep's command; exits."""
        run_script(lambda: run(self, parse_flags(self, arguments)))


@dataclass(frozen=True)
class Flags:
    """The flags of every sweep."""

    preset: str = "digits"
    """Base experiment: digits, cifar10, cifar10-latents, imagenet256."""
    name: str | None = None
    """The sweep's name; default: the question, with -<preset> appended unless that is digits."""
    seeds: Annotated[int, tyro.conf.arg(metavar="K")] = 1
    """Seeds 0 … K-1 for every cell; a larger K only adds."""
    confirm: Annotated[int, tyro.conf.arg(metavar="K")] = 0
    """Train the best setting of the finished sweep with K fresh seeds: what it gives without having been picked."""
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
    objective: Literal["fid", "fid,cost"] = "fid"
    """With --search tpe: FID alone, or FID and training FLOPs together (a Pareto front)."""
    budget_hours: Annotated[float | None, tyro.conf.arg(metavar="H")] = None
    """Device-hours over all starts; then cells stop after a checkpoint, and the same command goes on."""
    price: Annotated[float | None, tyro.conf.arg(metavar="P")] = None
    """Money per device-hour, for the plan and the report."""
    plan: bool = False
    """Print cells, state and predicted time, money, memory and disk; write nothing."""
    retry_failed: bool = False
    """Also run cells that failed before."""
    tracking_uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    storage: str = os.environ.get("SDDIT_STORAGE") or "runs"
    """Folder or URI for checkpoints; default: SDDIT_STORAGE, else runs."""
    max_disk_gb: float | None = None
    """Ceiling for checkpoints: the oldest done cells are slimmed to their sampling weights."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """section.field=value, repeatable. On an axis, a value or a JSON list replaces the axis's values."""


def parse_flags(sweep: Sweep, arguments: Sequence[str] | None) -> Flags:
    """The command line; exits with status 2 on an unknown flag."""
    return tyro.cli(Flags, default=Flags(**sweep.defaults), description=sweep.question, args=arguments)


@dataclass
class Job:
    """A sweep with its flags resolved."""

    sweep: Sweep
    flags: Flags
    name: str
    space: Space
    base: Experiment
    uri: str
    chosen: dict[str, list[Any]]  # axis → the values that this command asks for
    cells: list[Cell] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    first: list[Point] = field(default_factory=list)
    spent: float = 0.0  # device-hours, over all starts so far

    @property
    def storage(self) -> str:
        root = self.flags.storage if "://" in self.flags.storage else str(Path(self.flags.storage).absolute())
        return f"{root.rstrip('/')}/{self.name}"

    @property
    def journal(self) -> Path:
        """The study as a file for Optuna's dashboard; derived from the record, so it may be thrown away."""
        return Path("runs").absolute() / self.name / "study.journal"

    @property
    def searches(self) -> bool:
        return self.flags.search == "tpe"

    @property
    def axes(self) -> list[str]:
        """The names of what varies, for figures."""
        return list(self.space.fields or self.space.axes)

    @property
    def shape(self) -> cost.Shape:
        return self._manifest.shape

    @property
    def num_classes(self) -> int:
        return self._manifest.num_classes

    @property
    def data_digest(self) -> str:
        return self._manifest.digest

    @property
    def _manifest(self) -> Any:
        from sddit.data import open_manifest

        return self.cells[0].manifest if self.cells else open_manifest(self.base.data.path)


def resolve(sweep: Sweep, flags: Flags) -> Job:
    """Flags to experiments; everything that can be wrong without looking at the record is found here.

    Raises:
        UsageError, DataError: with what to do.
    """
    _check(sweep, flags)
    changes = dict(parse_assignment(text) for text in flags.set)
    searched = sweep.suggest is not None and flags.search == "tpe"
    chosen = {axis: _chosen(axis, values, changes.pop(axis, None)) for axis, values in sweep.axes.items()}
    for axis, values in sweep.axes.items():
        named = values.values() if isinstance(values, Mapping) else []
        if "method.name" in changes and any("method.name" in settings for settings in named):
            raise UsageError(
                f"The question {sweep.name!r} compares methods itself. Choose among them with --set '{axis}=[…]' of "
                f"{', '.join(map(repr, values))}."
            )
    if fixed := [name for name in changes if name in sweep.fields]:
        raise UsageError(f"{fixed[0]} cannot be set on the search {sweep.name!r}, which chooses it itself.")
    method = changes.pop("method.name", sweep.method)
    changes["resources.workers"] = flags.workers
    if flags.steps:
        changes["train.steps"] = flags.steps
    space = Space(
        flags.preset, method, changes, sweep.axes, sweep.ties, sweep.suggest if searched else None,
        (sweep.fields or tuple(sweep.axes)) if searched else (),
    )  # fmt: skip
    name = flags.name or sweep.name + ("" if flags.preset == "digits" else f"-{flags.preset}")
    if not name or set(name) & set("/\\'\"`"):
        raise UsageError(f"--name {name!r} cannot be used: it must be a word without slashes or quotes.")
    base = space.base()
    unknown = [axis for axis in sweep.axes if "." in axis and axis not in base.digest_fields()]
    if unknown and len(space.methods) == 1:
        raise UsageError(f"The question {sweep.name!r} varies {unknown[0]}, which method {method!r} does not have.")
    job = Job(sweep, flags, name, space, base, resolve_uri(flags.tracking_uri), chosen)
    if not job.searches:
        job.cells, job.excluded = plan.grid(space, chosen, range(flags.seeds))
    elif sweep.first:
        job.first = sweep.first(base)
    return job


def _check(sweep: Sweep, flags: Flags) -> None:
    counts = {"seeds": flags.seeds, "workers": flags.workers, "trials": flags.trials, "steps": flags.steps}
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"--{flag} is {value}, but must be at least 1.")
    amounts = {"budget-hours": flags.budget_hours, "price": flags.price, "max-disk-gb": flags.max_disk_gb}
    for flag, amount in {**amounts, "confirm": flags.confirm}.items():
        if amount is not None and not amount >= 0:
            raise UsageError(f"--{flag} is {amount}, but must not be negative.")
    if flags.seeds > FRESH_SEED:
        raise UsageError(f"--seeds is {flags.seeds}, but seeds from {FRESH_SEED} on are kept for --confirm.")
    if flags.search == "grid" and not sweep.axes:
        raise UsageError(f"{sweep.name!r} has no grid. Leave --search out, or use --search tpe.")
    if flags.search == "tpe" and flags.seeds > 1:
        raise UsageError(
            "--seeds cannot be used with --search tpe, which compares single cells. Leave one of them out."
        )
    if (flags.search == "tpe") != (flags.trials is not None):
        raise UsageError("--search tpe and --trials N (cells in all) must be given together.")
    if flags.objective == "fid,cost" and flags.search != "tpe":
        raise UsageError("--objective fid,cost is for --search tpe: a grid runs all its cells whatever they cost.")
    if flags.objective == "fid,cost" and flags.asha:
        raise UsageError(
            "--objective fid,cost cannot be used with ASHA, which would stop small models for their FID alone. "
            "Add --no-asha."
        )
    for text in flags.set:
        if parse_assignment(text)[0] == "seed":
            raise UsageError("seed cannot be set on a sweep. Use --seeds K for seeds 0 … K-1.")


def _chosen(axis: str, declared: list[Any] | dict[str, Settings], value: Any) -> list[Any]:
    """The values of an axis that a command asks for, all by default; of named settings, by name."""
    values = list(declared) if value is None else list(value) if isinstance(value, list) else [value]
    if not values:
        raise UsageError(f"--set {axis}=[] leaves nothing to run. Give a value, or leave it out.")
    for name in values:
        if isinstance(declared, Mapping) and name not in declared:
            raise UsageError(f"{axis} has no setting {name!r}. {did_you_mean(str(name), declared)}")
    return values


def run(sweep: Sweep, flags: Flags) -> int:
    """Runs what is missing of a sweep. Returns the exit status."""
    from sddit.orchestration.speed import Speeds

    check_environment()
    console = make_console()
    job = resolve(sweep, flags)
    check_inputs(job)
    if flags.plan:
        show_plan(job, look_up(job), console)
        return 0
    if _seems_unfinished(job):  # Ray starts while the client of the record does
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
        _describe(job, record)
        failed, left = _run_missing(job, record, owner, planned, Speeds(), console)
        from sddit.orchestration import finish  # imports pandas, for which Ray's start need not wait

        finish.finish(job, record, console)
        status = "KILLED" if left else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        console.print(f"\nInterrupted. What is done is kept; this goes on:\n  {resume_line()}")
        return 130
    finally:
        owner.release(status)
    return 1 if failed else 0


def _seems_unfinished(job: Job) -> bool:
    """Whether a look into a sqlite file finds cells of the grid that are not over, in milliseconds and for no more than
    to start Ray early: `look_up` decides."""
    if not job.uri.startswith("sqlite:///"):
        return False
    path = Path(job.uri.removeprefix("sqlite:///"))
    if not path.exists():
        return True
    over = (
        "SELECT cell.value FROM tags cell JOIN tags state USING (run_uuid) WHERE cell.key = 'sddit.identity' "
        "AND state.key = 'sddit.state' AND state.value != 'running'"
    )
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1)) as record:
        known = {identity for (identity,) in record.execute(over)}
        return any(cell.identity not in known for cell in job.cells)
    return False


def check_inputs(job: Job) -> None:
    """What would fail cells is found here: how they are evaluated, and the right to write."""
    from sddit.data import open_manifest
    from sddit.metrics.check import check_evaluation
    from sddit.training.store import CheckpointStore

    planned = [(cell.experiment, cell.manifest) for cell in job.cells]
    planned = planned or [(job.base, open_manifest(job.base.data.path))]
    distinct = {(e.data, e.eval, e.model): (e, manifest) for e, manifest in planned}  # what the check reads
    for experiment, manifest in distinct.values():
        check_evaluation(experiment, manifest)
    if not job.flags.plan:
        CheckpointStore(job.storage).check_writable()


def look_up(job: Job, record: SweepRecord | None = None) -> list[Planned]:
    """The cells with what the record says of them; refuses a changed base. Without a `record`, only reads.

    Raises:
        UsageError: the name stands for another base.
        TrackingError: the record cannot be read.
    """
    import pandas as pd

    from sddit import results

    flags, recorded, parent = job.flags, pd.DataFrame(columns=results.CELL_COLUMNS), {}
    if record is not None or job.name in results.sweep_names(job.uri):
        recorded = results.load_cells(job.name, job.uri)
        parent = results.load_sweep(job.name, job.uri).tags
    job.spent = max(
        sum(plan.device_hours(row) for row in recorded.to_dict("records")), float(parent.get("sddit.device_hours") or 0)
    )
    base = {"question": job.sweep.name, **plan.base_fields(job.space, job.data_digest)}
    if "sddit.base" in parent:
        plan.refuse_other_base(
            job.name,
            json.loads(parent["sddit.base"]),
            base,
            plan.default_fields(job.space),
            taken=results.sweep_names(job.uri),
        )
    elif record is not None:
        record.set_tags({"sddit.base": json.dumps(base)})
    if job.searches:
        earlier = [row for row in recorded.to_dict("records") if not (row["seed"] or 0) >= FRESH_SEED]
        job.cells = [job.space.cell(plan.point_of(row, job.axes), seed=0) for row in earlier]
        first = [job.space.cell(point, seed=0) for point in job.first]
        new = [cell for cell in first if cell.identity not in {c.identity for c in job.cells}]
        job.cells += new[: max(0, (flags.trials or 0) - len(job.cells))]
    planned = plan.plan(job.cells, recorded)
    if flags.confirm:
        missing = missing_of(planned, flags)
        best = plan.best_point(planned, len(missing) + suggestions(planned, replace(flags, confirm=0)))
        fresh = [job.space.cell(best, FRESH_SEED + i) for i in range(flags.confirm)]
        job.cells = [*job.cells, *fresh]
        planned += plan.plan(fresh, recorded)
    return planned


def missing_of(planned: Sequence[Planned], flags: Flags) -> list[Planned]:
    """The cells that this command runs."""
    wanted = {"new", "interrupted", "extend"} | ({"failed"} if flags.retry_failed else set())
    wanted |= set() if flags.asha else {"pruned"}
    return [p for p in planned if p.state in wanted]


def suggestions(planned: Sequence[Planned], flags: Flags) -> int:
    """How many cells a search still has to suggest: its budget counts every cell over all starts."""
    searched = sum(p.cell.experiment.seed < FRESH_SEED for p in planned)
    return max(0, (flags.trials or 0) - searched) if flags.search == "tpe" and not flags.confirm else 0


def _describe(job: Job, record: SweepRecord) -> None:
    """What figures and reports must know of the sweep, on its run."""
    flags = job.flags
    excluded: dict[str, str] = {}
    for label, reason in job.excluded.items():  # as many as the tag holds
        more = excluded | {label: textwrap.shorten(reason, 150)}
        excluded = more if len(json.dumps(more)) < 7500 else excluded
    named = {axis: next(iter(v)) for axis, v in job.sweep.axes.items() if isinstance(v, Mapping)}
    tags = {
        "sddit.axes": json.dumps(job.axes),
        "sddit.command": command_line(),
        "sddit.excluded": json.dumps(excluded),
        "sddit.reference": json.dumps(named),  # what others are compared with
        "sddit.budget_hours": "" if flags.budget_hours is None else str(flags.budget_hours),
        "sddit.price": "" if flags.price is None else str(flags.price),
    }
    record.set_tags(tags)
    record.describe(job.sweep.question, job.axes)


# ------------------------------------------------------------------------------------------------------------ running


def _run_missing(
    job: Job, record: SweepRecord, owner: Owner, planned: list[Planned], speeds: Any, console: Console
) -> tuple[bool, bool]:
    """Runs the cells that are missing on the cluster.

    Returns:
        whether something failed, now or before, or could not be run; and whether cells are left for another command.
    """
    from sddit.orchestration import doctor
    from sddit.orchestration.forecast import forecast

    missing = missing_of(planned, job.flags)
    _say_failed_before(planned, job.flags, console)
    for label, reason in job.excluded.items():
        console.print(f"Excluded: {label}: {reason}")
    slimmed = [p for p in missing if p.state == "extend" and _is_slimmed(job, p)]
    for p in slimmed:
        console.print(f"{p.cell.label} seed {p.cell.experiment.seed} was slimmed (--max-disk-gb): it cannot go on.")
        missing.remove(p)
    suggested = suggestions(planned, job.flags)
    samples = len(missing) + suggested
    failed_before = any(p.state == "failed" and p not in missing for p in planned) or bool(slimmed)
    if not samples:
        states = Counter(p.state for p in planned)
        if set(states) == {"done"}:
            console.print(f"Sweep {job.name}: all {len(planned)} cells are done; nothing to run.")
        else:
            counts = ", ".join(f"{n} {state}" for state, n in states.items())
            console.print(f"Sweep {job.name}: nothing to run: {counts}.")
        return failed_before, bool(slimmed)
    budget = job.flags.budget_hours
    if budget is not None and job.spent >= budget:
        console.print(_budget_used(budget, job.spent, samples))
        return failed_before, True
    logs = _connect(job)
    console.print(
        f"Sweep {job.name}: {samples} cells to run, {len(planned) - len(missing)} done. "
        f"Record: {without_password(job.uri)}. Checkpoints: {job.storage}."
    )
    import ray

    try:
        doctor.before_sweep(job, console)
        placement = _place(job, cluster.nodes(), samples)
        console.print(f"Concurrency: {placement.arithmetic}.")
        expected = forecast(missing, speeds, placement, job.base, job.shape, suggested)
        console.print(f"Logs of Ray and of the cells: {logs}")
        owner.confirm()
        from sddit.orchestration.driver import Driver  # imports ray, which must be configured first

        driver = Driver(job, record, owner, planned, missing, placement, logs, console)
        driver.fit(samples)
        driver.learn(speeds, expected)
    finally:
        ray.shutdown()
    rows = driver.progress.rows
    failed = [row for row in rows if row.state == "failed" and row.started is not None]
    for row in failed:
        console.print(f"Failed: {row.label} seed {row.seed} ({row.identity}): {row.note}", style="red")
    if failed:
        console.print(f"Logs: {logs}. Run them again with: {resume_line('--retry-failed')}")
    left = samples - sum(row.started is not None and row.state in OVER for row in rows)
    if left and driver.stopping and budget is not None:
        console.print(_budget_used(budget, driver.spent(), left))
    elif left and not any(row.state not in OVER for row in rows):
        console.print(f"The space holds no further cell: {samples - left} of {samples} ran.")
        left = 0
    elif left:
        console.print(f"{left} cells did not end. What they reached is kept; this goes on:\n  {resume_line()}")
    return bool(failed) or failed_before or (left > 0 and not driver.stopping), left > 0


def _is_slimmed(job: Job, planned: Planned) -> bool:
    from sddit.training.store import CheckpointStore

    return CheckpointStore(f"{job.storage}/{planned.cell.identity}").is_slimmed()


def _budget_used(budget: float, spent: float, left: int) -> str:
    return (
        f"Budget used: {spent:.3g} of {budget:g} device-hours. {left} cells are not done; what they reached is kept. "
        f"With a larger budget this goes on:\n  {resume_line('--budget-hours', f'{2 * budget:g}')}"
    )


def _place(job: Job, nodes: Sequence[cluster.Node], cells: int) -> cluster.Placement:
    """Room is made for the largest cell."""
    experiments = [cell.experiment for cell in job.cells] or [job.base]
    if "model.size" in job.space.fields:
        experiments.append(job.base.replace({"model.size": f"XL/{job.base.model.patch}"}))
    needs = [cost.training_bytes(e, job.shape, job.num_classes) for e in experiments]
    worker = max(cost.worker_bytes(e, job.shape, job.num_classes) for e in experiments)
    return cluster.place(
        nodes, job.base.resources, worker, device_bytes=max(map(sum, needs)), cells=cells, growth=cluster.growth()
    )


def _connect(job: Job) -> str:
    resources, here = job.base.resources, cluster.this_machine()
    preload = resources.workers == 1 and not here.gpus and here.cpus <= cluster.PRELOADED_CPUS
    # Nested cells that are stopped early need the dashboard to give their workers back (ray.md §4).
    return cluster.connect(
        dashboard=resources.workers > 1 and job.flags.asha,
        cell_threads=resources.cpus_per_worker if preload else None,
    )


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


def show_plan(job: Job, planned: Sequence[Planned], console: Console) -> None:
    """What a command would do and cost; the speed of this machine is measured where it is not known."""
    from sddit.orchestration import forecast
    from sddit.orchestration.speed import Speeds

    missing, suggested = missing_of(planned, job.flags), suggestions(planned, job.flags)
    here = cluster.this_machine()
    remote = bool(os.environ.get("RAY_ADDRESS"))
    if remote:
        _connect(job)
    nodes = cluster.nodes() if remote else [here]
    placement = _place(job, nodes, max(1, len(missing) + suggested))
    speeds = Speeds()
    if (missing or suggested) and not remote:  # the speed of a cluster is learnt from its cells
        experiments = [p.cell.experiment for p in missing] + [job.base] * bool(suggested)
        side_by_side = min(placement.concurrent, len(missing) + suggested, int(here.cpus))
        speeds.measure(experiments, job.shape, side_by_side, console)
    if job.flags.asha:
        from sddit.orchestration.searcher import describe_ladder

        console.print(describe_ladder(job.base.eval.every, job.base.train.steps))
    forecast.show(
        job.name,
        planned,
        job.excluded,
        forecast.forecast(missing, speeds, placement, job.base, job.shape, suggested),
        placement,
        spent_hours=job.spent,
        budget_hours=job.flags.budget_hours,
        price=job.flags.price,
        num_classes=job.num_classes,
        console=console,
    )


def resume_line(*extra: str) -> str:
    """The command that goes on with this sweep: the one that was given."""
    return without_password(shlex.join([*sys.orig_argv, *extra]))


def command_line() -> str:
    """The command as somebody else would give it, in the project's folder."""
    root, script = Path(__file__).parents[2], Path(sys.argv[0]).absolute()
    name = str(script.relative_to(root) if script.is_relative_to(root) else script.name)
    return without_password(shlex.join(["python", name, *sys.argv[1:]]))
