"""Optuna decides which cell comes next, for grids (enqueued points) and TPE alike, inside Ray Tune.

The study is built anew from MLflow at every start and may be thrown away (ray.md §0.4).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from sddit.orchestration.plan import Outcome

OBJECTIVE = "eval/fid"
ATTEMPTS = 100  # suggestions in a row that are cells already asked for, before the space counts as exhausted


@dataclass(frozen=True)
class Space:
    """Named axes with their choices, plus an optional define-by-run function for suggestions beyond a grid."""

    choices: dict[str, list[Any]]
    suggest: Callable[[optuna.Trial], dict[str, Any]] | None = None

    def ask(self, trial: optuna.Trial) -> dict[str, Any]:
        """Axis values of a trial."""
        if self.suggest is not None:
            return self.suggest(trial)
        return {name: trial.suggest_categorical(name, choices) for name, choices in self.choices.items()}


def build_study(
    space: Space, outcomes: Iterable[Outcome], missing: Iterable[Mapping[str, Any]], seed: int
) -> optuna.Study:
    """A study that knows every finished and stopped cell, with the missing grid cells in its queue.

    The sampler's seed depends on how much is known, so a suggestion is not repeated after a restart.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    outcomes = [o for o in outcomes if o.fid]
    digest = hashlib.blake2b(f"{seed}/{len(outcomes)}".encode(), digest_size=4).digest()
    sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest, "little"), constant_liar=True)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for outcome in outcomes:
        study.enqueue_trial(outcome.values)
        trial = study.ask()  # goes through the space, so that the distributions are those of this start
        space.ask(trial)
        for step, fid in sorted(outcome.fid.items()):
            trial.report(fid, step)
        if outcome.state == "done":
            study.tell(trial, outcome.fid[max(outcome.fid)])
        else:
            study.tell(trial, state=TrialState.PRUNED)
    for values in missing:
        study.enqueue_trial(dict(values))
    return study


class StudySearcher(Searcher):
    """Hands Tune one cell after the other from a study, and tells the study what became of each.

    Args:
        propose: the configuration for a trial's axis values, or None when that cell is known or taken already.
        ended: called with (config, state, result) when a trial is over; state is 'done', 'pruned' or 'failed'.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        propose: Callable[[dict[str, Any]], dict[str, Any] | None],
        ended: Callable[[dict[str, Any], str, dict[str, Any]], None],
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self.study, self.space, self.propose, self.ended = study, space, propose, ended
        self.open: dict[str, tuple[optuna.Trial, dict[str, Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher; the study follows from MLflow

    def suggest(self, trial_id: str) -> Any:
        for _ in range(ATTEMPTS):
            trial = self.study.ask()
            config = self.propose(self.space.ask(trial))
            if config is not None:
                self.open[trial_id] = (trial, config)
                return config
            self.study.tell(trial, state=TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self.open and OBJECTIVE in result:
            self.open[trial_id][0].report(_finite(result[OBJECTIVE]), int(result["step"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self.open:
            return
        trial, config = self.open.pop(trial_id)
        result = result or {}
        if error or result.get("error") or OBJECTIVE not in result:
            state, told = "failed", TrialState.FAIL
        elif result["step"] >= config["steps"]:
            state, told = "done", TrialState.COMPLETE
        else:
            state, told = "pruned", TrialState.PRUNED
        value = _finite(result[OBJECTIVE]) if told is TrialState.COMPLETE else None
        self.study.tell(trial, value, state=told)
        self.ended(config, state, result)

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


def _finite(value: float) -> float:
    """Optuna refuses NaN; a cell that gives it is as bad as can be."""
    return value if math.isfinite(value) else 1e30
