"""How many cells fit side by side, and which can never fit."""

import pytest

from sddit.config import Resources
from sddit.errors import UsageError
from sddit.orchestration.cluster import GIB, Growth, Node, growth, place

LAPTOP = [Node(cpus=2, gpus=0, memory=16 * GIB)]
GPU_BOX = [Node(cpus=32, gpus=4, memory=256 * GIB)]
THREE = [Node(cpus=8, gpus=0, memory=32 * GIB)] * 3
FLEET = [Node(cpus=96, gpus=8, memory=1000 * GIB)] * 4 + [Node(cpus=8, gpus=0, memory=64 * GIB)]
WORKER = int(1.2 * GIB)

CASES = [
    (LAPTOP, Resources(), 2, {"CPU": 1}),
    (LAPTOP, Resources(workers=2), 1, {"CPU": 1}),
    (LAPTOP, Resources(cpus_per_worker=2), 1, {"CPU": 2}),
    (GPU_BOX, Resources(), 4, {"CPU": 1, "GPU": 1.0}),
    (GPU_BOX, Resources(gpus_per_worker=0.25), 16, {"CPU": 1, "GPU": 0.25}),
    (GPU_BOX, Resources(gpus_per_worker=0.1), 32, {"CPU": 1, "GPU": 0.1}),
    (GPU_BOX, Resources(gpus_per_worker=0), 32, {"CPU": 1}),
    (GPU_BOX, Resources(workers=4, cpus_per_worker=8), 1, {"CPU": 8, "GPU": 1.0}),
    (THREE, Resources(cpus_per_worker=5), 3, {"CPU": 5}),  # 24 / 5 would be 4, but a worker cannot straddle nodes
    (FLEET, Resources(workers=8), 4, {"CPU": 1, "GPU": 1.0}),
    (FLEET, Resources(workers=16), 2, {"CPU": 1, "GPU": 1.0}),
]


@pytest.mark.parametrize(("nodes", "resources", "concurrent", "per_worker"), CASES)
def test_concurrency(nodes, resources, concurrent, per_worker):
    placement = place(nodes, resources, WORKER)
    assert placement.concurrent == concurrent
    assert placement.per_worker == per_worker
    assert f"= {concurrent} cell" in placement.arithmetic and "by compute" in placement.arithmetic


def test_memory_limits_too():
    small = [Node(cpus=8, gpus=0, memory=5 * GIB)]
    placement = place(small, Resources(), WORKER)
    assert placement.concurrent == 4 and "limit: memory" in placement.arithmetic
    assert place(small, Resources(workers=2), WORKER).concurrent == 1, "a nested cell brings its helpers"


IMPOSSIBLE = [
    (LAPTOP, Resources(workers=3), WORKER, "--workers 2"),
    (LAPTOP, Resources(gpus_per_worker=1), WORKER, "resources.gpus_per_worker"),
    (THREE, Resources(cpus_per_worker=9), WORKER, "resources.cpus_per_worker"),
    (LAPTOP, Resources(), 17 * GIB, "more memory"),
]


@pytest.mark.parametrize(("nodes", "resources", "worker_bytes", "fix"), IMPOSSIBLE)
def test_a_cell_that_can_never_fit_is_refused(nodes, resources, worker_bytes, fix):
    with pytest.raises(UsageError, match="can never hold") as error:
        place(nodes, resources, worker_bytes)
    assert fix in str(error.value)


SHARED = [
    # (GPUs, memory of each, bytes a cell, cells) → share of a GPU
    (1, 80, 2, 8, 0.25),
    (1, 80, 2, 3, pytest.approx(1 / 3)),
    (4, 80, 2, 4, 1.0),  # each has one to itself
    (4, 80, 2, 5, 0.5),
    (1, 24, 6, 8, 0.5),
    (1, 24, 20, 8, 1.0),
    (1, 0, 2, 8, 1.0),  # memory not known
]


