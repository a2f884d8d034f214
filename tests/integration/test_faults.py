"""Whatever happens to a sweep, the same command finishes it, and the result is that of an undisturbed one."""

import contextlib
import random
import sqlite3
import time

import pandas as pd
import psutil
import pytest
from commands import MASK_RATIO, Running, no_traceback, sweep
from tiny import set_flags

import sddit
from sddit import results

pytestmark = pytest.mark.slow

# Long enough to be hit in the middle: some ten seconds of training a cell.
LONG = {"eval__every": 40, "train__log_every": 5, "eval__samples": 200, "method__mask_ratio": "[0.2, 0.5]"}
STEPS = ["--steps", "160"]
UNREPRODUCIBLE = ["train/images_per_s", "train/data_wait", "cost/device_hours", "run_id", "code"]


def command(*extra, **changes):
    return [MASK_RATIO, *set_flags(**LONG | changes), *STEPS, *extra]


def table(folder, name="mask_ratio"):
    frame = sddit.load_results(name, f"sqlite:///{folder}/mlflow.db")
    return frame.drop(columns=UNREPRODUCIBLE).sort_values(["identity", "step"]).reset_index(drop=True)


def points(folder):
    """Every recorded point: nothing may be in it twice, whatever reads it."""
    with sqlite3.connect(f"file:{folder}/mlflow.db?mode=ro", uri=True) as database:
        rows = database.execute("SELECT run_uuid, key, step, value FROM metrics").fetchall()
    keys = [row[:3] for row in rows]
    assert len(keys) == len(set(keys)), "a point twice"
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    running = Running(*command(), cwd=folder)
    assert running.wait() == 0, running.output
    return table(folder), points(folder)


def assert_as_undisturbed(folder, undisturbed):
    expected, expected_points = undisturbed
    pd.testing.assert_frame_equal(table(folder), expected)
    losses = {(k, s, v) for _, k, s, v in points(folder) if k.startswith(("train/loss", "train/inf", "eval/"))}
    assert losses == {(k, s, v) for _, k, s, v in expected_points if k.startswith(("train/loss", "train/inf", "eval/"))}
    assert len(points(folder)) == len(expected_points)
    for run in (folder / "mlruns" / "mask_ratio").glob("*/artifacts/images"):
        steps = [int(p.name.split("+")[2]) for p in run.glob("*.png")]
        assert sorted(steps) == [0, 40, 80, 120, 160], "each grid once"


@pytest.mark.parametrize("after", [40, pytest.param(120, marks=pytest.mark.torture)])
def test_the_driver_is_killed(after, undisturbed, tmp_path):
    running = Running(*command(), cwd=tmp_path)
    running.wait_for_step(after)
    running.kill()
    again = Running(*command(), cwd=tmp_path)
    assert again.wait() == 0, again.output
    tags = results.load_cells("mask_ratio", f"sqlite:///{tmp_path}/mlflow.db")["tags"]
    continued = [int(each["sddit.continued_from"]) for each in tags if "sddit.continued_from" in each]
    assert max(continued, default=0) >= after, "it goes on from a checkpoint"
    assert_as_undisturbed(tmp_path, undisturbed)


# Seeds of random moments and victims.
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.torture) for seed in range(1, 20))])
def test_a_kill_at_a_random_moment_changes_nothing(seed, undisturbed, tmp_path):
    draw = random.Random(seed)
    running = Running(*command(), cwd=tmp_path)
    victim = ("driver", "worker", "everything")[seed % 3]
    if victim == "worker":
        running.wait_for_step(0)
    time.sleep(draw.uniform(0, 25))
    if running.process.poll() is None:
        victims = {"driver": [], "worker": running.family("ray::ImplicitFunc")[:1], "everything": running.family()}
        for process in victims[victim]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if victim == "worker":
            assert running.wait() == 0, running.output
        else:
            running.kill()
    again = Running(*command(), cwd=tmp_path)
    assert again.wait() == 0, f"{victim}\n{running.output}\n{again.output}"
    assert_as_undisturbed(tmp_path, undisturbed)


def test_a_budget_stops_softly_and_a_larger_one_goes_on(undisturbed, tmp_path):
    running = Running(*command("--budget-hours", "0.001", "--price", "2"), cwd=tmp_path)
    assert running.wait() == 0, running.output
    assert "Budget used: 0.0" in running.output and "of 0.001 device-hours" in running.output
    assert "With a larger budget this goes on:" in no_traceback(running.output)
    assert "--budget-hours 0.002" in running.output
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cells = results.load_cells("mask_ratio", uri)
    assert set(cells["state"]) == {"running"} and (cells["step"] < 160).all()
    assert cells["tags"].map(lambda tags: float(tags["sddit.device_hours"]) > 0).any()
    stored = [int(p.name.removeprefix("step-")) for p in (tmp_path / "runs").glob("*/*/step-*")]
    assert any(step % 40 for step in stored), "it stopped between evaluations, after a checkpoint"
    spent = Running(*command("--budget-hours", "0.001"), cwd=tmp_path)
    assert spent.wait() == 0 and "Budget used" in spent.output and "Concurrency" not in spent.output
    again = Running(*command("--budget-hours", "1"), cwd=tmp_path)
    assert again.wait() == 0, again.output
    assert_as_undisturbed(tmp_path, undisturbed)


