"""Grid and TPE through one study, rebuilt from the record: nothing twice, nothing lost, states told as they are."""

import math
from types import SimpleNamespace

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher

from sddit.orchestration.plan import Outcome, Space
from sddit.orchestration.searcher import CellASHA, StudySearcher, ask, build_study, describe_ladder, rungs
from sweeps.search import sweep as search_sweep

AXIS = "method.mask_ratio"
CHOICES = {AXIS: [0.0, 0.2, 0.5]}
GRID = Space("digits", "sddit", {}, CHOICES)
RANGE = Space("digits", "sddit", {}, {}, suggest=lambda trial: {AXIS: trial.suggest_float(AXIS, 0.0, 0.8, step=0.05)})


def searcher(space, outcomes=(), waiting=(), taken=(), **options):
    study = build_study(space, CHOICES, outcomes, waiting, **options)
    handed, over, taken = [], [], set(taken)

    def propose(point):
        if point[AXIS] in taken:
            return None
        taken.add(point[AXIS])
        handed.append(point[AXIS])
        return {"identity": f"cell-{point[AXIS]}", "steps": 600, "flops": 1e9 * (1 + point[AXIS])}

    def asked(trial):
        return ask(space, CHOICES, trial)

    return StudySearcher(study, asked, propose, lambda config, state, result: over.append(state)), handed, over


def result(step, fid):
    return {"step": step, "eval/fid": fid}


WAITING = [{AXIS: 0.0}, {AXIS: 0.2}, {AXIS: 0.5}]


def test_a_grid_is_handed_out_in_order_and_ends():
    search, handed, _ = searcher(GRID, waiting=WAITING)
    configs = [search.suggest(f"t{i}") for i in range(3)]
    assert handed == [0.0, 0.2, 0.5] and all(c["steps"] == 600 for c in configs)
    assert search.suggest("t3") == Searcher.FINISHED, "every choice is taken"


def test_as_many_cells_are_handed_out_as_the_cluster_holds_by_then():
    search, handed, over = searcher(GRID, waiting=WAITING)
    search.limit = lambda: 1
    first = search.suggest("t0")
    assert first and search.suggest("t1") is None and handed == [0.0], "Tune asks again"
    search.limit = lambda: 2  # a node has come
    assert search.suggest("t1") and search.suggest("t2") is None
    search.on_trial_complete("t0", result(600, 5.0))
    assert search.suggest("t2") and handed == [0.0, 0.2, 0.5] and over == ["done"]
    search.closed = lambda: True
    assert search.suggest("t3") == Searcher.FINISHED, "also while as many run as fit"


def test_states():
    search, _, over = searcher(Space("digits", "sddit", {}, CHOICES), waiting=[*WAITING, {AXIS: 0.3}][:3])
    for name in ("done", "pruned", "failed"):
        search.suggest(name)
    search.on_trial_result("done", result(200, 90.0))
    search.on_trial_complete("done", result(600, 20.0))
    search.on_trial_complete("pruned", result(200, 95.0))
    search.on_trial_complete("failed", {"error": "diverged"})
    search.on_trial_complete("unknown", error=True)
    assert over == ["done", "pruned", "failed"]
    trials = search.study.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert trials[0].value == 20.0 and trials[0].intermediate_values == {200: 90.0}
    assert trials[1].value == 95.0, "of the very result that stopped it, which Tune does not pass on"
    assert trials[0].user_attrs["identity"] == "cell-0.0"


def test_a_cell_asked_to_stop_is_neither_done_nor_failed_and_nothing_follows():
    search, handed, over = searcher(GRID, waiting=WAITING)
    search.suggest("a")
    search.closed = lambda: True
    search.on_trial_complete("a", {"step": 123, "interrupted": True})
    assert over == ["interrupted"] and search.study.trials[0].state is TrialState.FAIL
    assert search.suggest("b") == Searcher.FINISHED and handed == [0.0]


def test_a_result_that_is_not_a_number_is_told_as_very_bad():
    search, _, over = searcher(GRID, waiting=[{AXIS: 0.0}])
    search.suggest("a")
    search.on_trial_complete("a", result(600, math.nan))
    assert over == ["done"] and search.study.trials[0].value > 1e20


OUTCOMES = [
    Outcome({AXIS: 0.1}, "done", {200: 90.0, 600: 20.0}, 2e9, "a"),
    Outcome({AXIS: 0.5}, "pruned", {200: 95.0}, 1e9, "b"),
    Outcome({AXIS: 0.3}, "done", {}, 1e9, "c"),
    Outcome({AXIS: 0.6}, "running", {200: 80.0}, 1e9, "d"),
]


