"""The record of a cluster outlives its server: copies are consistent, the newer of two is used, and none is lost."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from commands import no_traceback, run
from mlflow.entities import Metric
from servers import MlflowServer, free_port

from sddit import serve, tracking
from sddit.errors import StorageError

# ------------------------------------------------------------------------------------ copies, without MLflow's server


def write(database, runs):
    """A database with as many runs, of which each has one metric."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE IF NOT EXISTS runs (name)")
        db.execute("CREATE TABLE IF NOT EXISTS metrics (name)")
        for i in range(runs):
            db.execute("INSERT INTO runs VALUES (?)", (i,))
            db.execute("INSERT INTO metrics VALUES (?)", (i,))


def count(database):
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        runs, metrics = (db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("runs", "metrics"))
    assert runs == metrics, "half a transaction was copied"
    return runs


@pytest.fixture
def places(tmp_path):
    """Two machines, and the backup folder of both."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two", str(tmp_path / "backup")


def copies(backup):
    return json.loads(open(f"{backup}/latest.json").read())["copies"]


def test_a_machine_without_a_database_gets_the_last_copy(places):
    one, two, backup = places
    record = serve.Record(one, backup)
    assert record.restore() == "A new record."
    assert not record.save(), "there is nothing yet"
    write(one / "mlflow.db", 3)
    assert record.save() and not record.save(), "nothing has changed since"
    write(one / "mlflow.db", 2)
    assert record.save()
    assert serve.Record(two, backup).restore().startswith("Restored from ")
    assert count(two / "mlflow.db") == 5
    assert serve.Record(one, backup).restore().startswith("Going on with ")


def test_two_copies_are_kept_over_all_starts(places):
    one, two, backup = places
    for i in range(4):
        write(one / "mlflow.db", 1)
        record = serve.Record(one, backup)
        record.restore()
        record.save()
        assert len(copies(backup)) == min(2, i + 1)
    shutil.rmtree(one)
    shutil.copytree(backup, two / "files")
    assert len(list((two / "files").glob("mlflow-*.db"))) == 2


def test_a_copy_is_consistent_whatever_is_written_meanwhile(places):
    one, _, backup = places
    write(one / "mlflow.db", 1)
    ending = threading.Event()

    def go_on_writing():
        while not ending.is_set():
            write(one / "mlflow.db", 5)

    writer = threading.Thread(target=go_on_writing)
    writer.start()
    try:
        record, seen = serve.Record(one, backup), []
        while len(seen) < 8:
            if record.save():
                seen.append(count(f"{backup}/{copies(backup)[0]['file']}"))
    finally:
        ending.set()
        writer.join()
    assert seen == sorted(seen) and seen[-1] > seen[0]


def test_of_two_records_the_newer_is_used_and_the_other_kept(places):
    one, two, backup = places
    for folder, runs in ((one, 1), (two, 2)):
        write(folder / "mlflow.db", runs)
    os.utime(two / "mlflow.db", (1, 1))
    serve.Record(one, backup).save()
    said = serve.Record(two, backup).restore()  # an old one of its own
    assert "which is newer than the database that was here, last written 1970" in said
    assert count(two / "mlflow.db") == 1
    (aside,) = two.glob("mlflow-1970*.db")
    assert str(aside) in said and count(aside) == 2

    write(one / "mlflow.db", 3)  # each goes on from the same copy
    write(two / "mlflow.db", 5)
    mine, other = serve.Record(one, backup), serve.Record(two, backup)
    assert mine.save()
    with pytest.raises(StorageError, match=r"Another server has written to .* this record lies beside it as mlflow-"):
        other.save()
    assert count(f"{backup}/{copies(backup)[0]['file']}") == 4
    assert sorted(count(file) for file in (one.parent / "backup").glob("mlflow-*.db")) == [1, 4, 6]

    write(two / "mlflow.db", 1)  # and this one is the newer by now
    other = serve.Record(two, backup)
    said = other.restore()
    assert "is newer, so it is used. That copy stays where it is." in said
    assert other.save() and count(f"{backup}/{copies(backup)[0]['file']}") == 7
    assert 4 in [count(file) for file in (one.parent / "backup").glob("mlflow-*.db")]


def test_an_empty_record_does_not_win_against_a_copy(places):
    one, two, backup = places
    write(one / "mlflow.db", 2)
    serve.Record(one, backup).save()
    time.sleep(0.01)
    write(two / "mlflow.db", 0)
    assert serve.Record(two, backup).restore().startswith("Restored from ")
    assert count(two / "mlflow.db") == 2


def test_a_damaged_copy_is_refused_and_nothing_is_put_in_place(places):
    one, two, backup = places
    write(one / "mlflow.db", 2)
    serve.Record(one, backup).save()
    with open(f"{backup}/{copies(backup)[0]['file']}", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    with pytest.raises(StorageError, match="is not what was written there"):
        serve.Record(two, backup).restore()
    assert not (two / "mlflow.db").exists()


def test_who_may_call_the_server_by_which_name(tmp_path):
    assert serve.Server(tmp_path, "a").allowed_hosts() == ["localhost:*", "127.0.0.1:*", "127.0.0.1:5000"]
    everywhere = serve.Server(tmp_path, "a", host="0.0.0.0", port=5001, names=("tracking",)).allowed_hosts()
    assert "tracking:5001" in everywhere and f"{socket.gethostname()}:5001" in everywhere
    assert not any(host.startswith("*") or host.endswith(".*") for host in everywhere)


# -------------------------------------------------------------------------------------------------------- the command


def sddit_serve(*flags, cwd, **env):
    return run("-m", "sddit", "serve", "--data", "data", *flags, cwd=cwd, **env)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--stop"], 2, "No tracking server has run on data"),
        (["--backup", "s3://nowhere/mlflow"], 1, "there is no bucket s3://nowhere"),
        (["--backup", "s4://lab/mlflow"], 2, "Unknown scheme 's4'"),
        (["--backup", "x", "--database", "postgresql://me@host/db"], 2, "cannot be used with --database"),
        (["--database", "oracle://me@host/db"], 2, "needs oracledb, which is not installed"),
        (["--database", "my database"], 2, "not the URI of a database"),
        (["--host", "203.0.113.9"], 2, "Cannot listen on 203.0.113.9"),
        (["--every", "0"], 2, "must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_served(flags, status, message, tmp_path, s3):
    port = [] if "--stop" in flags else ["--port", str(free_port())]
    done = sddit_serve(*flags, *port, cwd=tmp_path)
    assert message in " ".join(no_traceback(done).split())
    assert done.returncode == status
    assert not (tmp_path / "data" / "mlflow.db").exists()


@pytest.mark.slow
def test_the_record_outlives_server_machine_and_outage(tmp_path, s3):
    port, data = free_port(), tmp_path / "data"
    url = f"http://127.0.0.1:{port}"
    places = ["--artifacts", "s3://lab/artifacts", "--backup", "s3://lab/mlflow", "--every", "1"]
    start = [*places, "--port", str(port), "--detach"]

    def state():
        return json.loads((data / "serve.json").read_text())

    def kill(*which):
        family = [psutil.Process(state()[name][0]) for name in which]
        if "server" in which:
            family += family[-1].children(recursive=True)
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, 30)

    def answer(host):
        request = urllib.request.Request(url, headers={"Host": host})
        try:
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    def recorded():
        """Of the one run: its steps, read through a client of its own, and what is in its artifact."""
        read = (
            "import sys, mlflow; c = mlflow.MlflowClient(sys.argv[1]); r, = c.search_runs(['1']); "
            "print([m.step for m in c.get_metric_history(r.info.run_id, 'loss')]); "
            "print(mlflow.artifacts.load_text(f'{r.info.artifact_uri}/note.txt'))"
        )
        done = run("-c", read, url, cwd=tmp_path, MLFLOW_TRACKING_URI=url)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:2]

    try:
        done = sddit_serve(*start, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "A new record." in done.stdout and f"MLflow: {url}" in done.stdout
        client = tracking.open_client(url)
        run_id = client.create_run(client.create_experiment("sweep")).info.run_id
        client.log_metric(run_id, "loss", 1.0, timestamp=1, step=1)
        client.log_text(run_id, "kept on the bucket", "note.txt")

        hosts = {f"127.0.0.1:{port}": 200, "localhost:1": 200, f"evil.example:{port}": 403, "10.9.9.9": 403}
        assert {host: answer(host) for host in hosts} == hosts
        second = sddit_serve(*places, "--port", str(free_port()), cwd=tmp_path)
        assert second.returncode == 2 and "is served already" in no_traceback(second)

        # The command alone is killed: MLflow's server, left behind, makes room for the next.
        kill("process")
        done = sddit_serve(*start, cwd=tmp_path)
        assert done.returncode == 0 and "Going on with" in done.stdout, done.stdout + done.stderr
        assert recorded() == ["[1]", "kept on the bucket"]

        # The whole machine is lost: all up to the last copy is back.
        client.log_metric(run_id, "loss", 0.5, timestamp=2, step=2)
        wait_for_copy(tmp_path / "copy.db", lambda db: db.execute("SELECT count(*) FROM metrics").fetchone()[0] == 2)
        kill("process", "server")
        shutil.rmtree(data)
        done = sddit_serve(*start, cwd=tmp_path)
        assert done.returncode == 0 and "Restored from s3://lab/mlflow/mlflow-" in done.stdout, done.stdout
        assert recorded() == ["[1, 2]", "kept on the bucket"]

        # Ended in order: the last point is in the last copy, however young.
        client.log_metric(run_id, "loss", 0.25, timestamp=3, step=3)
        done = sddit_serve("--stop", cwd=tmp_path)
        assert done.returncode == 0 and "its record is in s3://lab/mlflow" in done.stdout, done.stdout + done.stderr
        shutil.rmtree(data)
        done = sddit_serve(*start, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert recorded() == ["[1, 2, 3]", "kept on the bucket"]
        assert sddit_serve("--stop", cwd=tmp_path).returncode == 0
    finally:
        for process in psutil.process_iter(["cmdline", "cwd"]):
            if process.info["cwd"] == str(tmp_path):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def wait_for_copy(to, true):
    """Until what is on the bucket is as wanted."""
    import boto3

    s3 = boto3.client("s3")
    for _ in range(600):
        latest = json.loads(s3.get_object(Bucket="lab", Key="mlflow/latest.json")["Body"].read())
        s3.download_file("lab", f"mlflow/{latest['copies'][0]['file']}", str(to))
        with contextlib.closing(sqlite3.connect(to)) as db:
            if true(db):
                return
        time.sleep(0.1)
    raise AssertionError("it was never copied")


@pytest.mark.slow
def test_cells_that_report_all_at_once_do_not_bring_the_server_to_a_standstill(tmp_path):
    cells, reports, keys = 48, 3, 16

    def write(run_id):
        for step in range(reports):
            together.wait()
            client.log_batch(run_id, [Metric(f"key_{k}", step, 1, step) for k in range(keys)])

    with MlflowServer(tmp_path, tmp_path / "artifacts") as server:
        client = tracking.open_client(server.uri)
        experiment = client.create_experiment("sweep")
        runs = [client.create_run(experiment).info.run_id for _ in range(cells)]
        together = threading.Barrier(cells, timeout=60)  # one that fails leaves nobody waiting
        with ThreadPoolExecutor(cells) as pool:
            list(pool.map(write, runs))
        with contextlib.closing(sqlite3.connect(server.database)) as db:
            assert db.execute("SELECT count(*) FROM metrics").fetchone()[0] == cells * reports * keys
        assert "QueuePool" not in server.log.read_text(), "requests waited for each other's connections"


@pytest.mark.slow
@pytest.mark.torture
def test_a_database_server_instead_of_a_file(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "sddit", "serve", "--data", "data", "--port", str(port)]
    database = f"sqlite:///{tmp_path}/elsewhere.db"  # the same URI as MLflow and SQLAlchemy have for any database
    with subprocess.Popen(
        [*command, "--database", database], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as serving:
        try:
            assert "Database: sqlite, not copied" in serving.stdout.readline()
            tracking.open_client(f"http://127.0.0.1:{port}").create_experiment("sweep")
            assert (tmp_path / "elsewhere.db").exists() and not (tmp_path / "data" / "mlflow.db").exists()
        finally:
            serving.send_signal(signal.SIGINT)
        assert serving.wait(60) == 0
