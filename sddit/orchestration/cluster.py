"""Connects to Ray and computes how many cells fit side by side, with the arithmetic to show.

Environment variables that Ray reads at import are set here, so import this module before `ray`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
PRELOADED_CPUS = 8  # of a machine at most: a process for each CPU of a large one would take memory that cells need
CELL_MODULES = "ray.tune,mlflow.entities,sddit.training.diagnostics"
ANSWER_SECONDS = 5.0  # for a cluster's head to accept a connection
# What processes on other nodes must know too. Never secrets: Ray writes these into its logs on every node. Nor
# OMP_NUM_THREADS: `ray exec` sets it to 1 for every command, and a cell sets its threads itself.
PASSED_ON = (
    "SDDIT_CACHE", "SDDIT_CACHE_GB", "SDDIT_PATIENCE_SECONDS", "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION",
    "AWS_DEFAULT_REGION", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
)  # fmt: skip
TOKEN_FIX = (
    "Copy the head's ~/.ray/auth_token here (mode 600), or make one with `ray get-auth-token --generate` and bring it "
    "to every node before Ray starts, with RAY_AUTH_MODE=token everywhere."
)


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers to cells."""

    cpus: float
    gpus: float
    memory: float  # bytes; 0 where it is not known, which limits nothing
    gpu_memory: float = 0.0  # bytes of each, where it is known
    head: bool = False


@dataclass(frozen=True)
class Growth:
    """What the cluster's autoscaler can add: so many nodes of each type, and so many in all."""

    types: tuple[tuple[Node, int], ...]
    max_workers: int

    def grown(self, cluster: Sequence[Node], room: Callable[[Node], float]) -> Sequence[Node]:
        """The cluster at its largest: the head, and the nodes with the most `room`. Never less than it is now."""

        def rank(nodes: Sequence[Node]) -> tuple[float, int]:
            return sum(map(room, nodes)), len(nodes)

        workers = [node for node, most in self.types for _ in range(most)]
        workers = sorted(workers, key=room, reverse=True)[: self.max_workers]
        largest = [node for node in cluster if node.head] + workers
        return max(cluster, largest, key=rank)