def test_the_study_is_rebuilt_from_the_record():
    study = build_study(RANGE, {}, OUTCOMES, [{AXIS: 0.7}])
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING]
    assert study.best_value == 20.0 and study.best_params == {AXIS: 0.1}
    assert ask(RANGE, {}, study.ask()) == {AXIS: 0.7}, "what is missing comes first"


def test_the_study_as_a_journal_has_no_trial_of_a_killed_start(tmp_path):
    journal = tmp_path / "runs" / "study.journal"
    for _ in range(2):
        build_study(RANGE, {}, OUTCOMES, [{AXIS: 0.7}], journal=journal).ask()  # and then it is killed
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    loaded = optuna.load_study(study_name="study", storage=storage)
    states = [t.state for t in loaded.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING]
    assert loaded.trials[0].intermediate_values == {200: 90.0, 600: 20.0}


def test_two_objectives():
    search, _, over = searcher(RANGE, outcomes=OUTCOMES, with_cost=True)
    assert [t.values for t in search.study.trials] == [[20.0, 2e9], None]
    config = search.suggest("x")
    search.on_trial_result("x", result(200, 50.0))
    search.on_trial_complete("x", result(600, 10.0))
    assert over == ["done"] and search.study.trials[-1].values == [10.0, config["flops"]]
    assert {t.values[0] for t in search.study.best_trials} <= {10.0, 20.0}


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


def test_the_space_of_the_search_is_conditional_and_its_points_give_their_cells_back():
    from sddit import presets

    space = Space("digits", "sddit", {}, {}, suggest=search_sweep.suggest, fields=search_sweep.fields)
    waiting = search_sweep.first(presets.digits())
    study = build_study(space, {}, [], waiting)
    seen = []
    for _ in range(30):
        trial = study.ask()
        point = ask(space, {}, trial)
        cell = space.cell(point, 0)
        assert set(cell.values) <= set(search_sweep.fields)
        assert ("method.tau_student" in point) == point["discriminates"]
        assert ("method.teacher_sigma" in point) == (point.get("teacher_noise") == "fixed")
        assert space.cell(dict(trial.params), 0).identity == cell.identity
        study.tell(trial, [float(len(seen))])
        seen.append(cell)
    base = presets.digits()
    assert seen[0].identity == base.identity(seen[0].manifest.digest), "the paper's values come first"
    assert [c.experiment.method.mask_ratio for c in seen[:3]] == [0.2, 0.0, 0.5]
    assert {c.experiment.method.lambda_d > 0 for c in seen} == {True, False}


# ------------------------------------------------------------------------------------------------------ early stopping


def test_the_ladder_stands_on_evaluations():
    assert rungs(200, 600) == [200]
    assert rungs(50, 600) == [50, 150, 450]
    assert rungs(600, 600) == [] and "no cell can be stopped" in describe_ladder(600, 600)
    assert "step 50 and 150 and 450 of 600" in describe_ladder(50, 600) and "best third" in describe_ladder(50, 600)


def stop(scheduler, identity, step, fid):
    trial = SimpleNamespace(config={"identity": identity}, trial_id=f"tune-{identity}-{step}")
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, result(step, fid)) == scheduler.STOP


@pytest.mark.parametrize("known", [True, False])
def test_rungs_are_filled_from_the_record(known):
    recorded = [Outcome({}, "done", {200: fid}, identity=f"c{fid}") for fid in (10.0, 20.0, 30.0)]
    scheduler = CellASHA(200, 1800, recorded if known else [])
    assert stop(scheduler, "new", 200, 25.0) == known, "only the first to come goes on without being compared"
    assert not stop(scheduler, "better", 200, 5.0)
    assert stop(scheduler, "broken", 200, math.nan), "not a number is as bad as can be"


def test_a_cell_that_goes_on_is_not_judged_twice_at_a_rung():
    scheduler = CellASHA(200, 1800, [Outcome({}, "running", {200: fid}, identity=f"c{fid}") for fid in (10, 20, 30)])
    assert not stop(scheduler, "c30", 400, 29.0), "it passed the rung at 200 before the kill"
    assert stop(scheduler, "new", 200, 29.0)


def test_the_last_step_is_never_a_stop():
    scheduler = CellASHA(200, 600, [Outcome({}, "done", {200: 1.0, 600: 1.0}, identity=str(i)) for i in range(9)])
    assert not stop(scheduler, "slow", 600, 99.0)
