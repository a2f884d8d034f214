"""A sweep as a user runs it, end to end: plan, run, run again, extend; and what is refused before anything starts."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from commands import MASK_RATIO, no_traceback, run, sweep

import sddit
from sddit import results

KEYS = ["identity", "seed", "step"]


def table(folder, name="mask_ratio"):
    return sddit.load_results(name, f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of two cells that has run once; tests add to it in the order of the file."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = sweep("--plan", cwd=folder)
    assert plan.returncode == 0, plan.stderr
    assert [p.name for p in folder.iterdir()] == [], "a plan writes nothing"
    done = sweep(cwd=folder)
    return folder, plan, done


def test_the_plan(finished):
    _, plan, _ = finished
    lines = [line for line in plan.stdout.splitlines() if line.startswith("mask_ratio=")]
    assert len(lines) == 2 and all(re.search(r"new +0/6 +\d+ s ", line) for line in lines)
    assert "2 cells to run" in plan.stdout and "device-hours" in plan.stdout


def test_what_a_person_sees(finished):
    folder, _, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    output = no_traceback(done)
    for text in ("Concurrency: 1 node", "floor(", "cells at once", "Logs of Ray", "Lowest FID", "mlflow", "ui"):
        assert text in output, output
    assert "Trial" not in output and "ray.tune" not in output, "Ray's stream is kept off the terminal"
    logs = re.search(r"Logs of Ray and of the cells: (\S+)", output).group(1)
    assert Path(logs).is_dir()
    assert len(done.stderr.splitlines()) < 5, done.stderr
    for kind in ("png", "pdf", "csv"):
        assert (folder / "figures" / f"mask_ratio.{kind}").stat().st_size > 200


def test_the_record_is_the_contract(finished):
    folder, _, _ = finished
    uri = f"sqlite:///{folder}/mlflow.db"
    frame = table(folder)
    assert len(frame) == 4 and set(frame["step"]) == {3, 6} and set(frame["state"]) == {"done"}
    assert set(frame["method.mask_ratio"]) == {0.2, 0.5} and frame["eval/fid"].notna().all()
    cells = results.load_cells("mask_ratio", uri)
    for row in cells.to_dict("records"):
        tags = row["tags"]
        experiment = sddit.presets.digits()
        assert row["name"] == f"{row['params']['method.mask_ratio']:g}-sddit-s0-{row['identity']}"
        assert tags["sddit.kind"] == "cell" and tags["sddit.steps"] == "6" and tags["sddit.step"] == "6"
        assert tags["sddit.workers"] == "1" and tags["sddit.code"] and len(tags["sddit.protocol"]) == 12
        assert set(row["params"]) == set(experiment.digest_fields()) | {"data.digest"}
        assert {
            "train/loss",
            "train/loss_generative",
            "train/loss_discriminative",
            "train/images_per_s",
            "eval/fid",
        } < set(row["metrics"])
        assert {"cost/images", "cost/device_hours", "cost/flops"} < set(row["metrics"])
        [checkpoint] = (folder / "runs" / "mask_ratio" / row["identity"]).iterdir()
        assert checkpoint.name == "step-00000006"
        images = list((folder / "mlruns" / "mask_ratio" / row["run_id"] / "artifacts" / "images").glob("*.png"))
        assert sorted(int(p.name.split("+")[2]) for p in images) == [0, 3, 6]
    parent = results.load_sweep("mask_ratio", uri)
    assert parent.tags["sddit.kind"] == "sweep" and parent.tags["sddit.owner"] == "null"
    artifacts = folder / "mlruns" / "mask_ratio" / parent.run_id / "artifacts"
    names = {"mask_ratio.png", "mask_ratio.pdf", "mask_ratio.csv", "report.html"}
    assert {p.name for p in artifacts.iterdir()} == names
    assert parent.axes == ["method.mask_ratio"] and parent.tags["sddit.command"].startswith("python sweeps/mask_ratio")
    floors = {json.loads(tags["sddit.noise_floor"])["mean"] for tags in cells["tags"]}
    assert len(floors) == 1 and 0 < floors.pop() < 100
    assert {tags["axis.method.mask_ratio"] for tags in cells["tags"]} == {"0.2", "0.5"}
    assert cells["tags"].map(lambda t: t["mlflow.parentRunId"] == parent.run_id).all()


def test_a_cell_gives_what_training_it_alone_gives(finished, tmp_path):
    from tiny import experiment

    folder, _, _ = finished
    result = sddit.train(
        experiment(method__mask_ratio=0.5), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", storage=tmp_path
    )
    mine = table(folder).query("identity == @result.identity and step == 6")
    assert result.metrics["eval/fid"] == pytest.approx(mine["eval/fid"].item(), rel=1e-6)


def test_the_same_command_again_recomputes_nothing(finished):
    folder, _, _ = finished
    before = table(folder)
    done = sweep(cwd=folder)
    assert done.returncode == 0 and "all 2 cells are done; nothing to run" in done.stdout, done.stderr
    assert "Concurrency" not in done.stdout, "Ray is not even started"
    pd.testing.assert_frame_equal(before, table(folder))


@pytest.mark.slow
def test_new_values_seeds_and_steps_run_only_what_is_new(finished):
    folder, _, _ = finished
    before = table(folder)
    done = sweep("--seeds", "2", "--steps", "8", cwd=folder, ratios="[0.2, 0.5, 0.75]")
    assert done.returncode == 0, done.stdout + done.stderr
    after = table(folder)
    assert len(after.groupby("identity")) == 6
    assert set(after[after["seed"] == 1]["step"]) == {3, 6, 8}
    common = after.merge(before[KEYS], on=KEYS)
    pd.testing.assert_frame_equal(
        common.drop(columns="state"), before.drop(columns="state"), check_like=True, check_dtype=False
    )
    assert "step 6/8" in done.stdout or "step 8/8" in done.stdout


REFUSED = [
    (["--set", "method.mask_ratio=1.2"], "must be in [0, 1)"),
    (["--set", "method.mask_ratio=[0.2, 0.25]"], "both keep 12 of 16 tokens"),
    (["--set", "train.lr=0.001"], "train.lr: 0.007 → 0.001"),
    (["--preset", "digit"], "Did you mean 'digits'"),
    (["--set", "method.name=masdit"], "Unknown method 'masdit'"),
    (["--set", "train.batchsize=3"], "Did you mean 'train.batch_size'"),
    (["--set", "lr"], "section.field=value"),
    (["--workers", "5"], "batch_size 16 is not divisible by 5 workers"),
    (["--workers", "0"], "--workers is 0"),
    (["--workers", "16", "--steps", "9"], "can never hold"),
    (["--search", "tpe"], "--trials"),
    (["--search", "tpe", "--trials", "4", "--seeds", "2"], "--seeds cannot be used"),
    (["--set", "eval.extractor=inception"], "Did you mean"),
    (["--set", "eval.extractor=inception-v3-compat"], "weights"),
    (["--set", "data.path=nowhere"], "nowhere"),
    (["--tracking-uri", "http://127.0.0.1:9"], "cannot be reached"),
    (["--tracking-uri", "nonsense"], "sqlite:///mlflow.db"),
    (["--storage", "mlflow.db/x"], "Cannot write checkpoints"),
    (["--no-such-flag"], "no-such-flag"),
    (["--set", "seed=1"], "Use --seeds K"),
    (["--set", "method.mask_ratio=[]"], "leaves nothing to run"),
    (["--budget-hours", "-1"], "--budget-hours is -1"),
    (["--price", "nan"], "--price is nan"),
    (["--objective", "fid,cost"], "is for --search tpe"),
    (["--seeds", "2000"], "kept for --confirm"),
    (["--confirm", "2", "--set", "method.mask_ratio=[0.2, 0.65]"], "1 cells are missing"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_bad_input_is_refused_in_words(finished, flags, message):
    folder, _, _ = finished
    done = sweep(*flags, cwd=folder)
    assert message in no_traceback(done)
    world = message in ("cannot be reached", "Cannot write checkpoints", "nowhere")
    assert done.returncode == (1 if world else 2)


def test_help_needs_nothing_heavy():
    done = run("-X", "importtime", MASK_RATIO, "--help", cwd=".")
    assert done.returncode == 0 and "--retry-failed" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "mlflow", "optuna", "matplotlib"}
