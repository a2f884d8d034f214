"""Grid and TPE through one study, rebuilt from the record: nothing twice, nothing lost, states told as they are."""

import math

from optuna.trial import TrialState
from ray.tune.search import Searcher

from sddit.orchestration.plan import Outcome
from sddit.orchestration.searcher import Space, StudySearcher, build_study

AXIS = "method.mask_ratio"
GRID = Space({AXIS: [0.0, 0.2, 0.5]})
RANGE = Space({AXIS: [0.0]}, suggest=lambda trial: {AXIS: trial.suggest_float(AXIS, 0.0, 0.8, step=0.05)})


def searcher(space, outcomes=(), missing=(), taken=()):
    study = build_study(space, outcomes, missing, seed=0)
    handed, over, taken = [], [], set(taken)

    def propose(values):
        if values[AXIS] in taken:
            return None
        taken.add(values[AXIS])
        handed.append(values[AXIS])
        return {"values": values, "steps": 600}

    return StudySearcher(study, space, propose, lambda config, state, result: over.append(state)), handed, over


def result(step, fid):
    return {"step": step, "eval/fid": fid}


def test_a_grid_is_handed_out_in_order_and_ends():
    search, handed, _ = searcher(GRID, missing=[{AXIS: 0.0}, {AXIS: 0.2}, {AXIS: 0.5}])
    configs = [search.suggest(f"t{i}") for i in range(3)]
    assert handed == [0.0, 0.2, 0.5] and all(c["steps"] == 600 for c in configs)
    assert search.suggest("t3") == Searcher.FINISHED, "every choice is taken"


def test_states():
    search, _, over = searcher(GRID, missing=[{AXIS: 0.0}, {AXIS: 0.2}, {AXIS: 0.5}])
    for name in ("done", "pruned", "failed"):
        search.suggest(name)
    search.on_trial_result("done", result(200, 90.0))
    search.on_trial_result("pruned", result(200, 95.0))
    search.on_trial_complete("done", result(600, 20.0))
    search.on_trial_complete("pruned", result(200, 95.0))
    search.on_trial_complete("failed", {"error": "diverged"})
    search.on_trial_complete("unknown", error=True)
    assert over == ["done", "pruned", "failed"]
    trials = search.study.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert trials[0].value == 20.0 and trials[0].intermediate_values == {200: 90.0}
    assert trials[1].value == 95.0


def test_a_result_that_is_not_a_number_is_told_as_very_bad():
    search, _, over = searcher(GRID, missing=[{AXIS: 0.0}])
    search.suggest("a")
    search.on_trial_complete("a", result(600, math.nan))
    assert over == ["done"] and search.study.trials[0].value > 1e20


def test_the_study_is_rebuilt_from_the_record():
    outcomes = [
        Outcome({AXIS: 0.1}, "done", {200: 90.0, 600: 20.0}),
        Outcome({AXIS: 0.5}, "pruned", {200: 95.0}),
        Outcome({AXIS: 0.3}, "done", {}),
    ]
    study = build_study(RANGE, outcomes, [{AXIS: 0.7}], seed=0)
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING]
    assert study.best_value == 20.0 and study.best_params == {AXIS: 0.1}
    assert RANGE.ask(study.ask()) == {AXIS: 0.7}, "what is missing comes first"


def test_tpe_never_suggests_a_cell_twice_also_after_a_restart():
    search, handed, _ = searcher(RANGE)
    for i in range(8):
        search.suggest(f"t{i}")
        search.on_trial_complete(f"t{i}", result(600, 20 + abs(handed[-1] - 0.3)))
    assert len(set(handed)) == 8
    known = [Outcome({AXIS: v}, "done", {600: 20 + abs(v - 0.3)}) for v in handed]
    again, more, _ = searcher(RANGE, outcomes=known, taken=handed)
    for i in range(4):
        again.suggest(f"u{i}")
    assert not set(more) & set(handed) and len(set(more)) == 4


def test_an_exhausted_space_ends():
    search, handed, _ = searcher(GRID, taken=[0.0, 0.2, 0.5])
    assert search.suggest("x") == Searcher.FINISHED and handed == []
