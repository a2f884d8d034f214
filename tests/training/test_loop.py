"""The one loop, over every method: resume, workers and accumulation change nothing; what goes wrong is named."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run
from tiny import experiment as tiny

from sddit.config import METHOD_CONFIGS
from sddit.data.sampler import BatchSampler
from sddit.errors import DivergedError
from sddit.training import loop
from sddit.training.store import SAMPLING, TRAINING, CheckpointStore


def tensors(folder):
    checkpoint = CheckpointStore(folder).checkpoints()[0]
    return {**checkpoint.load(SAMPLING), **checkpoint.load(TRAINING)}


def reproducible(recorded):
    timed = {"cost/device_hours", "train/images_per_s", "train/data_wait"}
    return {(step, key): value for (step, key), value in recorded.items() if key not in timed}


@pytest.mark.parametrize(
    ("method", "changes"), [*((method, {}) for method in METHOD_CONFIGS), ("mdt", {"train__optimizer": "adan"})]
)
def test_stopped_at_any_step_and_resumed_is_straight_through_bit_for_bit(method, changes, tmp_path):
    experiment = tiny(method, **changes)
    straight, memory = run(experiment, tmp_path / "straight")
    assert straight.finished and straight.step == 6
    for stop_at in range(1, 6):
        folder = tmp_path / f"stopped-{stop_at}"
        stopped, first = run(experiment, folder, stop_at)
        assert not stopped.finished and stopped.step == stop_at
        resumed, second = run(experiment, folder)
        assert resumed.metrics == straight.metrics
        a, b = tensors(tmp_path / "straight"), tensors(folder)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]
        assert not first.recorded.keys() & second.recorded.keys(), "a point in both starts"
        assert reproducible(first.recorded | second.recorded) == reproducible(memory.recorded)
        grids = first.grids | second.grids
        assert all(np.array_equal(grids[step], memory.grids[step]) for step in memory.grids)


def test_an_extended_run_has_every_point_of_a_straight_one(tmp_path):
    run(tiny(train__steps=4), tmp_path / "a")
    _, extension = run(tiny(train__steps=9), tmp_path / "a")
    _, straight = run(tiny(train__steps=9), tmp_path / "b")
    assert [step for step, _ in extension.evaluations] == [6, 9]
    assert [step for step, _ in straight.evaluations] == [3, 6, 9]
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    again, memory = run(tiny(train__steps=9), tmp_path / "a")
    assert again.metrics == straight.evaluations[-1][1] and memory.recorded == {}, "nothing is computed again"


def test_what_is_recorded(tmp_path):
    result, memory = run(tiny(), tmp_path)
    by_step = {}
    for step, key in memory.recorded:
        by_step.setdefault(step, set()).add(key)
    train = {"train/loss", "train/loss_generative", "train/loss_discriminative", "train/images_per_s"}
    train |= {"train/data_wait"}
    for step in (2, 4, 6):
        assert train | {"train/information_cls", "train/information_patch"} <= by_step[step]
    for step in (3, 6):
        assert {"eval/fid", "cost/images", "cost/device_hours", "cost/flops"} <= by_step[step]
    assert memory.recorded[6, "cost/images"] == 6 * 16
    assert 0 <= memory.recorded[6, "train/data_wait"] <= 1
    assert sorted(memory.grids) == [0, 3, 6]
    assert memory.grids[0].dtype == np.uint8 and memory.grids[0].shape == ((2 * 9 - 1) * 4, (10 * 9 - 1) * 4, 1)
    assert [step for step, _ in memory.evaluations] == [3, 6]
    assert Path(result.checkpoint).name == "step-00000006"
    assert [c.step for c in CheckpointStore(tmp_path).checkpoints()] == [6], "a finished run keeps one"


def worker_script(experiment, folder, out):
    return f"""
import json
from pathlib import Path
from gloo import worker
from harness import run
from sddit.config import Experiment
with worker() as rank:
    result, memory = run(Experiment.parse(json.loads({experiment.model_dump_json()!r})), {str(folder)!r})
    if rank == 0:
        points = [[s, k, v] for (s, k), v in memory.recorded.items()]
        Path({str(out)!r}).write_text(json.dumps({{"metrics": result.metrics, "points": points}}))
