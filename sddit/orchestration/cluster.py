"""Connects to Ray and computes how many cells fit side by side, with the arithmetic to show.

Environment variables that Ray reads at import are set here, so import this module before `ray`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sddit.config import Resources
from sddit.errors import SdditError, UsageError

GIB = 2**30
# A nested trial's driver, controller and five helpers, beside its workers (measured: 3.3 GB with one worker's 1.2).
NESTED_BYTES = int(2.1e9)
CUDA_BYTES = int(1.5e9)  # of a process on a GPU, beside its tensors: context, kernels, workspaces
GPU_SHARE = 0.8  # of a GPU's memory that predictions may fill
MAX_SHARING = 4  # cells on one GPU: beyond it they slow each other as much as they gain


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers to cells."""

    cpus: float
    gpus: float
    memory: float  # bytes
    gpu_memory: float = 0.0  # bytes of each, where it is known


@dataclass(frozen=True)
class Placement:
    """How the cells of a sweep are placed."""

    concurrent: int
    per_worker: dict[str, float]  # Ray resources of one worker
    arithmetic: str
    nodes: int


def configure_environment(*, remote: bool) -> None:
    """Sets what Ray reads from the environment, where the user has not. Must run before `import ray`."""
    settings = {
        "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no tables of Tune's own
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # TensorBoard's logger would import torch into the driver
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else Ctrl-C looks like a finished sweep
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed cell's last result has no FID
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would package the whole folder for every worker
    }
    if not remote:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on loopback only
        settings["RAY_AUTH_MODE"] = "token"
        if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not _token_file().exists():
            settings["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this cluster alone, never written down
    else:
        has_token = _token_file().exists() or "RAY_AUTH_TOKEN" in os.environ
        settings["RAY_AUTH_MODE"] = "token" if has_token else "disabled"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def connect(*, dashboard: bool) -> str:
    """Joins the cluster of `RAY_ADDRESS`, or starts one on this machine. Returns where its logs lie.

    `dashboard` is for a cluster started here: nested trials stopped early need it to give their workers back.

    Raises:
        SdditError: no cluster answers.
    """
    address = os.environ.get("RAY_ADDRESS")
    configure_environment(remote=bool(address))
    import ray

    try:
        with _quiet_stderr():
            if ray.is_initialized():
                pass  # by an earlier call
            elif address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"No Ray cluster answers at RAY_ADDRESS={address}" if address else "Ray did not start on this machine"
        do = "Start it with `ray start --head`, or unset RAY_ADDRESS." if address else "Is the machine overloaded?"
        raise SdditError(f"{what}: {reason}. {do}") from None
    for name in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are shown in one line, and are in the logs
    return str(Path(ray._private.worker._global_node.get_logs_dir_path()))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ start-up lines go past Python's stderr; keeps them off the terminal."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def nodes() -> list[Node]:
    """The living nodes of the connected cluster."""
    import ray

    found = [(n["NodeID"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    ask = ray.remote(_gpu_memory)
    asked = {
        node: ask.options(num_cpus=0, scheduling_strategy=on(node, soft=False)).remote()
        for node, resources in found
        if resources.get("GPU")
    }
    memory = dict(zip(asked, ray.get(list(asked.values())), strict=True))
    return [Node(r.get("CPU", 0), r.get("GPU", 0), r.get("memory", 0), memory.get(node, 0.0)) for node, r in found]


@functools.cache
def this_machine() -> Node:
    """What Ray would find here, roughly, without starting it."""
    import psutil

    memory = _gpu_memory()
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if memory else 0
    return Node(os.cpu_count() or 1, gpus, 0.7 * psutil.virtual_memory().available, memory)


def _gpu_memory() -> float:
    """Bytes of the smallest GPU of this machine; 0 where there is none, or no driver's tool to ask."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        return min(float(line) for line in lines) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0


def place(
    cluster: Sequence[Node], resources: Resources, worker_bytes: int, *, device_bytes: int = 0, cells: int = 1
) -> Placement:
    """How many cells run at once: no worker straddles nodes, drivers of nested cells take memory and no CPU.

    Where nothing is said of GPUs, a worker has one to itself, or cells of one worker share one when there are more
    of them than GPUs and `device_bytes` of each leave room.

    Raises:
        UsageError: not even one cell can ever run on this cluster.
    """
    workers = resources.workers
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in cluster) else 0.0
        if gpus and workers == 1:
            gpus = 1 / _sharing(cluster, device_bytes, cells)
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if gpus:
        per_worker["GPU"] = gpus
    nested = NESTED_BYTES if workers > 1 else 0
    by_compute = sum(_fits(node, per_worker) for node in cluster)
    by_memory = sum(int(node.memory // (worker_bytes + nested / workers)) for node in cluster)
    asked = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    have = (
        f"{_total(cluster, 'cpus'):g} CPU, {_total(cluster, 'gpus'):g} GPU, {_total(cluster, 'memory') / GIB:.0f} GiB"
    )
    where = f"{len(cluster)} node{'s' if len(cluster) != 1 else ''} with {have}"
    slots = min(by_compute, by_memory)
    if slots < workers:
        if by_compute >= workers:
            fix = "Use a smaller model or fewer workers, or a cluster with more memory."
        elif by_compute:
            fix = f"Use --workers {by_compute} or fewer, or a larger cluster."
        else:
            fix = "Lower resources.cpus_per_worker or resources.gpus_per_worker with --set, or use a larger cluster."
        raise UsageError(
            f"A cell asks for {workers} worker{'s' if workers > 1 else ''} of {asked} and about "
            f"{(worker_bytes + nested / workers) / GIB:.1f} GiB each, but this cluster ({where}) can never hold "
            f"more than {max(slots, 0)}. {fix}"
        )
    concurrent = slots // workers
    limit = "compute" if by_compute <= by_memory else "memory"
    arithmetic = (
        f"{where}; {workers} worker{'s' if workers > 1 else ''} a cell, each {asked} and about "
        f"{(worker_bytes + nested / workers) / GIB:.1f} GiB: {by_compute} fit by compute, {by_memory} by memory; "
        f"floor({slots} / {workers}) = {concurrent} cell{'s' if concurrent > 1 else ''} at once (limit: {limit})"
    )
    return Placement(concurrent, per_worker, arithmetic, len(cluster))


def _sharing(cluster: Sequence[Node], device_bytes: int, cells: int) -> int:
    """How many cells share a GPU."""
    on_gpus = [node for node in cluster if node.gpus]
    each = device_bytes + CUDA_BYTES
    fit = min(int(GPU_SHARE * node.gpu_memory // each) for node in on_gpus)
    wanted = math.ceil(cells / sum(node.gpus for node in on_gpus))
    return max(1, min(MAX_SHARING, fit, wanted))


def _fits(node: Node, per_worker: Mapping[str, float]) -> int:
    # A hair of tolerance: 1 / 0.1 is 9.99… in floating point.
    counts = [math.floor({"CPU": node.cpus, "GPU": node.gpus}[k] / v + 1e-9) for k, v in per_worker.items() if v]
    return min(counts) if counts else 0


def _total(cluster: Sequence[Node], name: str) -> float:
    return sum(getattr(node, name) for node in cluster)
