"""Optuna decides which cell comes next, for grids (enqueued points) and TPE alike, inside Ray Tune.

The study is built anew from MLflow at every start and may be thrown away (ray.md §0.4).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from sddit.orchestration.plan import Outcome, Point, Space

OBJECTIVE = "eval/fid"
ATTEMPTS = 100  # suggestions in a row that are cells already asked for, before the space counts as exhausted
REDUCTION = 3  # of ASHA: one in three goes on at a rung


def ask(space: Space, choices: Mapping[str, Sequence[Any]], trial: optuna.Trial) -> Point:
    """The point of a trial: what the space suggests, or a choice among the values of each axis."""
    if space.suggest is not None:
        space.suggest(trial)
        return dict(trial.params)
    return {axis: trial.suggest_categorical(axis, values) for axis, values in choices.items()}


def build_study(
    space: Space,
    choices: Mapping[str, Sequence[Any]],
    outcomes: Iterable[Outcome],
    waiting: Iterable[Point],
    *,
    with_cost: bool = False,
    journal: Path | None = None,
) -> optuna.Study:
    """A study that knows every finished and stopped cell, with the points that wait in its queue.

    The sampler's seed depends on how much is known, so a suggestion is rarely repeated after a restart.

    Args:
        choices: values of each axis, those of recorded cells included.
        with_cost: minimise FID and training FLOPs together.
        journal: where to write the study, for Optuna's dashboard; what was there is replaced.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`, and names of the objectives
    outcomes = [o for o in outcomes if o.fid and o.state in ("done", "pruned")]
    digest = hashlib.blake2b(str(len(outcomes)).encode(), digest_size=4).digest()
    sampler = optuna.samplers.TPESampler(
        seed=int.from_bytes(digest, "little"),
        multivariate=True,
        group=True,
        constant_liar=True,
    )
    storage = None
    if journal:
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.unlink(missing_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(
        directions=["minimize"] * (2 if with_cost else 1), sampler=sampler, storage=storage, study_name="study"
    )
    study.set_metric_names(["FID", "training FLOPs"][: 2 if with_cost else 1])
    for outcome in outcomes:
        study.enqueue_trial(outcome.point)
        trial = study.ask()  # goes through the space, so that the distributions are those of this start
        ask(space, choices, trial)
        trial.set_user_attr("identity", outcome.identity)
        if not with_cost:  # Optuna keeps no values by step of a trial with several objectives
            for step, fid in sorted(outcome.fid.items()):
                trial.report(_finite(fid), step)
        if outcome.state == "done":
            study.tell(trial, _values(outcome.fid[max(outcome.fid)], outcome.flops, with_cost))
        else:
            study.tell(trial, state=TrialState.PRUNED)
    for point in waiting:
        study.enqueue_trial(dict(point))
    return study


class StudySearcher(Searcher):
    """Hands Tune one cell after the other from a study, and tells the study what became of each.

    Args:
        ask: the point of a trial.
        propose: the configuration for a point, or None when that cell is known or taken already.
        ended: called with (config, state, result) when a trial is over; state is 'done', 'pruned', 'failed', or
            'interrupted' for one that was asked to stop and left a checkpoint.
        closed: whether nothing new is to be started.
        limit: how many cells may be handed out at once. It is asked each time, since a cluster grows and shrinks.
    """

    def __init__(
        self,
        study: optuna.Study,
        ask: Callable[[optuna.Trial], Point],
        propose: Callable[[Point], dict[str, Any] | None],
        ended: Callable[[dict[str, Any], str, dict[str, Any]], None],
        closed: Callable[[], bool] = lambda: False,
        limit: Callable[[], float] = lambda: math.inf,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self.limit = limit
        self.study, self.ask, self.propose, self.ended, self.closed = study, ask, propose, ended, closed
        self.with_cost = len(study.directions) > 1
        self.open: dict[str, tuple[optuna.Trial, dict[str, Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher; the study follows from MLflow

    def suggest(self, trial_id: str) -> Any:
        if len(self.open) >= self.limit() and not self.closed():
            return None  # Tune asks again
        for _ in range(0 if self.closed() else ATTEMPTS):
            trial = self.study.ask()
            config = self.propose(self.ask(trial))
            if config is not None:
                trial.set_user_attr("identity", config["identity"])
                self.open[trial_id] = (trial, config)
                return config
            self.study.tell(trial, state=TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self.open and OBJECTIVE in result and not self.with_cost:
            self.open[trial_id][0].report(_finite(result[OBJECTIVE]), int(result["step"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self.open:
            return
        trial, config = self.open.pop(trial_id)
        result = result or {}
        values = None
        if result.get("interrupted"):
            state, told = "interrupted", TrialState.FAIL
        elif error or result.get("error") or OBJECTIVE not in result:
            state, told = "failed", TrialState.FAIL
        elif result["step"] >= config["steps"]:
            state, told = "done", TrialState.COMPLETE
            values = _values(result[OBJECTIVE], config["flops"], self.with_cost)
        else:
            state, told = "pruned", TrialState.PRUNED
            if not self.with_cost:  # Tune does not tell of the result that stops a trial
                trial.report(_finite(result[OBJECTIVE]), int(result["step"]))
        self.study.tell(trial, values, state=told)
        self.ended(config, state, result)

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


# ------------------------------------------------------------------------------------------------------ early stopping


def rungs(every: int, steps: int) -> list[int]:
    """The steps at which ASHA may stop a cell: evaluation steps, a factor apart, before the last."""
    ladder = [every]
    while ladder[-1] * REDUCTION < steps:
        ladder.append(ladder[-1] * REDUCTION)
    return [step for step in ladder if step < steps]


def describe_ladder(every: int, steps: int) -> str:
    """The stopping rule in a sentence, before it acts."""
    ladder = rungs(every, steps)
    if not ladder:
        return f"ASHA: the first evaluation is the last step ({steps:,}), so no cell can be stopped early."
    places = " and ".join(f"{step:,}" for step in ladder)
    return (
        f"ASHA: at step {places} of {steps:,} a cell goes on only while its FID is among the best third of those seen "
        "at that step, recorded cells included; the first to come always goes on."
    )


class CellASHA(ASHAScheduler):
    """Tune's ASHA on FID by optimiser step, its trials known by their cells' identities: so its rungs can be filled
    from the record, and a cell that goes on after a kill is not judged twice at one rung. An evaluation that was
    recorded but not reported when the kill came is in the rung without having been judged."""

    def __init__(self, every: int, steps: int, outcomes: Iterable[Outcome]) -> None:
        super().__init__(
            time_attr="step", metric=OBJECTIVE, mode="min", max_t=steps, grace_period=every, reduction_factor=REDUCTION
        )
        self.steps = steps
        for outcome in outcomes:
            trial: Any = SimpleNamespace(config={"identity": outcome.identity})
            self.on_trial_add(None, trial)
            for step, fid in sorted(outcome.fid.items()):
                self.on_trial_result(None, trial, {"step": step, OBJECTIVE: fid})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _as_cell(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("step", 0) >= self.steps:  # a cell ends by itself, after its record and checkpoints
            return self.CONTINUE
        if OBJECTIVE in result:
            result = {**result, OBJECTIVE: _finite(result[OBJECTIVE])}
        return super().on_trial_result(tune_controller, _as_cell(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if result.get("step", 0) < self.steps:
            super().on_trial_complete(tune_controller, _as_cell(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _as_cell(trial))


def _as_cell(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["identity"])


def _values(fid: float, flops: float, with_cost: bool) -> list[float]:
    return [_finite(fid), flops] if with_cost else [_finite(fid)]


def _finite(value: float) -> float:
    """Optuna refuses NaN; a cell that gives it is as bad as can be."""
    return value if math.isfinite(value) else 1e30
