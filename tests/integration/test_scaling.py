"""A cluster that grows from nothing when cells wait, and what can never fit on it.

Ray's fake provider, as an external module, makes the nodes: processes on this machine (ray-cluster.md §5).
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml
from commands import environment, no_traceback, sweep
from servers import free_port
from written import assert_once

pytestmark = pytest.mark.slow

HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as the fake provider names it ...
HEAD_TYPE = "ray.head.default"  # ... and its type
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


@pytest.fixture(scope="module")
def growing():
    """A head without CPUs whose autoscaler may add two nodes of one CPU. Gives a command's environment."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets have short names only
    port = free_port()
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external", "module": PROVIDER, "head_node_id": HEAD, "launch_multiple": True,
            "gcs_address": f"127.0.0.1:{port}", "disable_node_updaters": True,
        },
        "auth": {"ssh_user": "x"},
        "available_node_types": {
            HEAD_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
            "cpu": {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}, "max_workers": 4},
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [], "head_node": {}, "worker_nodes": {},
    }  # fmt: skip
    file = Path(folder) / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    loopback = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    fake = {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_NODE_TYPE_NAME": HEAD_TYPE,
    }  # fmt: skip
    ray = [
        Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}",
        "--num-cpus=0", "--object-store-memory=80000000", "--include-dashboard=false", "--disable-usage-stats",
        f"--ray-client-server-port={free_port()}", f"--autoscaling-config={file}",
    ]  # fmt: skip
    settings = environment(**loopback, **fake)
    with open(f"{folder}/start.log", "w") as log:
        head = subprocess.Popen(ray, env=settings, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in (output := Path(log.name).read_text()):
        assert head.poll() is None and time.monotonic() < deadline, output
        time.sleep(0.2)
    yield {"RAY_ADDRESS": f"127.0.0.1:{port}", "SDDIT_AUTOSCALING_CONFIG": str(file), **loopback}
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def test_the_plan_says_how_many_cells_fit_now_and_later(growing, tmp_path):
    planned = sweep("--plan", cwd=tmp_path, **growing)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "1 node with 0 CPU" in planned.stdout and "growing to 3 nodes with 2 CPU" in planned.stdout
    assert ": 0 now, up to 2 as nodes come" in no_traceback(planned)


@pytest.mark.parametrize("flags", [["--workers", "4"], ["--set", "resources.cpus_per_worker=2"]])
def test_what_can_never_fit_is_refused_instead_of_waiting(growing, tmp_path, flags):
    refused = sweep(*flags, cwd=tmp_path, timeout=120, **growing)
    output = no_traceback(refused)
    assert refused.returncode == 2 and "growing to 3 nodes with 2 CPU" in output and "can never hold" in output


def test_a_sweep_makes_the_cluster_grow_from_nothing(growing, tmp_path):
    done = sweep(cwd=tmp_path, ratios="[0.2, 0.5, 0.8]", **growing)
    assert done.returncode == 0, done.stdout + done.stderr
    no_traceback(done)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cells = assert_once(tmp_path / "mlflow.db", "mask_ratio", uri, every=3, steps=6)
    assert len(cells) == 3
    children = [" ".join(p.info["cmdline"]) for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"]]
    raylets = [c for c in children if "raylet/raylet" in c and growing["RAY_ADDRESS"] in c]
    assert len(raylets) == 3, "the head and two nodes"
