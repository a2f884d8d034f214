"""How many cells fit side by side, and which can never fit."""

import pytest

from sddit.config import Resources
from sddit.errors import UsageError
from sddit.orchestration.cluster import GIB, Node, place

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