@dataclass(frozen=True)
class Placement:
    """How the cells of a sweep are placed."""

    concurrent: int  # on the cluster at its largest
    per_worker: dict[str, float]  # Ray resources of one worker
    arithmetic: str
    nodes: int  # at its largest
    workers: int = 1
    worker_bytes: float = 0.0
    growth: Growth | None = None

    def cells_on(self, cluster: Sequence[Node]) -> int:
        """How many cells may be handed out at once, the cluster being what it is by now; the rest wait in Ray."""
        if self.growth:
            cluster = self.growth.grown(cluster, lambda node: _fits(node, self.per_worker))
        return min(_slots(cluster, self.per_worker, self.worker_bytes)) // self.workers


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
        has_token = _has_token() or "RAY_AUTH_TOKEN" in os.environ
        settings["RAY_AUTH_MODE"] = "token" if has_token else "disabled"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def passed_on() -> dict[str, str]:
    """The variables that the workers of a cluster are given, but for those that `ray job submit` gives already."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON") or "{}").get("runtime_env") or {}
    given = job.get("env_vars") or {}
    found = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name) and name not in given}
    return {name: value for name, value in found.items() if "@" not in value}  # a password in an address


def _check_address(address: str) -> None:
    """Whether a cluster answers there and takes this process's token: `ray.init` would need 20 s, and not say why.

    Raises:
        SdditError: it does not, or the address is of a kind that is not used.
    """
    from ray._private.utils import read_ray_address

    mode, host, port = os.environ["RAY_AUTH_MODE"], *address.rpartition(":")[::2]
    if address == "auto":  # this machine's
        host, _, port = (read_ray_address() or "").rpartition(":")
    if "://" in address:
        raise SdditError(
            f"RAY_ADDRESS={address} cannot be used: give the head's host:port, as in 10.0.0.5:6379, and run the "
            "command on a machine of the cluster."
        )
    if mode == "token" and not os.environ.get("RAY_AUTH_TOKEN") and not _has_token():
        raise SdditError(f"RAY_AUTH_MODE is 'token', but there is no token in {_token_file()}. {TOKEN_FIX}")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise SdditError(
            f"No Ray cluster answers at RAY_ADDRESS={address}: {error.strerror or error}. "
            "Start it with `ray start --head`, or unset RAY_ADDRESS."
        ) from None
    # In a process of its own: Ray's client may end its process over a token, or wait for an answer for ever.
    ask = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    command = [sys.executable, "-c", ask, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return  # whatever the matter is, `ray.init` finds it too
    if "InvalidAuthToken" in done.stderr:
        having = f"the one of {_token_file()} is another" if mode == "token" else f"RAY_AUTH_MODE is {mode!r}"
        raise SdditError(f"The Ray cluster at {address} asks for its token, but {having}. {TOKEN_FIX}")


def _has_token() -> bool:
    try:
        return bool(_token_file().read_text().strip())
    except OSError:
        return False


def connect(*, dashboard: bool, cell_threads: int | None = None) -> str:
    """Joins the cluster of `RAY_ADDRESS`, or starts one on this machine. Returns where its logs lie.

    Code is never shipped: on one machine workers run the driver's, and on a cluster the nodes have the project at the
    same path, which the doctor and every cell check. What is in `PASSED_ON` goes along, once for the whole job.

    `dashboard` is for a cluster started here: nested trials stopped early need it to give their workers back. So is
    `cell_threads`, of cells that train in their trial's process: Ray starts a process for each CPU, which then imports
    what such a cell needs while the driver goes on.

    Raises:
        SdditError: no cluster answers, or it wants another token.
    """
    address = os.environ.get("RAY_ADDRESS")
    configure_environment(remote=bool(address))
    import ray

    try:
        with _quiet_stderr():
            if ray.is_initialized():
                pass  # by an earlier call
            elif address:
                _check_address(address)
                environment = {"env_vars": variables} if (variables := passed_on()) else None
                ray.init(
                    address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR
                )  # fmt: skip
            else:
                if cell_threads:
                    os.environ |= {
                        "OMP_NUM_THREADS": str(cell_threads),  # read at import
                        "RAY_preload_python_modules": CELL_MODULES,
                        "RAY_idle_worker_killing_time_threshold_ms": "600000",  # they wait for the first trials
                    }
                try:
                    _start(dashboard)
                except Exception:  # Ray gives its processes 15 s to come up, which a busy machine may miss once
                    _start(dashboard)
    except SdditError:
        raise
    except Exception as error:  # Ray raises its bare class where it does not come up in time
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"No Ray cluster answers at RAY_ADDRESS={address}" if address else "Ray did not start on this machine"
        do = "Start it with `ray start --head`, or unset RAY_ADDRESS." if address else "Is the machine overloaded?"
        raise SdditError(f"{what}: {reason}. {do}") from None
    for name in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are shown in one line, and are in the logs
    return str(Path(ray._private.worker._global_node.get_logs_dir_path()))  # type: ignore[attr-defined]


def _start(dashboard: bool) -> None:
    import ray

    ray.init(include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)


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


def alive() -> list[Node]:
    """The living nodes of the connected cluster, without asking them anything."""
    import ray

    return [_node(n["Resources"]) for n in ray.nodes() if n["Alive"]]


def has_this_node() -> bool:
    """Whether the node through which this process is connected lives: all that it started goes with it."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return any(n["Alive"] for n in ray.nodes() if n["NodeID"] == here)


def _node(resources: Mapping[str, float], gpu_memory: float = 0.0) -> Node:
    cpus, gpus, memory = (resources.get(name, 0) for name in ("CPU", "GPU", "memory"))
    return Node(cpus, gpus, memory, gpu_memory, head="node:__internal_head__" in resources)


