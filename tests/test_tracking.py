"""The record: exactly once across kills and outages, one owner, and what a store that does not answer costs."""

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from sddit import presets, tracking
from sddit.errors import SupersededError, TrackingError, UsageError
from sddit.tracking import CellRecord, Owner, SweepRecord, open_client, resolve_uri

EXPERIMENT = presets.digits()
IDENTITY = EXPERIMENT.identity("d" * 64)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('record')}/mlflow.db"


@pytest.fixture
def sweep(uri, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return SweepRecord(uri, f"sweep-{abs(hash(request.node.nodeid))}", question="Why?")


@pytest.fixture
def run_id(sweep):
    return start(sweep)


def start(sweep, run_id=None):
    return sweep.start_cell(EXPERIMENT, identity=IDENTITY, data_digest="d" * 64, label="0.2", run_id=run_id)


def points(uri, run_id):
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        return sorted(database.execute("SELECT step, key, value FROM metrics WHERE run_uuid = ?", (run_id,)).fetchall())


def test_points_grids_and_tags_arrive(uri, run_id):
    record = CellRecord(uri, run_id)
    for step in range(1, 301):
        record.points(step, {"train/loss": 1 / step, "train/images_per_s": 3.0})
    record.grid(0, np.zeros((8, 8, 1), dtype=np.uint8))
    record.grid(10, np.full((8, 8, 3), 7, dtype=np.uint8))
    record.tag("sddit.collapse", "cls")
    record.close()
    assert len(points(uri, run_id)) == 600
    run = open_client(uri).get_run(run_id)
    assert run.data.tags["sddit.collapse"] == "cls" and run.data.tags["sddit.step"] == "300"
    assert tracking._recorded_grids(open_client(uri), run_id) == {0, 10}


def test_a_resume_repeats_no_point_even_with_another_value(uri, run_id):
    first = CellRecord(uri, run_id)
    for step in (1, 2, 3):
        first.points(step, {"train/loss": step, "train/images_per_s": 100.0 + step})
    first.grid(0, np.zeros((8, 8, 1), dtype=np.uint8))
    first.close()
    again = CellRecord(uri, run_id)
    for step in (2, 3, 4):
        again.points(step, {"train/loss": step, "train/images_per_s": 55.0})
    again.grid(0, np.zeros((8, 8, 1), dtype=np.uint8))
    again.close()
    recorded = points(uri, run_id)
    assert [p for p in recorded if p[1] == "train/loss"] == [(s, "train/loss", float(s)) for s in (1, 2, 3, 4)]
    assert [p[2] for p in recorded if p[1] == "train/images_per_s"] == [101.0, 102.0, 103.0, 55.0]
    assert len(tracking._recorded_grids(open_client(uri), run_id)) == 1


def test_what_was_not_sent_travels_in_the_checkpoint(uri, run_id, monkeypatch):
    monkeypatch.setattr(tracking, "SEND_SECONDS", 1000)
    killed = CellRecord(uri, run_id)
    killed.points(1, {"train/loss": 1.0})
    killed.grid(1, np.ones((8, 8, 1), dtype=np.uint8))
    killed.tag("sddit.collapse", "x")
    pending = json.loads(json.dumps(killed.pending()))  # as a checkpoint's manifest keeps it
    assert len(pending) == 3 and points(uri, run_id) == []
    resumed = CellRecord(uri, run_id)
    resumed.restore(pending)
    resumed.points(1, {"train/loss": 2.0})
    resumed.points(2, {"train/loss": 3.0})
    resumed.close()
    assert points(uri, run_id) == [(1, "train/loss", 1.0), (2, "train/loss", 3.0)]
    assert tracking._recorded_grids(open_client(uri), run_id) == {1}


def test_pending_records_that_did_arrive_are_not_sent_twice(uri, run_id):
    first = CellRecord(uri, run_id)
    first.points(1, {"train/loss": 1.0})
    pending = first.pending()
    first.close()
    resumed = CellRecord(uri, run_id)
    resumed.restore(pending)
    resumed.close()
    assert points(uri, run_id) == [(1, "train/loss", 1.0)]


def test_an_outage_loses_nothing(uri, run_id, monkeypatch):
    from mlflow.exceptions import MlflowException

    record = CellRecord(uri, run_id)
    real, calls = record.client.log_batch, []

    def flaky(*args, **kwargs):
        calls.append(1)
        if len(calls) <= 2:
            raise MlflowException("no answer")
        return real(*args, **kwargs)

    monkeypatch.setattr(record.client, "log_batch", flaky)
    for step in range(5):
        record.points(step, {"train/loss": float(step)})
    assert not record.flush(timeout=0.3), "the caller is not held up"
    record.close(timeout=20)
    assert len(points(uri, run_id)) == 5


def test_a_grid_whose_answer_is_lost_is_there_once(uri, run_id, monkeypatch):
    record = CellRecord(uri, run_id)
    real, calls = record.client.log_image, []

    def unanswered(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("503 Server Error")  # the client that sends artifacts has exceptions of its own
        real(*args, **kwargs)
        if len(calls) == 2:
            raise OSError("connection reset")

    monkeypatch.setattr(record.client, "log_image", unanswered)
    record.grid(1, np.ones((8, 8, 1), dtype=np.uint8))
    record.points(1, {"train/loss": 1.0})
    record.close(timeout=30)
    images = [file.path for file in record.client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert len(images) == 1 and points(uri, run_id) == [(1, "train/loss", 1.0)]


def test_a_cell_that_is_opened_in_an_outage_has_one_run(sweep, monkeypatch):
    from mlflow.exceptions import MlflowException

    real, calls = sweep.client.create_run, []

    def unanswered(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        raise MlflowException("no answer")

    monkeypatch.setattr(sweep.client, "create_run", unanswered)
    assert start(sweep) == calls[0].info.run_id and len(calls) == 1
    assert sweep.client.get_run(calls[0].info.run_id).data.params


@pytest.mark.parametrize(
    ("method", "write"),
    [
        ("log_batch", lambda sweep, owner, file: sweep.set_tags({"sddit.base": "x"})),
        ("set_experiment_tag", lambda sweep, owner, file: sweep.describe("Why?", ["seed"])),
        ("log_artifact", lambda sweep, owner, file: sweep.artifact(file)),
        ("get_run", lambda sweep, owner, file: owner.confirm()),
    ],
)
def test_what_a_sweep_records_of_itself_waits_for_the_end_of_an_outage(sweep, tmp_path, monkeypatch, method, write):
    from mlflow.exceptions import MlflowException

    owner, file = sweep.claim(), tmp_path / "figure.csv"
    file.write_text("x")
    real, calls = getattr(sweep.client, method), []

    def down_at_first(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise MlflowException("no answer")
        return real(*args, **kwargs)

    monkeypatch.setattr(sweep.client, method, down_at_first)
    write(sweep, owner, file)
    assert calls[1] == calls[0]
    calls.clear()
    if method == "log_batch":
        with pytest.raises(TrackingError, match="no answer"):
            sweep.set_tags({"sddit.base": "x"}, seconds=0)


def test_records_that_never_arrive_are_an_error_that_says_where_they_are(uri, run_id, monkeypatch):
    from mlflow.exceptions import MlflowException

    record = CellRecord(uri, run_id)

    def down(*args, **kwargs):
        raise MlflowException("no answer")

    monkeypatch.setattr(record.client, "log_batch", down)
    record.points(1, {"train/loss": 1.0})
    with pytest.raises(TrackingError, match="in its last checkpoint"):
        record.close(timeout=0.5)


def test_a_superseded_cell_writes_nothing_more(uri, sweep, run_id):
    owner = sweep.claim()
    record = CellRecord(uri, run_id, owned_run=sweep.parent_id, token=owner.token)
    record.points(1, {"train/loss": 1.0})
    assert record.flush(10)
    record.fence()
    sweep.client.set_tag(sweep.parent_id, "sddit.owner", json.dumps({"token": "another"}))
    with pytest.raises(SupersededError):
        record.fence()
    record.points(2, {"train/loss": 2.0})
    record.flush(5)
    with pytest.raises(SupersededError):
        record.pending()
    assert points(uri, run_id) == [(1, "train/loss", 1.0)]


def test_one_owner_at_a_time(uri, sweep):
    owner = sweep.claim()
    owner.confirm()
    with pytest.raises(UsageError, match=rf"is being run by process {os.getpid()} on "):
        sweep.claim()
    owner.release("FINISHED")
    second = sweep.claim()
    second.confirm()
    with pytest.raises(UsageError, match="same moment"):
        owner.confirm()
    second.release()


def owner_tag(sweep, **changes):
    me = {"host": tracking.socket.gethostname(), "pid": os.getpid(), "start": tracking._process_start(os.getpid())}
    sweep.client.set_tag(sweep.parent_id, "sddit.owner", json.dumps(me | {"token": "t"} | changes))


@pytest.mark.parametrize(
    ("changes", "heartbeat", "alive"),
    [
        ({}, 1000, True),  # this process, whatever its heart says
        ({"start": 1.0}, 1000, False),  # its pid belongs to another process by now
        ({"start": 1.0}, 5, True),  # the clock jumped
        ({"pid": 2**22 + 1}, 0, False),
        ({"host": "elsewhere"}, 5, True),
        ({"host": "elsewhere"}, 100, False),
    ],
)
def test_a_dead_owner_is_taken_over(sweep, changes, heartbeat, alive):
    owner_tag(sweep, **changes)
    sweep.client.set_tag(sweep.parent_id, "sddit.heartbeat", repr(time.time() - heartbeat))
    if alive:
        with pytest.raises(UsageError):
            Owner(sweep.client, sweep.parent_id, "Sweep")
    else:
        Owner(sweep.client, sweep.parent_id, "Sweep").release()


def test_a_sweep_and_its_cells_are_found_again(uri, sweep, run_id):
    again = SweepRecord(uri, sweep.sweep)
    assert (again.experiment_id, again.parent_id) == (sweep.experiment_id, sweep.parent_id)
    assert start(again, run_id) == run_id
    sweep.end_cell(run_id, "failed", error="boom\nlast line")
    run = sweep.client.get_run(run_id)
    assert run.info.status == "FAILED" and run.data.tags["sddit.error"].endswith("last line")
    assert run.data.params["data.digest"] == "d" * 64 and "train.steps" not in run.data.params
    assert all(len(v) < 6000 for v in run.data.params.values())


def test_four_processes_may_open_a_new_file_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=open_client, args=(uri,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_kill_while_the_database_is_made_leaves_no_part_of_it(tmp_path):
    code = f"from sddit.tracking import open_client; open_client('sqlite:///{tmp_path}/mlflow.db')"
    first = subprocess.Popen([sys.executable, "-c", code])
    while not any(file.stat().st_size for file in tmp_path.glob(".mlflow.db-new-*")):  # it has some tables
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert not (tmp_path / "mlflow.db").exists()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {file.name for file in tmp_path.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}


def test_an_unreachable_server_is_said_within_seconds():
    code = "from sddit.tracking import open_client; open_client('http://127.0.0.1:9')"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "TrackingError: The tracking store http://127.0.0.1:9 cannot be reached" in done.stderr
    assert time.monotonic() - begun < 40, "bounded, unlike the four minutes that MLflow takes by default"


def test_addresses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_uri(None) == "http://host:5000"
    with pytest.raises(UsageError, match="sqlite:///"):
        resolve_uri("mlflow")
