"""More workers, and other ways to choose cells: the same commands, the same results."""

import pytest
from commands import no_traceback, sweep

import sddit
from sddit import results

pytestmark = pytest.mark.slow


def table(folder):
    return sddit.load_results("mask_ratio", f"sqlite:///{folder}/mlflow.db").sort_values(["identity", "step"])


def test_two_workers_through_ray_train_give_what_one_gives(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    for folder, flags in ((one, []), (two, ["--workers", "2"])):
        done = sweep(*flags, cwd=folder, ratios="[0.5]")
        assert done.returncode == 0, done.stdout + done.stderr
        no_traceback(done)
    a, b = table(one), table(two)
    assert a["identity"].tolist() == b["identity"].tolist() and a["step"].tolist() == b["step"].tolist() == [3, 6]
    # sums in another order, as in tests/training/test_loop.py
    assert b["eval/fid"].tolist() == pytest.approx(a["eval/fid"].tolist(), rel=1e-3)
    assert b["train/loss"].dropna().tolist() == pytest.approx(a["train/loss"].dropna().tolist(), rel=1e-4)
    assert results.load_cells("mask_ratio", f"sqlite:///{two}/mlflow.db")["tags"][0]["sddit.workers"] == "2"

    # The same cell goes on with another number of workers.
    done = sweep("--steps", "8", cwd=two, ratios="[0.5]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(two)["step"].tolist() == [3, 6, 8]


def test_tpe_counts_its_budget_over_all_starts_and_asha_stops_cells(tmp_path):
    flags = ["--search", "tpe", "--asha", "--steps", "12"]
    tiny = {"eval__every": 1}
    first = sweep(*flags, "--trials", "5", cwd=tmp_path, tiny=tiny)
    assert first.returncode == 0, first.stdout + first.stderr
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cells = results.load_cells("mask_ratio", uri)
    assert len(cells) == 5 and set(cells["state"]) <= {"done", "pruned"} and "done" in set(cells["state"])
    pruned = cells[cells["state"] == "pruned"]
    assert (pruned["step"] < 12).all()
    again = sweep(*flags, "--trials", "5", cwd=tmp_path, tiny=tiny)
    assert "nothing to run" in again.stdout
    more = sweep(*flags, "--trials", "7", cwd=tmp_path, tiny=tiny)
    assert more.returncode == 0, more.stdout + more.stderr
    cells = results.load_cells("mask_ratio", uri)
    assert len(cells) == 7 == cells["identity"].nunique()
    assert cells["params"].map(lambda p: int(16 * (1 - p["method.mask_ratio"]))).is_unique, "no two are one cell"


def test_a_disk_ceiling_slims_done_cells_which_can_then_be_sampled_but_not_extended(tmp_path):
    done = sweep("--max-disk-gb", "0.001", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "slimmed" in done.stdout and "--max-disk-gb 0.001 cannot be kept" in done.stdout
    checkpoints = list((tmp_path / "runs" / "mask_ratio").glob("*/step-*"))
    slimmed = [c for c in checkpoints if not (c / "training.safetensors").exists()]
    assert slimmed and all((c / "sampling.safetensors").exists() for c in checkpoints)
    assert sddit.sample(slimmed[0], classes=[1, 2]).shape == (2, 8, 8, 1)
    longer = sweep("--steps", "8", cwd=tmp_path)
    assert longer.returncode == 1 and "slimmed" in no_traceback(longer)
