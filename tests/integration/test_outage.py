"""The tracking server and the storage go away in the middle of a sweep: it waits for them, and loses nothing."""

import contextlib
import sqlite3
import time

import pytest
from commands import MASK_RATIO, Running, no_traceback
from servers import Door, MlflowServer
from storage import BUCKET, s3
from tiny import set_flags
from written import assert_once

from sddit import results

pytestmark = pytest.mark.slow

EVERY, STEPS = 40, 800
OUTAGE = 20  # seconds


@pytest.fixture(scope="module")
def door():
    """In front of the storage. Addresses in the environment are those of the door."""
    with s3() as client, pytest.MonkeyPatch.context() as patch:
        host, port = client.meta.endpoint_url.removeprefix("http://").split(":")
        door = Door(host, int(port))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{door.port}")
        yield door
        door.shut()


@pytest.fixture(scope="module")
def server(door, tmp_path_factory):
    with MlflowServer(tmp_path_factory.mktemp("server"), f"s3://{BUCKET}/artifacts") as server:
        yield server


def begin(folder, server, *flags, ratios="[0.2, 0.5]", **env):
    tiny = {"eval__every": EVERY, "train__log_every": 5, "eval__samples": 200, "method__mask_ratio": ratios}
    place = ["--storage", f"s3://{BUCKET}/runs", "--tracking-uri", server.uri]
    return Running(MASK_RATIO, *set_flags(**tiny), "--steps", STEPS, *place, *flags, cwd=folder, **env)


def test_points_and_checkpoints_wait_and_arrive_once_in_order(door, server, tmp_path):
    running = begin(tmp_path, server)
    running.wait_for_step(EVERY)
    server.stop()
    time.sleep(OUTAGE)
    server.start()
    running.wait_for_step(3 * EVERY)
    door.shut()
    time.sleep(OUTAGE)
    assert running.process.poll() is None, "it cannot end without its checkpoints"
    door.open()
    assert running.wait(300) == 0, running.output
    no_traceback(running.output)
    cells = assert_once(server.database, "mask_ratio", server.uri, every=EVERY, steps=STEPS)
    assert not any("sddit.continued_from" in tags for tags in cells["tags"]), "no cell had to start again"
    with contextlib.closing(sqlite3.connect(f"file:{server.database}?mode=ro", uri=True)) as database:
        for run in cells["run_id"]:
            query = "SELECT step FROM metrics WHERE run_uuid = ? AND key = 'train/loss' ORDER BY rowid"
            steps = [step for (step,) in database.execute(query, (run,))]
            assert steps == sorted(steps), "in order"


@pytest.mark.torture
def test_an_outage_that_lasts_is_named_and_the_same_command_goes_on(door, server, tmp_path):
    impatient = {"SDDIT_PATIENCE_SECONDS": "5"}
    running = begin(tmp_path, server, "--name", "short", ratios="[0.5]", **impatient)
    running.wait_for_step(EVERY)
    door.shut()
    try:
        assert running.wait(200) == 1, running.output
    finally:
        door.open()
    output = no_traceback(running.output)
    assert "interrupted" in output and "checkpoints under s3://" in output and "cannot be reached" in output
    assert "this goes on" in output and "Failed" not in output
    assert results.load_cells("short", server.uri)["state"].tolist() == ["running"]
    again = begin(tmp_path, server, "--name", "short", ratios="[0.5]", **impatient)
    assert again.wait(300) == 0, again.output
    cells = assert_once(server.database, "short", server.uri, every=EVERY, steps=STEPS)
    assert int(cells["tags"].iloc[0]["sddit.continued_from"]) >= EVERY
