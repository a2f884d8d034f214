"""Several nodes, one record: sweeps spread over them, outlive the loss of some, and use those that come.

Loss of the head is loss of the driver: `test_faults.py` kills the driver and all that runs, and starts again.
"""

import time

import pytest
from commands import MASK_RATIO, Running, no_traceback
from nodes import Nodes
from tiny import set_flags
from written import assert_close, assert_once, assert_same, table

from sddit import results

pytestmark = pytest.mark.slow

EVERY, STEPS = 40, 160
TINY = {"eval__every": EVERY, "train__log_every": 5, "eval__samples": 200}
ONE_WORKER, MORE_WORKERS = "ray::ImplicitFunc", "ray::RayTrainWorker"


def command(*flags, ratios="[0.2, 0.5, 0.8]"):
    return [MASK_RATIO, *set_flags(**TINY, method__mask_ratio=ratios), *flags]


def uri(folder):
    return f"sqlite:///{folder}/mlflow.db"


def wait_until(condition, running, seconds=400):
    """What the condition gives, once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert running.process.poll() is None, running.output
        assert time.monotonic() < deadline, running.output
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def nodes():
    nodes = Nodes(1, 1)
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def undisturbed(nodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    running = Running(*command("--steps", str(STEPS)), cwd=folder, **nodes.environment)
    assert running.wait(300) == 0, running.output
    assert "2 nodes" in running.output or "3 nodes with 2 CPU" in running.output
    return table("mask_ratio", uri(folder))


def test_a_sweep_uses_a_node_that_comes_and_outlives_one_that_goes(nodes, undisturbed, tmp_path):
    running = Running(*command("--steps", str(STEPS)), cwd=tmp_path, **nodes.environment)
    wait_until(lambda: len(nodes.running(ONE_WORKER)) == 2, running)  # a cell on each node
    assert "= 2 cells at once" in running.output
    third = nodes.add()
    wait_until(lambda: third in nodes.running(ONE_WORKER), running)
    assert len(nodes.running(ONE_WORKER)) == 3, "the node that came is used beside the others"

    # Its cell began last, so it is the one that surely is in its middle: after its first checkpoint.
    running.wait_for_step(EVERY, cells=3)
    nodes.kill(third)
    running.wait_for("starts again")
    nodes.add()
    assert running.wait(300) == 0, running.output
    cells = assert_once(tmp_path / "mlflow.db", "mask_ratio", uri(tmp_path), every=EVERY, steps=STEPS)
    continued = [int(tags["sddit.continued_from"]) for tags in cells["tags"] if "sddit.continued_from" in tags]
    assert len(continued) == 1 and continued[0] in range(EVERY, STEPS, EVERY), "from its last checkpoint"
    assert_same(table("mask_ratio", uri(tmp_path)), undisturbed)
    no_traceback(running.output)


def test_a_cell_changes_its_number_of_workers_and_outlives_a_node_that_is_taken_back(nodes, undisturbed, tmp_path):
    while len(nodes.raylets) < 3:
        nodes.add()
    for workers, steps in ((1, EVERY), (2, STEPS - EVERY), (1, STEPS)):
        flags = ["--workers", str(workers), "--steps", str(steps)]
        running = Running(*command(*flags, ratios="[0.5]"), cwd=tmp_path, **nodes.environment)
        if workers > 1:
            used = wait_until(lambda: len(used := nodes.running(MORE_WORKERS)) == 2 and used, running)  # on two nodes
            running.wait_for_step(2 * EVERY)
            nodes.terminate(max(used))
        assert running.wait(300) == 0, running.output
        no_traceback(running.output)
        cells = results.load_cells("mask_ratio", uri(tmp_path))
        assert len(cells) == 1 and cells["tags"][0]["sddit.workers"] == str(workers)
    cells = assert_once(tmp_path / "mlflow.db", "mask_ratio", uri(tmp_path), every=EVERY, steps=STEPS)
    expected = undisturbed[undisturbed["identity"] == cells.index[0]].reset_index(drop=True)
    assert_close(table("mask_ratio", uri(tmp_path)), expected)