"""


def run_on_workers(experiment, folder, workers, out):
    script = worker_script(experiment.replace({"resources.workers": workers}), folder, out)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    path = out.with_suffix(".py")
    path.write_text(script)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def assert_close(folder_a, folder_b):
    """Parameters after six steps from sums in another order.

    fp32 rounding is 6e-8; AdamW divides by the root of the second moment, so near-zero gradients turn a rounding
    error into a share of the learning rate (7e-3). 2e-4 is 3 % of one step's size and far below what any other
    noise, mask or order would give (5e-2).
    """
    a, b = tensors(folder_a), tensors(folder_b)
    assert a.keys() == b.keys()
    worst = max((a[k].double() - b[k].double()).abs().max().item() for k in a)
    assert worst < 2e-4, worst


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_two_workers_give_what_one_gives(method, tmp_path):
    experiment = tiny(method)
    one, memory = run(experiment, tmp_path / "one")
    two = run_on_workers(experiment, tmp_path / "two", 2, tmp_path / "out.json")
    assert_close(tmp_path / "one", tmp_path / "two")
    assert two["metrics"]["eval/fid"] == pytest.approx(one.metrics["eval/fid"], rel=1e-3)
    for step, key, value in two["points"]:
        if key.startswith(("train/loss", "train/information")):
            assert value == pytest.approx(memory.recorded[step, key], rel=1e-3, abs=1e-4), (step, key)


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_gradient_accumulation_changes_nothing(method, tmp_path):
    whole, a = run(tiny(method), tmp_path / "whole")
    parts, b = run(tiny(method, train__micro_batch=4), tmp_path / "parts")
    assert_close(tmp_path / "whole", tmp_path / "parts")
    assert parts.metrics["eval/fid"] == pytest.approx(whole.metrics["eval/fid"], rel=1e-3)
    assert b.recorded[6, "train/loss"] == pytest.approx(a.recorded[6, "train/loss"], rel=1e-4)


def test_another_draw_is_far_outside_the_tolerance(tmp_path):
    """The tolerance above would notice if workers drew other noise."""
    run(tiny(), tmp_path / "a")
    run(tiny(seed=1), tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_a_loss_that_is_not_finite_stops_with_step_position_and_checkpoint(method, tmp_path, monkeypatch):
    experiment = tiny(method)
    original = BatchSampler.batch

    def poisoned(self, step, lo, hi):
        x0, y = original(self, step, lo, hi)
        if step == 4:
            x0 = x0.copy()
            x0[9] = np.nan
        return x0, y

    monkeypatch.setattr(BatchSampler, "batch", poisoned)
    with pytest.raises(DivergedError, match=r"step 5 .*position 9 of .*step-00000003") as error:
        run(experiment, tmp_path)
    assert "train.lr" in str(error.value)
    assert [c.step for c in CheckpointStore(tmp_path).checkpoints()] == [3], "nothing is saved after it"


def test_nothing_is_saved_after_a_loss_that_is_not_finite_on_another_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.distributed, "any_true", lambda flag, device: True)
    with pytest.raises(DivergedError, match="not finite on another worker"):
        run(tiny(), tmp_path)
    assert not CheckpointStore(tmp_path).checkpoints()


def test_a_dead_discriminative_loss_warns_once_and_is_tagged(tmp_path):
    dead = tiny(method__centring="none", method__teacher_momentum=1.0, method__tau_teacher_cls=100.0)
    with pytest.warns(UserWarning, match="collapsed") as caught:
        _, memory = run(dead, tmp_path)
    assert len([w for w in caught if "collapsed" in str(w.message)]) == 1
    assert "cls" in memory.tags["sddit.collapse"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, memory = run(tiny(train__steps=1, method__collapse_after=2), tmp_path / "early")
    assert memory.tags == {}, "not during the warm-up"


def test_bf16_keeps_state_and_losses_in_fp32(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this machine may emulate it
        _, memory = run(tiny(train__precision="bf16", train__steps=2), tmp_path)
    assert {t.dtype for t in tensors(tmp_path).values() if t.is_floating_point()} == {torch.float32}
    _, full = run(tiny(train__steps=2), tmp_path / "fp32")
    a, b = memory.recorded[2, "train/loss"], full.recorded[2, "train/loss"]
    assert a == pytest.approx(b, rel=0.02) and a != b


def test_a_slow_precision_is_warned_of(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="no bf16 instructions"):
        loop.warn_if_slow(tiny(train__precision="bf16"), torch.device("cpu"))
