"""Runs the missing cells of a sweep through Ray Tune: hands them out, keeps the table and the record up to date."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.execution import class_cache
from rich.console import Console

from sddit import cost, results
from sddit.cell import CellSpec
from sddit.config import FRESH_SEED
from sddit.environment import source_digest
from sddit.errors import OutageError, SdditError, UsageError
from sddit.orchestration import cluster, plan, searcher, trial
from sddit.orchestration.forecast import Forecast
from sddit.orchestration.plan import Planned, Point
from sddit.orchestration.progress import Progress, Row, duration
from sddit.orchestration.speed import Speeds
from sddit.tracking import Owner, SweepRecord
from sddit.training.store import CheckpointStore

if TYPE_CHECKING:
    from sddit.orchestration.sweep import Job

GB = 1e9
KEEP_SECONDS = 60.0
# Tune would send the driver's AWS keys to the trials, in an environment that Ray writes into its logs. Without one of
# their own, the first trials also get the processes that Ray has started already.
class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = {}, set()


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
        self.limit = placement.concurrent  # cells at once; follows the cluster's size
        self.handed_out: set[str] = set()  # identities of cells that Tune has and that are not over
        self.missing, self.planned = list(missing), list(planned)
        self.taken = {plan.twin_key(p.cell) for p in planned}
        self.console = console
        self.stopping = False  # the budget is used: running cells stop after a checkpoint, and none is started
        self.stop_asked = False
        self.over_limit = False  # whether it was said that --max-disk-gb cannot be kept
        self.without_node = False  # Ray's process on this machine is gone, and Tune would wait for ever
        self.kept_spent = time.monotonic()  # when the device-hours were last kept in the record
        self.scratch = tempfile.mkdtemp(prefix="sddit-")  # Tune's and Train's own files, which nothing relies on
        rows = [_row(p, waiting=p in missing) for p in planned]
        self.progress = Progress(
            job.name, rows, record.read_steps, placement.concurrent, console, logs, self.tick, self.spent,
            job.flags.budget_hours, job.flags.price,
        )  # fmt: skip

    def fit(self, samples: int) -> None:
        """Runs `samples` cells.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        job, workers = self.job, self.job.base.resources.workers
        choices = {
            axis: list(dict.fromkeys([*values, *(p.point[axis] for p in job.cells if axis in p.point)]))
            for axis, values in job.chosen.items()
        }
        outcomes = self._outcomes() if job.searches or job.flags.asha else []
        going_on = {p.cell.identity for p in self.missing}
        study = searcher.build_study(
            job.space,
            choices,
            [o for o in outcomes if job.searches and o.identity not in going_on],
            [p.cell.point for p in self.missing],
            with_cost=job.flags.objective == "fid,cost",
            journal=job.journal if job.searches else None,
        )
        if workers == 1:
            trainable = tune.with_resources(trial.train_in_process, dict(self.placement.per_worker))
        else:
            # Any fraction of a CPU here would be missing from a worker and serialise the cells (ray.md §1).
            trainable = tune.with_resources(trial.train_on_workers, {"node:__internal_head__": 0.001})
        scheduler = None
        if job.flags.asha and not job.flags.confirm:  # fresh seeds that were stopped would be picked again
            every, steps = job.base.eval.every, job.base.train.steps
            self.console.print(searcher.describe_ladder(every, steps))
            if searcher.rungs(every, steps):
                scheduler = searcher.CellASHA(every, steps, outcomes)
        # Cells that wait for nodes make a cluster grow; how many there are, the searcher limits.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(samples)
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher.StudySearcher(
                    study,
                    lambda trial: searcher.ask(job.space, choices, trial),
                    self.propose,
                    self.ended,
                    closed=lambda: self.stopping or self.owner.lost,
                    limit=lambda: self.limit,
                ),
                scheduler=scheduler,
                num_samples=samples,
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
        except KeyboardInterrupt:
            for row in self.progress.rows:
                if row.identity in self.handed_out and row.run_id:
                    self.record.interrupt_cell(row.run_id)
            raise
        except tune.TuneError as error:  # around what our own part raised, such as an outage of the record
            if isinstance(error.__context__, SdditError):
                raise error.__context__ from None
            raise
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
        if self.owner.lost:
            raise SdditError(f"Another driver has taken sweep {job.name!r} over; this one stops.")
        self._keep_spent()

    def _outcomes(self) -> list[plan.Outcome]:
        recorded = results.load_cells(self.job.name, self.job.uri)
        table = results.load_results(self.job.name, self.job.uri, metrics=())
        return plan.outcomes(recorded[recorded["seed"] < FRESH_SEED], table, self.job.axes)

    def propose(self, point: Point) -> dict[str, Any] | None:
        """The configuration of a cell that Tune is to run next, its MLflow run opened; None if it is taken."""
        planned = next((p for p in self.missing if p.cell.point == point), None)
        if planned is not None:
            self.missing.remove(planned)
        else:
            try:
                planned = Planned(self.job.space.cell(point, seed=0))
            except UsageError as error:
                if (key := json.dumps(point, default=str)) not in self.taken:
                    self.console.print(f"Excluded: {plan.label_of(point)}: {str(error).splitlines()[0]}")
                self.taken.add(key)
                return None
            if plan.twin_key(planned.cell) in self.taken:
                return None
            self.taken.add(plan.twin_key(planned.cell))
            self.planned.append(planned)
            self.progress.rows.append(_row(planned, waiting=True))
        cell = planned.cell
        run_id = self.record.start_cell(
            cell.experiment,
            identity=cell.identity,
            data_digest=cell.manifest.digest,
            label=cell.run_label,
            run_id=planned.run_id,
            more_tags=cell.tags,
        )
        self.progress.row(cell.identity).run_id = run_id
        self.handed_out.add(cell.identity)
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
            "flops": cost.training_flops_per_image(cell.experiment, cell.manifest.shape)
            * cell.experiment.train.batch_size
            * cell.experiment.train.steps,
            "workers": cell.experiment.resources.workers,
            "per_worker": self.placement.per_worker,
            "scratch": self.scratch,
            "one_node": not os.environ.get("RAY_ADDRESS"),
            "source": source_digest() if os.environ.get("RAY_ADDRESS") else None,
        }

    def started(self, identity: str) -> None:
        """A cell has its place on the cluster: for the first time, or again after its node was lost."""
        row = self.progress.row(identity)
        if row.started is None:
            row.started, row.first_step = time.monotonic(), row.step
        row.state, row.note = "running", ""
        self.progress.say(row)

    def lost(self, identity: str, reason: str) -> None:
        """A cell's process or node is gone; Tune starts it again, where it goes on from its last checkpoint."""
        row = self.progress.row(identity)
        row.state, row.note = "waiting", f"starts again: {reason}"
        self.progress.say(row)

    def reported(self, identity: str, result: dict[str, Any]) -> None:
        """An evaluation of a running cell is known."""
        row = self.progress.row(identity)
        if "eval/fid" in result:
            row.step, row.fid = int(result["step"]), float(result["eval/fid"])
            self.progress.say(row)

    def ended(self, config: dict[str, Any], state: str, result: dict[str, Any]) -> None:
        """A cell is over; the record says how, unless it belongs to another driver by now."""
        row = self.progress.row(config["identity"])
        self.handed_out.discard(row.identity)
        error = str(result.get("error") or "")
        if state == "failed" and row.state == "waiting":
            state = "interrupted"  # its process did not come up: a node that went away just then
        if state == "failed" or error:
            row.note = (error or row.note or "its process died").strip().splitlines()[-1]
        row.state, row.ended = state, time.monotonic()
        row.step = max(row.step, int(result.get("step", 0)))
        if not self.owner.holds():
            return
        if state == "interrupted":
            self.record.interrupt_cell(config["spec"]["run_id"])
        else:
            self.record.end_cell(config["spec"]["run_id"], state, error=error or row.note, log_file=self.logs)
        self.progress.say(row)
        if self.job.flags.max_disk_gb is not None:
            with contextlib.suppress(OutageError):  # the next cell to end tries again
                self.slim(self.job.flags.max_disk_gb * GB)

    def spent(self) -> float:
        """Device-hours of the sweep over all starts; of a cell that runs or ran here, by the clock."""
        now, workers = time.monotonic(), self.job.base.resources.workers
        here = sum((row.ended or now) - row.started for row in self.progress.rows if row.started is not None)
        return self.job.spent + here * workers / 3600

    def tick(self) -> None:
        """Now and then: keeps what is spent, asks the running cells to stop when the budget is used, and counts the
        nodes."""
        budget = self.job.flags.budget_hours
        self.stopping = self.stopping or (budget is not None and self.spent() >= budget)
        if self.stopping and not self.stop_asked:
            self.owner.ask_to_stop()
            self.stop_asked = True
        if time.monotonic() - self.kept_spent > KEEP_SECONDS:
            self._keep_spent(seconds=0)  # an outage must not hold up what follows; it is kept a little later
        self.without_node = self.without_node or not cluster.has_this_node()
        # What is left of a cluster may be too small for one cell, which then waits for nodes.
        self.limit = self.progress.concurrent = max(1, self.placement.cells_on(cluster.alive()))

    def _keep_spent(self, seconds: float | None = None) -> None:
        self.kept_spent = time.monotonic()
        self.record.set_tags({"sddit.device_hours": f"{self.spent():.6g}"}, seconds=seconds)

    def learn(self, speeds: Speeds, expected: Forecast) -> None:
        """Sets the prediction beside what the cells took, and keeps their speed for the next plan."""
        planned = {p.cell.identity: p.cell for p in self.planned}
        rows = {row["identity"]: row for row in results.load_cells(self.job.name, self.job.uri).to_dict("records")}
        over = [r for r in self.progress.rows if r.started is not None and r.state == "done" and r.identity in planned]
        speeds.learn((planned[r.identity], rows[r.identity]) for r in over)
        pairs = [(expected.cells.get(r.identity), rows[r.identity], r) for r in over]
        known = [(p, plan.device_hours(row) * 3600 / expected.workers) for p, row, r in pairs if p and not r.first_step]
        if known:
            predicted, measured = (sum(values) * expected.workers for values in zip(*known, strict=True))
            self.console.print(
                f"Predicted {duration(predicted)} of device time for {len(known)} cells, measured "
                f"{duration(measured)}: {predicted / measured - 1:+.0%} off."
            )
            self.record.set_tags(
                {"sddit.prediction": json.dumps({"predicted_s": round(predicted, 1), "measured_s": round(measured, 1)})}
            )

    def crashed(self, identity: str, reason: str) -> None:
        """A cell's process ended with an exception, for the last time. `ended` came first and did not know it."""
        row = self.progress.row(identity)
        row.note = reason
        if row.state == "failed" and row.run_id and self.owner.holds():
            self.record.end_cell(row.run_id, "failed", error=reason, log_file=self.logs)

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
        if total > limit and not self.over_limit:
            self.over_limit = True
            self.console.print(
                f"--max-disk-gb {limit / GB:g} cannot be kept: checkpoints take {total / GB:.2g} GB, though all done "
                "cells are slimmed to what sampling needs."
            )


class Watcher(tune.Callback):
    """Tells the driver of results, and why a trial died."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; nothing restores them

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self.driver.without_node:
            raise SdditError(
                "Ray's own process on this machine (raylet) has died: was it killed, or is memory short? "
                f"See {self.driver.logs}. What was reached is kept; the same command goes on."
            )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.driver.started(trial.config["identity"])

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        trial.run_metadata.num_failures = 0  # losses count in a row: a long cell may meet many
        self.driver.reported(trial.config["identity"], result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.driver.lost(trial.config["identity"], _reason(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.driver.crashed(trial.config["identity"], _reason(trial))


def _reason(trial: Any) -> str:
    """The last line of what Tune wrote down of a trial's end."""
    text = (Path(trial.error_file).read_text() if trial.error_file else "").strip()
    return text.splitlines()[-1] if text else "its process died"


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
