"""Runs the missing cells of a sweep through Ray Tune: hands them out, keeps the table and the record up to date."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from rich.console import Console

from sddit import results
from sddit.cell import CellSpec
from sddit.errors import SdditError
from sddit.orchestration import cluster, plan, searcher, trial
from sddit.orchestration.plan import Planned
from sddit.orchestration.progress import Progress, Row
from sddit.tracking import Owner, SweepRecord
from sddit.training.store import CheckpointStore

if TYPE_CHECKING:
    from sddit.orchestration.sweep import Job

GB = 1e9


class Driver:
    """Runs cells through Tune: hands them out, keeps the table and the record up to date."""

    def __init__(
        self,
        job: Job,
        record: SweepRecord,
        owner: Owner,
        planned: list[Planned],
        missing: list[Planned],
        placement: cluster.Placement,
        logs: str,
        console: Console,
    ) -> None:
        self.job, self.record, self.owner, self.placement, self.logs = job, record, owner, placement, logs
        self.missing = list(missing)
        self.taken = {plan.twin_key(p.cell) for p in planned}
        self.scratch = tempfile.mkdtemp(prefix="sddit-")  # Tune's and Train's own files, which nothing relies on
        rows = [_row(p, waiting=p in missing) for p in planned]
        self.progress = Progress(job.name, rows, record.read_step, placement.concurrent, console)

    def fit(self, samples: int) -> None:
        """Runs `samples` cells.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        job, workers = self.job, self.job.base.resources.workers
        choices = {axis: _unique([*values, *(p.values[axis] for p in job.cells)]) for axis, values in job.axes.items()}
        space = searcher.Space(choices, job.sweep.suggest if job.flags.search == "tpe" else None)
        study = searcher.build_study(space, self._outcomes(), [p.cell.values for p in self.missing], seed=0)
        if workers == 1:
            trainable = tune.with_resources(trial.train_in_process, dict(self.placement.per_worker))
        else:
            # Any fraction of a CPU here would be missing from a worker and serialise the cells (ray.md §1).
            trainable = tune.with_resources(trial.train_on_workers, {"node:__internal_head__": 0.001})
        scheduler = None
        if job.flags.asha:
            scheduler = tune.schedulers.ASHAScheduler(
                time_attr="step", max_t=job.base.train.steps, grace_period=job.base.eval.every, reduction_factor=3
            )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher.StudySearcher(study, space, self.propose, self.ended),
                scheduler=scheduler,
                metric=searcher.OBJECTIVE if scheduler else None,
                mode="min" if scheduler else None,
                num_samples=samples,
                max_concurrent_trials=self.placement.concurrent,
                reuse_actors=workers == 1,
            ),
            run_config=tune.RunConfig(
                name=job.name,
                storage_path=self.scratch,
                verbose=0,
                callbacks=[Watcher(self)],
                failure_config=tune.FailureConfig(max_failures=trial.RETRIES),
            ),
        )
        try:
            with self.progress:
                tuner.fit()
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _outcomes(self) -> list[Any]:
        if self.job.flags.search != "tpe":
            return []
        recorded = results.load_cells(self.job.name, self.job.uri)
        return plan.outcomes(recorded, results.load_results(self.job.name, self.job.uri), self.job.axes)

    def propose(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """The configuration of a cell that Tune is to run next, its MLflow run opened; None if it is taken."""
        planned = next((p for p in self.missing if p.cell.values == values), None)
        if planned is not None:
            self.missing.remove(planned)
        else:
            planned = Planned(plan.make_cell(self.job.base, values, 0))
            if plan.twin_key(planned.cell) in self.taken:
                return None
            self.taken.add(plan.twin_key(planned.cell))
            self.progress.rows.append(_row(planned, waiting=True))
        cell = planned.cell
        run_id = self.record.start_cell(
            cell.experiment,
            identity=cell.identity,
            data_digest=cell.manifest.digest,
            label=cell.run_label,
            run_id=planned.run_id,
        )
        row = self.progress.row(cell.identity)
        row.state, row.run_id, row.note = "running", run_id, ""
        row.started, row.first_step = time.monotonic(), row.step
        self.progress.say(row)
        spec = CellSpec(
            experiment=cell.experiment.model_dump(mode="json"),
            identity=cell.identity,
            storage=f"{self.job.storage}/{cell.identity}",
            tracking_uri=self.job.uri,
            run_id=run_id,
            owned_run=self.record.parent_id,
            token=self.owner.token,
        )
        return {
            "spec": spec.to_dict(),
            "identity": cell.identity,
            "steps": cell.experiment.train.steps,
            "workers": cell.experiment.resources.workers,
            "per_worker": self.placement.per_worker,
            "scratch": self.scratch,
            "one_node": self.placement.nodes == 1,
        }

    def reported(self, identity: str, result: dict[str, Any]) -> None:
        """An evaluation of a running cell is known."""
        if self.owner.lost:
            raise SdditError(f"Another driver has taken sweep {self.job.name!r} over; this one stops.")
        row = self.progress.row(identity)
        if "eval/fid" in result:
            row.step, row.fid = int(result["step"]), float(result["eval/fid"])
            self.progress.say(row)

    def ended(self, config: dict[str, Any], state: str, result: dict[str, Any]) -> None:
        """A cell is over; the record says how."""
        row = self.progress.row(config["identity"])
        error = str(result.get("error") or "")
        if state == "failed":
            row.note = (error or row.note or "its process died").strip().splitlines()[-1]
        row.state = state
        self.record.end_cell(config["spec"]["run_id"], state, error=error or row.note, log_file=self.logs)
        self.progress.say(row)
        if self.job.flags.max_disk_gb is not None:
            self.slim(self.job.flags.max_disk_gb * GB)

    def crashed(self, identity: str, reason: str) -> None:
        """A cell's process ended with an exception, for the last time."""
        self.progress.row(identity).note = reason

    def slim(self, limit: float) -> None:
        """Keeps all checkpoints of the sweep under `limit` bytes: oldest done cells lose what going on needs."""
        stores = {row.identity: CheckpointStore(f"{self.job.storage}/{row.identity}") for row in self.progress.rows}
        total = sum(store.total_bytes() for store in stores.values())
        done = [row for row in self.progress.rows if row.state == "done"]
        for row in sorted(done, key=lambda row: row.started or 0.0):  # those of earlier commands first
            if total <= limit:
                return
            if freed := stores[row.identity].slim():
                total -= freed
                row.note = "slimmed: can be sampled, not extended"
                self.progress.say(row)


class Watcher(tune.Callback):
    """Tells the driver of results, and why a trial died."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; nothing restores them

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.driver.reported(trial.config["identity"], result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        text = (Path(trial.error_file).read_text() if trial.error_file else "").strip()
        self.driver.crashed(trial.config["identity"], text.splitlines()[-1] if text else "its process died")


def _row(planned: Planned, *, waiting: bool) -> Row:
    cell = planned.cell
    return Row(
        cell.label,
        cell.experiment.seed,
        cell.identity,
        "waiting" if waiting else planned.state,
        planned.step,
        cell.experiment.train.steps,
        planned.fid,
        planned.run_id,
    )


def _unique(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