def test_ctrl_c_ends_within_seconds_and_says_how_to_go_on(undisturbed, tmp_path):
    running = Running(*command(), cwd=tmp_path)
    running.wait_for_step(40)
    begun = time.monotonic()
    running.interrupt()
    assert running.wait(60) == 130, running.output
    assert time.monotonic() - begun < 30
    output = no_traceback(running.output)
    assert "Interrupted" in output and f"{MASK_RATIO} --set" in output
    parent = results.load_sweep("mask_ratio", f"sqlite:///{tmp_path}/mlflow.db")
    assert parent.tags["sddit.owner"] == "null", "the sweep is free for the next command"
    again = Running(*command(), cwd=tmp_path)
    assert again.wait() == 0, again.output
    assert_as_undisturbed(tmp_path, undisturbed)


def test_when_ray_itself_dies_the_command_says_so_and_goes_on_when_run_again(undisturbed, tmp_path):
    running = Running(*command(), cwd=tmp_path)
    running.wait_for_step(40)
    trials = running.family("ray::ImplicitFunc")
    for trial in trials:
        trial.suspend()  # they could be done before they learn of it
    running.family("raylet")[0].kill()
    assert running.wait(120) == 1, running.output
    for trial in trials:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have been woken and have ended by itself
            trial.kill()
    assert "(raylet) has died" in no_traceback(running.output) and "the same command goes on" in running.output
    again = Running(*command(), cwd=tmp_path)
    assert again.wait() == 0, again.output
    assert_as_undisturbed(tmp_path, undisturbed)


# The first of Ray's agents takes longer than its raylet waits.
SLOW_ONCE = """
import os, sys, time
if any(part.endswith("dashboard/agent.py") for part in sys.orig_argv) and not os.path.exists(os.environ["SLOW_ONCE"]):
    open(os.environ["SLOW_ONCE"], "w").close()
    time.sleep(60)
"""


def test_where_ray_does_not_come_up_in_time_it_is_started_once_more(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_ONCE)
    seen = tmp_path / "seen"
    done = sweep(cwd=tmp_path, ratios="[0.2]", PYTHONPATH=str(tmp_path), SLOW_ONCE=str(seen))
    assert done.returncode == 0 and seen.exists(), done.stdout + done.stderr
    no_traceback(done)


def test_two_sweeps_at_once_lose_nothing_and_one_name_has_one_driver(undisturbed, tmp_path):
    first = Running(*command(), cwd=tmp_path)
    second = Running(*command("--name", "other"), cwd=tmp_path)
    first.wait_for("Concurrency")
    refused = sweep(*STEPS, cwd=tmp_path, tiny=LONG)
    assert refused.returncode == 2 and "is being run by process" in no_traceback(refused)
    assert first.wait() == 0 and second.wait() == 0, first.output + second.output
    expected, _ = undisturbed
    pd.testing.assert_frame_equal(table(tmp_path), expected)
    pd.testing.assert_frame_equal(table(tmp_path, "other"), expected)
    points(tmp_path)


@pytest.mark.parametrize("damaged", [pytest.param(1, marks=pytest.mark.torture), 2], ids=["newest", "all"])
def test_corrupt_checkpoints_are_passed_over(damaged, undisturbed, tmp_path):
    running = Running(*command(), cwd=tmp_path)
    running.wait_for_step(80)
    running.kill()
    time.sleep(3)
    for cell in (tmp_path / "runs" / "mask_ratio").iterdir():
        for file in sorted(cell.glob("step-*/training.safetensors"))[-damaged:]:  # the slower cell may have but one
            file.write_bytes(file.read_bytes()[:-100])
    again = Running(*command(), cwd=tmp_path)
    assert again.wait() == 0, again.output
    assert_as_undisturbed(tmp_path, undisturbed)


def test_a_failing_cell_is_named_and_runs_again_only_when_asked(tmp_path):
    flags = ["--set", "train.lr=1e18"]
    broken = sweep(*flags, cwd=tmp_path, ratios="[0.2]")
    assert broken.returncode == 1 and "is not finite" in no_traceback(broken), broken.stdout
    assert "--retry-failed" in broken.stdout
    listed = sweep(*flags, cwd=tmp_path, ratios="[0.2]")
    assert "Failed before" in listed.stdout and "is not finite" in listed.stdout
    assert "Concurrency" not in listed.stdout, "it is not run again"
    cells = results.load_cells("mask_ratio", f"sqlite:///{tmp_path}/mlflow.db")
    assert cells["state"].tolist() == ["failed"]