@pytest.mark.parametrize(("gpus", "memory", "needs", "cells", "share"), SHARED)
def test_small_cells_share_a_gpu_where_memory_allows(gpus, memory, needs, cells, share):
    nodes = [Node(cpus=32, gpus=gpus, memory=256 * GIB, gpu_memory=memory * GIB)]
    placement = place(nodes, Resources(), WORKER, device_bytes=needs * GIB, cells=cells)
    assert placement.per_worker["GPU"] == share
    alone = place(nodes, Resources(workers=min(2, gpus)), WORKER, device_bytes=needs * GIB, cells=cells)
    assert gpus == 1 or alone.per_worker["GPU"] == 1.0, "workers of one cell never share"


HEAD = Node(cpus=4, gpus=0, memory=16 * GIB, head=True)
SPOT = Node(cpus=48, gpus=4, memory=0)  # as a configuration names it: memory is not known
CPUS = Node(cpus=16, gpus=0, memory=64 * GIB)
GROWTH = [
    # (types with how many nodes of each, nodes in all, resources) → cells now, and at most
    ([(SPOT, 3)], 10, Resources(), 0, 12),
    ([(SPOT, 3)], 2, Resources(), 0, 8),  # the limit of all types together
    ([(SPOT, 2), (SPOT, 2)], 3, Resources(), 0, 12),  # spot and on demand
    ([(CPUS, 5), (SPOT, 5)], 2, Resources(workers=4), 0, 2),  # the nodes that hold most
    ([(CPUS, 2)], 8, Resources(), 4, 36),
    ([(SPOT, 0)], 8, Resources(), 4, 4),
]


@pytest.mark.parametrize(("types", "most", "resources", "now", "later"), GROWTH)
def test_a_cluster_that_can_grow_is_counted_at_its_largest(types, most, resources, now, later):
    placement = place([HEAD], resources, WORKER // 8, growth=Growth(tuple(types), most))
    assert placement.concurrent == later == placement.cells_on([HEAD])
    assert (f": {now} now, up to {later} as nodes come" in placement.arithmetic) == (now != later)
    assert ("GPU" in placement.per_worker) == any(node.gpus and count for node, count in types)


def test_what_no_growth_can_hold_is_refused_with_the_arithmetic():
    with pytest.raises(
        UsageError, match=r"growing to 3 nodes with 100 CPU, 8 GPU.*never hold more than 8.*--workers 8"
    ):
        place([HEAD], Resources(workers=9), WORKER, growth=Growth(((SPOT, 2),), 2))
    with pytest.raises(UsageError, match=r"growing to 3 nodes with 100 CPU, 8 GPU.*never hold more than 0"):
        place([HEAD], Resources(cpus_per_worker=49), WORKER, growth=Growth(((SPOT, 2),), 2))


def test_concurrency_follows_a_cluster_whose_nodes_come_and_go():
    placement = place(THREE, Resources(cpus_per_worker=8), WORKER)
    assert [placement.cells_on(THREE[:1] * count) for count in (0, 1, 3, 5)] == [0, 1, 3, 5]


CONFIGURATION = """
max_workers: 6
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4}, max_workers: 0}
  spot: {resources: {CPU: 48, GPU: 4, memory: 1000}, max_workers: 3}
  demand: {resources: {CPU: 16}}
  unknown: {resources: {}}
"""


def test_growth_is_read_from_the_configuration_of_the_autoscaler(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(CONFIGURATION)
    assert growth() is None, "there is no cluster to grow"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    expected = Growth(((Node(48, 4, 1000), 3), (Node(16, 0, 0), 6)), 6)
    assert growth() == expected
    (tmp_path / "ray_bootstrap_config.yaml").unlink()
    assert growth() is None, "as large as it is"
    monkeypatch.setenv("SDDIT_AUTOSCALING_CONFIG", str(tmp_path / "mine.yaml"))
    with pytest.raises(UsageError, match="available_node_types"):
        growth()
    (tmp_path / "mine.yaml").write_text("just words")
    with pytest.raises(UsageError, match="available_node_types"):
        growth()
    (tmp_path / "mine.yaml").write_text(CONFIGURATION)
    assert growth() == expected