def growth() -> Growth | None:
    """What the autoscaler of the cluster of `RAY_ADDRESS` can add, as its configuration says; None where none is found.

    That is the file of `SDDIT_AUTOSCALING_CONFIG`, or what `ray up` leaves on the head. Ray itself does not tell.

    Raises:
        UsageError: the file named cannot be read.
    """
    import yaml

    named = os.environ.get("SDDIT_AUTOSCALING_CONFIG")
    path = Path(named or "~/ray_bootstrap_config.yaml").expanduser()
    if not os.environ.get("RAY_ADDRESS") or not (named or path.exists()):
        return None
    try:
        config = yaml.safe_load(path.read_text())
        head, default = config.get("head_node_type"), int(config.get("max_workers", 2))  # Ray's own default
        types = [
            (_node(entry.get("resources") or {}), int(entry.get("max_workers", default)))
            for name, entry in config["available_node_types"].items()
            if name != head
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        if not named:
            return None
        raise UsageError(
            f"SDDIT_AUTOSCALING_CONFIG={named} is not an autoscaler's configuration ({type(error).__name__}: {error}). "
            "It must hold available_node_types, each with resources and max_workers, as the YAML of `ray up` does."
        ) from None
    return Growth(tuple((node, most) for node, most in types if node.cpus or node.gpus), default)


def nodes() -> list[Node]:
    """The living nodes of the connected cluster, with the memory of their GPUs."""
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
    return [_node(resources, memory.get(node, 0.0)) for node, resources in found]


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
    cluster: Sequence[Node],
    resources: Resources,
    worker_bytes: int,
    *,
    device_bytes: int = 0,
    cells: int = 1,
    growth: Growth | None = None,
) -> Placement:
    """How many cells run at once: no worker straddles nodes, drivers of nested cells take memory and no CPU.

    Where the cluster can grow, it is counted at its largest: cells that wait for nodes are what makes it grow.

    Where nothing is said of GPUs, a worker has one to itself, or cells of one worker share one when there are more
    of them than GPUs and `device_bytes` of each leave room.

    Raises:
        UsageError: not even one cell can ever run on this cluster.
    """
    workers = resources.workers
    gpus = resources.gpus_per_worker
    possible = [*cluster, *(node for node, most in growth.types if most)] if growth else cluster
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in possible) else 0.0
        if gpus and workers == 1:
            gpus = 1 / _sharing(possible, device_bytes, cells)
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if gpus:
        per_worker["GPU"] = gpus
    each = worker_bytes + (NESTED_BYTES / workers if workers > 1 else 0)
    now = cluster
    if growth:
        cluster = growth.grown(cluster, lambda node: _fits(node, per_worker))
    by_compute, by_memory = _slots(cluster, per_worker, each)
    asked = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    where = _describe(cluster) if cluster is now else f"{_describe(now)}, growing to {_describe(cluster)}"
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
            f"{each / GIB:.1f} GiB each, but this cluster ({where}) can never hold more than {max(slots, 0)}. {fix}"
        )
    concurrent = slots // workers
    limit = "compute" if by_compute <= by_memory else "memory"
    arithmetic = (
        f"{where}; {workers} worker{'s' if workers > 1 else ''} a cell, each {asked} and about {each / GIB:.1f} GiB: "
        f"{by_compute} fit by compute, {by_memory} by memory; "
        f"floor({slots} / {workers}) = {concurrent} cell{'s' if concurrent > 1 else ''} at once (limit: {limit})"
    )
    if (fitting := min(_slots(now, per_worker, each)) // workers) < concurrent:
        arithmetic += f": {fitting} now, up to {concurrent} as nodes come"
    return Placement(concurrent, per_worker, arithmetic, len(cluster), workers, each, growth)


def _slots(cluster: Sequence[Node], per_worker: Mapping[str, float], worker_bytes: float) -> tuple[int, int]:
    """How many workers fit by compute, and by memory."""
    by_compute = [_fits(node, per_worker) for node in cluster]
    by_memory = [
        int(node.memory // worker_bytes) if node.memory and worker_bytes else fits
        for node, fits in zip(cluster, by_compute, strict=True)
    ]
    return sum(by_compute), sum(by_memory)


def _describe(cluster: Sequence[Node]) -> str:
    memory = sum(node.memory for node in cluster) / GIB
    parts = [f"{_total(cluster, 'cpus'):g} CPU", f"{_total(cluster, 'gpus'):g} GPU", f"{memory:.0f} GiB"]
    return f"{len(cluster)} node{'s' if len(cluster) != 1 else ''} with {', '.join(parts)}"


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
