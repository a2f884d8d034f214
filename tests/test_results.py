"""Reading a real MLflow store: the table, what is left out, and what goes wrong."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from pandas.testing import assert_frame_equal
from recorded import Recorded

from sddit.errors import TrackingError, UsageError
from sddit.results import load_cells, load_results, load_sweep, parse_param, read_sweep

START = 1_700_000_000_000  # ms; points are recorded at START + step, as the tracker does


def add_cell(client, experiment, parent, *, ratio, seed, state, evaluations, steps=600):
    """A cell as the contract records it; `evaluations` maps steps to scores."""
    identity = f"{int(ratio * 100):02d}{seed:02d}" + "ab12cd34"
    reached = max(evaluations, default=0)
    tags = {
        "mlflow.parentRunId": parent,
        "sddit.kind": "cell",
        "sddit.identity": identity,
        "sddit.state": state,
        "sddit.steps": str(steps),
        "sddit.step": str(reached),
        "sddit.protocol": "1a2b3c4d5e6f",
        "sddit.protocol.text": "1,024 samples, digits-cnn",
        "sddit.code": "0123456789abcdef",
    }
    run = client.create_run(
        experiment, start_time=START + int(ratio * 100) + seed, tags=tags, run_name=f"{ratio}-sddit-s{seed}-{identity}"
    ).info.run_id
    params = {
        "method.name": "sddit", "method.mask_ratio": ratio, "model.size": "S/2", "train.batch_size": 64,
        "data.flip": False, "method.centre": None, "eval.metrics": '["fid"]', "data.digest": "123456e78901",
        "seed": seed,
    }  # fmt: skip
    for key, value in params.items():
        client.log_param(run, key, value)
    points = [Metric("train/loss", 1.0 / (step + 1), START + step, step) for step in range(0, reached + 1, 50)]
    points += [Metric("eval/fid", score, START + step, step) for step, score in evaluations.items()]
    points += [Metric("cost/images", 64.0 * step, START + step, step) for step in evaluations if step > 200]
    if points:
        client.log_batch(run, metrics=points)
    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a store with the sweeps 'whole', 'ragged' and 'repeated'; 'deleted' was one."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    client = MlflowClient(uri)

    def sweep(name):
        experiment = client.create_experiment(name)
        tags = {"sddit.kind": "sweep", "sddit.question": "Does masking pay?"}
        return experiment, client.create_run(experiment, tags=tags).info.run_id

    whole = sweep("whole")
    for seed in (1, 0):
        for ratio in (0.0, 0.3):
            scores = {200: 170.0 + seed, 400: 55.0 + ratio, 600: 20.0 + ratio + seed}
            add_cell(client, *whole, ratio=ratio, seed=seed, state="done", evaluations=scores)
    ragged = sweep("ragged")
    add_cell(client, *ragged, ratio=0.0, seed=0, state="done", evaluations={200: math.inf, 400: 50.0, 600: 20.0})
    add_cell(client, *ragged, ratio=0.3, seed=0, state="running", evaluations={200: 160.0})
    add_cell(client, *ragged, ratio=0.5, seed=0, state="running", evaluations={})
    repeated = sweep("repeated")
    run = add_cell(client, *repeated, ratio=0.0, seed=0, state="done", evaluations={600: 20.0})
    client.log_batch(run, metrics=[Metric("eval/fid", 30.0, START + 9_000, 600)])
    client.delete_experiment(client.create_experiment("deleted"))
    client.set_terminated(run)
    return uri


def test_one_row_per_cell_and_evaluation(store):
    table = load_results("whole", store)
    assert list(table.columns[:7]) == ["identity", "run_id", "state", "seed", "step", "code", "protocol"]
    assert len(table) == 4 * 3
    assert not table.duplicated(["identity", "step"]).any()
    row = table.query("seed == 1 and step == 600 and `method.mask_ratio` == 0.3").iloc[0]
    assert row["eval/fid"] == 21.3
    assert row["train/loss"] == 1 / 601
    assert row["state"] == "done" and row["protocol"] == "1a2b3c4d5e6f" and row["code"] == "0123456789abcdef"


def test_params_are_values(store):
    table = load_results("whole", store)
    assert table["method.mask_ratio"].dtype == float
    assert table["train.batch_size"].dtype == int
    row = table.iloc[0]
    assert row["model.size"] == "S/2" and not row["data.flip"] and row["eval.metrics"] == ["fid"]
    assert pd.isna(row["method.centre"])
    assert row["data.digest"] == "123456e78901"  # not a number, though it reads like one
    assert "seed" not in table.columns[7:]


def test_other_metrics_only_where_they_have_that_step(store):
    table = load_results("whole", store).set_index("step")
    assert table.loc[200, "cost/images"].isna().all()
    assert (table.loc[600, "cost/images"] == 64 * 600).all()
    assert set(load_results("whole", store, metrics=()).columns) & {"train/loss", "cost/images"} == set()


def test_half_finished_sweep(store):
    table, cells = load_results("ragged", store), load_cells("ragged", store)
    assert dict(table.groupby("state").size()) == {"done": 3, "running": 1}
    assert table["eval/fid"].iloc[0] == math.inf
    assert list(cells["state"]) == ["done", "running", "running"]
    assert list(cells["step"]) == [600, 200, 0] and set(cells["steps"]) == {600}
    assert cells["metrics"].iloc[0]["eval/fid"] == 20.0 and "eval/fid" not in cells["metrics"].iloc[2]
    assert cells["params"].iloc[1]["method.mask_ratio"] == 0.3
    assert cells["tags"].iloc[0]["sddit.protocol.text"] == "1,024 samples, digits-cnn"


def test_repeated_points_keep_the_first_and_warn(store):
    with pytest.warns(UserWarning, match="eval/fid at step 600"):
        table = load_results("repeated", store)
    assert list(table["eval/fid"]) == [20.0]


def test_parent_run(store):
    record = load_sweep("whole", store)
    assert record.tags["sddit.question"] == "Does masking pay?"
    assert record.run_id not in set(load_cells("whole", store)["run_id"])


def test_one_search_gives_what_three_give(store):
    for sweep in ("whole", "ragged"):
        table, cells, record = read_sweep(sweep, store, metrics=["train/loss"])
        assert_frame_equal(table, load_results(sweep, store, metrics=["train/loss"]))
        assert_frame_equal(cells, load_cells(sweep, store))
        assert record == load_sweep(sweep, store) and record.axes == []


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return Recorded(tmp_path_factory.mktemp("recorded"))


def test_a_sweep_without_evaluations_is_an_empty_table(recorded):
    recorded.sweep("empty", axes=["system", "method.mask_ratio"])
    table, cells, parent = read_sweep("empty", recorded.uri)
    assert len(table) == len(cells) == 0 and "state" in table and parent.axes == ["system", "method.mask_ratio"]
    recorded.cell("empty", scores={"train/loss": {5: 1.0}}, state="running")
    table, cells, _ = read_sweep("empty", recorded.uri)
    assert len(table) == 0 and "method.name" in table and len(cells) == 1


def test_axes_that_are_no_field_are_columns(recorded):
    recorded.sweep("named")
    points = [
        {"system": "DiT (EDM)", "lr": "x0.5", "method.mask_ratio": 0.9},
        {"system": "MDT", "lr": 2, "state": "taken"},
        {},  # as an older version recorded it
    ]
    for seed, point in enumerate(points):
        recorded.cell("named", seed=seed, point=point, scores={"eval/fid": {600: 20.0}})
    table, cells, _ = read_sweep("named", recorded.uri)
    table, cells = table.set_index("seed").sort_index(), cells.set_index("seed").sort_index()
    assert list(table["system"])[:2] == ["DiT (EDM)", "MDT"] and pd.isna(table["system"][2])
    assert list(table["lr"])[:2] == ["x0.5", 2]
    assert set(table["state"]) == {"done"} and table.columns.is_unique
    assert [params.get("system") for params in cells["params"]] == ["DiT (EDM)", "MDT", None]
    assert cells["params"][0]["method.mask_ratio"] == 0.2, "the field is the experiment's, not the tag's"


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def cached(recorded, tmp_path, monkeypatch):
    """Reads a sweep with a done, a pruned, a failed and a running cell (`cached.runs`) by a cache of its own."""
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))
    sweep = tmp_path.name
    recorded.sweep(sweep)

    def read(*metrics, **options):
        table = load_results(sweep, recorded.uri, **({"metrics": metrics} | options))
        return table.sort_values(["seed", "step"], ignore_index=True)

    read.folder = tmp_path / "cache" / "results"
    read.runs = {
        state: recorded.cell(sweep, seed=seed, state=state, scores={
            "eval/fid": {300: 60.0 + seed, 600: 20.0 + seed}, "train/loss": {300: 0.5, 450: 0.4, 600: 0.3},
            "cost/flops": {300: 1e9, 600: 2e9},
        })
        for seed, state in enumerate(("done", "pruned", "failed", "running"))
    }  # fmt: skip
    return read


@pytest.fixture
def asked(monkeypatch):
    """(run id, metric) of each history that is asked for."""

    pairs, real = [], MlflowClient.get_metric_history

    def ask(self, run_id, key):
        pairs.append((run_id, key))
        return real(self, run_id, key)

    monkeypatch.setattr(MlflowClient, "get_metric_history", ask)
    return pairs


def test_histories_of_finished_runs_are_read_once(cached, asked):
    first = cached()
    assert {run for run, _ in asked} == set(cached.runs.values()) and {key for _, key in asked} == {"eval/fid"}
    asked.clear()
    assert_frame_equal(cached(), first)
    assert {run for run, _ in asked} == {cached.runs["failed"], cached.runs["running"]}
    assert len(list(cached.folder.iterdir())) == 1


def test_more_metrics_than_are_cached(cached, asked):
    cached()
    asked.clear()
    table = cached(metrics=None)
    assert {key for run, key in asked if run == cached.runs["done"]} == {"train/loss", "cost/flops"}
    assert list(table.columns[-3:]) == ["cost/flops", "eval/fid", "train/loss"]
    assert list(table["train/loss"]) == [0.5, 0.3] * 4, "points between the evaluations are left out"
    asked.clear()
    assert_frame_equal(cached(metrics=None), table)
    assert_frame_equal(cached("cost/flops"), table.drop(columns="train/loss"))
    assert cached.runs["done"] not in {run for run, _ in asked}


def test_a_cell_that_was_extended_is_read_anew(cached, asked, recorded):
    cached()
    run = cached.runs["done"]
    recorded.client.log_batch(run, [Metric("eval/fid", 10.0, START + 900, 900)])
    recorded.client.set_tag(run, "sddit.step", "900")
    recorded.client.set_terminated(run)
    asked.clear()
    table = cached()
    assert list(table["eval/fid"])[:3] == [60.0, 20.0, 10.0]
    assert (run, "eval/fid") in asked and cached.runs["pruned"] not in {run for run, _ in asked}
    asked.clear()
    assert_frame_equal(cached(), table)
    assert run not in {run for run, _ in asked}


def test_points_recorded_twice_are_told_from_the_cache_too(cached, asked, recorded):
    recorded.client.log_batch(cached.runs["done"], [Metric("eval/fid", 99.0, START + 9_000, 300)])
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 points were recorded twice, e.g. eval/fid at step 300"):
            assert list(cached()["eval/fid"])[:2] == [60.0, 20.0]
    assert asked.count((cached.runs["done"], "eval/fid")) == 1


def test_a_cache_that_cannot_serve_is_no_error(cached):
    expected = cached()
    (file,) = cached.folder.iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[:-100], b"not parquet at all"):
        file.write_bytes(content)
        assert_frame_equal(cached(), expected)
        assert file.read_bytes() == whole, "it is written anew"
    pd.DataFrame({"other": [1]}).to_parquet(file)
    assert_frame_equal(cached(), expected)
    file.unlink()
    cached.folder.rmdir()
    cached.folder.write_text("in the way")
    assert_frame_equal(cached(), expected)


def test_readers_side_by_side_leave_one_whole_file(cached):
    expected = cached(metrics=None)
    (file,) = cached.folder.iterdir()
    file.unlink()
    with ThreadPoolExecutor(4) as pool:
        asking = [(), ["train/loss"], ["cost/flops"], None] * 3
        tables = list(pool.map(lambda metrics: cached(metrics=metrics), asking))
    assert all(list(table["eval/fid"]) == list(expected["eval/fid"]) for table in tables)
    assert list(cached.folder.iterdir()) == [file]
    assert_frame_equal(cached(metrics=None), expected)


def test_unknown_and_deleted_sweeps(store):
    with pytest.raises(UsageError, match=r"No sweep 'hole'.*Did you mean 'whole'\? Known: ragged, repeated, whole\."):
        load_results("hole", store)
    with pytest.raises(UsageError, match=r"was deleted.*restore"):
        load_cells("deleted", store)


def test_reading_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri in (None, "sqlite:///below/mlflow.db", "mlruns"):
        with pytest.raises(TrackingError, match=r"(?s)No MLflow record at .*sweeps/mask_ratio\.py"):
            load_results("mask_ratio", uri)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_left_alone(tmp_path):
    empty = tmp_path / "empty.db"
    empty.touch()
    text = tmp_path / "text.db"
    text.write_text("not a database, but long enough to be taken for one" * 20)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE things (name TEXT)")
    for path in (empty, text, other):
        before = path.read_bytes()
        with pytest.raises(TrackingError, match=path.name):
            load_results("mask_ratio", f"sqlite:///{path}")
        assert path.read_bytes() == before


def test_default_address(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert len(load_cells("whole")) == 4
    folder = Path(store.removeprefix("sqlite:///")).parent
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(folder)
    assert len(load_cells("whole")) == 4


@pytest.mark.parametrize("uri", ["http://user:secret@127.0.0.1:9", "postgresql://user:secret@127.0.0.1:9/mlflow"])
def test_unreachable_server_is_told_within_seconds(uri, monkeypatch):
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        load_results("mask_ratio", uri)
    assert time.monotonic() - start < 15
    assert "127.0.0.1" in str(caught.value) and "secret" not in str(caught.value)
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.3", 0.3), ("64", 64), ("1e-4", 1e-4), ("True", True), ("false", False), ("None", None), ("null", None),
        ("['fid', 'is']", ["fid", "is"]), ("[1, 2]", [1, 2]), ("(3, 32, 32)", [3, 32, 32]), ("S/2", "S/2"),
        ("power:6.94", "power:6.94"), ("1e999", "1e999"), ("NaN", "NaN"), ("", ""), ("drawn", "drawn"),
    ],
)  # fmt: skip
def test_params_from_text(text, value):
    parsed = parse_param("section.field", text)
    assert parsed == value and type(parsed) is type(value)


def test_import_stays_light():
    code = "import sys, sddit.results; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
