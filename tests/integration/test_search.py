"""A search as a user runs it: budget, stops, kills, the study for Optuna's dashboard, fresh seeds, a Pareto front."""

import random
import time

import optuna
import pytest
from commands import Running, no_traceback, run, script
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tiny import experiment, set_flags

import sddit
from sddit import results
from sddit.config import FRESH_SEED

pytestmark = pytest.mark.slow
QUICK = {"eval__every": 2, "eval__samples": 40}


def search(*flags, cwd, name="search", **changes):
    tiny = QUICK | changes
    return [script(name), *set_flags(**tiny), *(() if "--steps" in flags else ("--steps", "12")), *flags]


def cells_of(folder, name="search"):
    return results.load_cells(name, f"sqlite:///{folder}/mlflow.db")


def journal(folder):
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "runs" / "search" / "study.journal")))
    return optuna.load_study(study_name="study", storage=storage)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.torture)])
def test_a_search_goes_on_after_a_kill_as_if_nothing_had_happened(seed, tmp_path):
    every, steps, draw = 20, 120, random.Random(seed)
    command = search("--trials", "8", "--steps", str(steps), cwd=tmp_path, eval__every=every)
    first = Running(*command, cwd=tmp_path)
    first.wait_for_step(every, cells=draw.randint(1, 4))
    time.sleep(draw.uniform(0, 1))
    first.kill()
    again = Running(*command, cwd=tmp_path)
    assert again.wait() == 0, again.output
    assert f"ASHA: at step {every} and {3 * every} of {steps}" in first.output
    cells = cells_of(tmp_path)
    assert len(cells) == 8 == cells["identity"].nunique(), "the budget counts over all starts, and no cell is twice"
    assert set(cells["state"]) <= {"done", "pruned"}
    assert set(cells[cells["state"] == "pruned"]["step"]) <= {every, 3 * every}, "stops are on rungs"
    study = journal(tmp_path)
    states = [t.state for t in study.trials if t.state is not TrialState.FAIL]
    assert len(states) == 8 and set(states) <= {TrialState.COMPLETE, TrialState.PRUNED}, "no zombie"
    base = sddit.presets.digits()
    assert cells.iloc[0]["params"]["method.tau_student"] == base.method.tau_student, "the paper's values come first"

    # A recorded cell is what training it alone gives.
    row = cells[cells["state"] == "done"].iloc[-1]
    changes = {k: v for k, v in row["params"].items() if k.startswith(("method.", "model.size")) and k != "method.name"}
    changes |= {"train.steps": steps, "eval.samples": 40, "eval.every": every}
    alone = experiment(**{k.replace(".", "__"): v for k, v in changes.items()})
    assert alone.identity(row["params"]["data.digest"]) == row["identity"]
    result = sddit.train(alone, tracking_uri=f"sqlite:///{tmp_path}/alone.db", storage=tmp_path / "alone")
    assert result.metrics["eval/fid"] == row["metrics"]["eval/fid"]

    # Stopped cells count while ASHA is on, and go on without it.
    stopped = cells[cells["state"] == "pruned"]["identity"]
    settled = run(*command, cwd=tmp_path)
    assert "nothing to run" in no_traceback(settled)
    if len(stopped):
        whole = run(*command, "--no-asha", cwd=tmp_path)
        assert whole.returncode == 0, whole.stdout + whole.stderr
        assert set(cells_of(tmp_path)["state"]) == {"done"}


def test_two_objectives_give_a_front(tmp_path):
    done = run(*search("--trials", "4", "--objective", "fid,cost", "--no-asha", cwd=tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    study = journal(tmp_path)
    assert len(study.directions) == 2 and study.best_trials
    assert all(t.values[1] > 1e6 for t in study.trials if t.state is TrialState.COMPLETE)
    for kind in ("png", "pdf", "csv"):
        assert (tmp_path / "figures" / f"search.{kind}").exists()
    refused = run(*search("--trials", "4", "--objective", "fid,cost", "--asha", cwd=tmp_path), cwd=tmp_path)
    assert refused.returncode == 2 and "--no-asha" in refused.stderr


def test_fresh_seeds_confirm_what_was_picked(tmp_path):
    def command(*flags):
        chosen = search(*flags, cwd=tmp_path, name="mask_ratio", method__mask_ratio="[0.2, 0.5]")
        return run(*chosen, cwd=tmp_path)

    early = command("--confirm", "2")
    assert early.returncode == 2 and "cells are missing" in early.stderr
    done = command()
    assert "lucky draw. --confirm 3" in done.stdout
    confirmed = command("--confirm", "2")
    assert confirmed.returncode == 0, confirmed.stdout + confirmed.stderr
    assert "With fresh seeds, which did not pick it:" in confirmed.stdout and "over 2 seeds" in confirmed.stdout
    cells = cells_of(tmp_path, "mask_ratio")
    fresh = cells[cells["seed"] >= FRESH_SEED]
    assert len(cells) == 4 and len(fresh) == 2
    picked = cells[cells["seed"] == 0].set_index("run_id")["metrics"].map(lambda m: m["eval/fid"]).idxmin()
    ratio = cells.set_index("run_id").loc[picked, "params"]["method.mask_ratio"]
    assert {p["method.mask_ratio"] for p in fresh["params"]} == {ratio}
    again = command()
    assert "all 2 cells are done" in again.stdout


def test_status_from_another_shell(tmp_path):
    command = search(cwd=tmp_path, name="mask_ratio", method__mask_ratio="[0.2, 0.5]", train__log_every=1)
    running = Running(*command, "--steps", "400", cwd=tmp_path)
    running.wait_for_step(2)
    status = run("-m", "sddit", "status", "mask_ratio", cwd=tmp_path)
    assert status.returncode == 0 and "driven by process" in no_traceback(status)
    assert "mask_ratio=0.2" in status.stdout and "/400" in status.stdout and "running" in status.stdout
    running.kill()
    missing = run("-m", "sddit", "status", "mask_ratios", cwd=tmp_path)
    assert missing.returncode == 2 and "mask_ratio" in no_traceback(missing)
