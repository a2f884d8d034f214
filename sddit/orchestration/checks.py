"""What a node of a cluster must have for a sweep, as checks that run on the node and come back as plain findings.

`sddit.orchestration.doctor` asks every node and compares the answers. Nothing here imports ray, torch or mlflow's
client before it is needed, and no check claims a device.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from sddit.config import Experiment
from sddit.data import DATASETS, Manifest, cache_dir, open_manifest
from sddit.data.remote import has_copy, limit_bytes
from sddit.environment import check_environment, source_digest, versions
from sddit.errors import SdditError, TrackingError, UsageError, without_password
from sddit.filesystem import in_words, is_remote
from sddit.metrics.check import check_evaluation
from sddit.metrics.features import check_extractor
from sddit.orchestration import cluster
from sddit.tracking import code_revision, open_client
from sddit.training.store import CheckpointStore

State = Literal["ok", "warning", "problem"]
GB = 1e9
TORCH_SECONDS = 90.0  # for torch to be imported and to use the GPUs
PORT_SECONDS = 5.0
PORTS = {"https": 443, "postgresql": 5432, "mysql": 3306}
SERVE = "Run MLflow's server where all nodes reach it (sddit serve) and give its address with --tracking-uri"
ACCEPT = "Let the server accept this name: mlflow server --allowed-hosts (sddit serve does)"
SHARE = "Give storage that all nodes reach, as in --storage s3://bucket/runs"
SECRETS = "Credentials are never sent along: every node needs a role or files of its own"
DRIVER = "driver"  # the file in the storage that every node must see


class Finding(NamedTuple):
    """What a check found, and what to do where that is not as it should be."""

    check: str
    state: State
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Need:
    """What a node must have, as plain values, since they travel to nodes whose code may be another."""

    source: str  # digest of the driver's code
    experiments: list[dict[str, Any]]  # those that differ in what they read
    storage: str  # absolute, or an address; empty: not to be looked at
    tracking_uri: str
    digests: dict[str, str] = field(default_factory=dict)  # data.path → what the driver found there
    cells: int = 1
    worker_bytes: int = 0
    device_bytes: int = 0  # of one worker on a GPU
    checkpoint_bytes: int = 0  # of one checkpoint
    mark: str = ""  # the name of the files that the driver left
    on_cluster: bool = False
    resources: dict[str, float] = field(default_factory=dict)  # the node's, as Ray has them


def examine(values: Mapping[str, Any]) -> dict[str, Any]:
    """A node's answer to a `Need` as plain values: what it runs, and what it finds if that is the driver's code."""
    about = {"source": source_digest(), "revision": code_revision(), "versions": versions(), "boot": _boot()}
    findings: list[Finding] = []
    if about["source"] == values["source"]:
        need = Need(**values)
        for check in ON_NODES:
            try:
                findings += check(need)
            except Exception as error:  # a check that fails must not hide the others
                name = check.__name__.removeprefix("check_")
                findings.append(Finding(name, "problem", f"could not be checked: {in_one_line(error)}"))
    return {"about": about, "findings": [tuple(finding) for finding in findings], "time": time.time()}


def check_libraries(need: Need) -> Iterator[Finding]:
    """Whether the environment is that of the lock file."""
    try:
        check_environment()
    except UsageError as error:
        yield Finding("libraries", "problem", str(error), "Run make setup there")


def check_devices(need: Need) -> Iterator[Finding]:
    """Whether torch imports and computes on every GPU, in a process of its own: this one must not claim a device."""
    expected = int(need.resources.get("GPU", 0)) if need.on_cluster else int(cluster.this_machine().gpus)
    environment = dict(os.environ)
    if need.on_cluster:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that asks for none
    try:
        done = subprocess.run(
            [sys.executable, "-c", _USE_DEVICES], capture_output=True, text=True, timeout=TORCH_SECONDS,
            env=environment, check=False,
        )  # fmt: skip
        devices = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        devices, error = None, f"no answer within {TORCH_SECONDS:.0f} s"
    if devices is None:
        yield Finding("devices", "problem", f"torch cannot be used: {error}", "Run make setup there; see nvidia-smi")
        return
    if len(devices) < expected:
        yield Finding(
            "devices", "problem", f"torch sees {len(devices)} of {expected} GPUs",
            "Install a torch build for the GPU's driver (compare nvidia-smi with torch.version.cuda), and "
            "give containers the GPUs",
        )  # fmt: skip
    if not devices:
        yield Finding("devices", "ok", "torch on the CPU" + (", no GPU" if not expected else ""))
        return
    kinds = {(name, total) for name, total, _ in devices}
    text = ", ".join(f"{name} with {total / cluster.GIB:.0f} GiB" for name, total in sorted(kinds))
    yield Finding("devices", "ok", f"{len(devices)} × {text}; each multiplied matrices")
    smallest, needed = min(total for _, total in kinds), need.device_bytes + cluster.CUDA_BYTES
    if needed > smallest:
        yield Finding(
            "devices", "warning",
            f"a worker needs about {needed / cluster.GIB:.0f} GiB, the smallest GPU has {smallest / cluster.GIB:.0f}",
            "Lower train.micro_batch, or use --workers or a smaller model",
        )  # fmt: skip
    if busy := [name for name, total, free in devices if free < 0.8 * total]:
        yield Finding(
            "devices", "warning", f"{len(busy)} of {len(devices)} GPUs are in use by others already", "See nvidia-smi"
        )


_USE_DEVICES = """
import json, torch
found = []
for i in range(torch.cuda.device_count()):
    a = torch.full((512, 512), 2.0, device=f"cuda:{i}")
    assert float((a @ a)[0, 0]) == 2048.0, f"GPU {i} multiplies matrices wrongly"
    free, total = torch.cuda.mem_get_info(i)
    found.append([torch.cuda.get_device_name(i), total, free])
print(json.dumps(found))
"""


def check_cores(need: Need) -> Iterator[Finding]:
    """Whether Ray counts no more CPUs than there are cores."""
    cores, counted = len(os.sched_getaffinity(0)), need.resources.get("CPU", 0)
    if counted > cores:
        yield Finding(
            "cores", "warning", f"{cores} cores, but Ray counts {counted:g} CPUs: cells slow each other down",
            f"Start Ray there with --num-cpus={cores}",
        )  # fmt: skip
    else:
        yield Finding("cores", "ok", f"{cores} cores" + (f", {counted:g} for Ray" if need.on_cluster else ""))


def check_memory(need: Need) -> Iterator[Finding]:
    """Whether Ray's object store and the exchange between GPUs fit into /dev/shm."""
    size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    store = need.resources.get("object_store_memory", 0.0)
    wanted = max(store, cluster.GIB if need.resources.get("GPU") else 0)
    if size < wanted:
        yield Finding(
            "memory", "warning", f"/dev/shm has {size / GB:.1f} GB, where {wanted / GB:.1f} GB are wanted",
            "Enlarge it: docker run --shm-size=…, or in Kubernetes an emptyDir of medium Memory at /dev/shm",
        )  # fmt: skip
    else:
        yield Finding("memory", "ok", "/dev/shm is large enough")


def check_disk(need: Need) -> Iterator[Finding]:
    """Whether the cache, Ray's temporary files and local checkpoints have room."""
    manifests = {e.data.path: _manifest(e) for e in _experiments(need) if is_remote(e.data.path)}
    remote = [m for m in manifests.values() if m]
    files = [(m, file) for m in remote for shard in m.shards for file in (shard.images, shard.labels)]
    copies = sum(file.bytes for m, file in files if not has_copy(m, file))
    if os.environ.get("SDDIT_CACHE_GB"):
        copies = min(copies, limit_bytes())
    places = {
        "the cache": (cache_dir(), "SDDIT_CACHE", copies + GB),
        "temporary files": (Path(tempfile.gettempdir()), "TMPDIR", GB),
    }
    if need.storage and not is_remote(need.storage):
        # The newest two of every cell are kept while a third is written.
        places["checkpoints"] = (Path(need.storage), "--storage", 3 * need.checkpoint_bytes * need.cells)
    short = False
    for what, (path, setting, wanted) in places.items():
        usage = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists()))
        if usage.free < wanted or usage.free < 0.05 * usage.total:
            short = True
            full = usage.free < min(wanted, GB) or (usage.free < 0.05 * usage.total and what == "temporary files")
            yield Finding(
                "disk", "problem" if full else "warning",
                f"{usage.free / GB:.1f} GB are free in {path} for {what}, where about {wanted / GB:.1f} GB may be "
                "needed" + (", and Ray works no more on a disk that is 95% full" if full else ""),
                f"Free some, or choose another place with {setting}",
            )  # fmt: skip
    if not short:
        yield Finding("disk", "ok", "room for " + ", ".join(places))


def check_token(need: Need) -> Iterator[Finding]:
    """How processes are known to each other."""
    if not need.on_cluster:
        yield Finding("token", "ok", "Ray is not started by the doctor; a sweep here keeps it on loopback")
        return
    mode, file = os.environ.get("RAY_AUTH_MODE", "unset"), cluster._token_file()
    if mode != "token":
        yield Finding(
            "token", "warning", f"RAY_AUTH_MODE is {mode}: whoever reaches Ray's ports can run code on every node",
            f"{cluster.TOKEN_FIX} Or keep the cluster in a private network",
        )  # fmt: skip
    elif file.exists() and file.stat().st_mode & 0o077:
        yield Finding("token", "warning", f"{file} can be read by others", f"Run there: chmod 600 {file}")
    else:
        yield Finding("token", "ok", "asked for and given")


def check_storage(need: Need) -> Iterator[Finding]:
    """Whether checkpoints can be written from here, beside what the driver wrote."""
    if not need.storage:
        return
    folder = f"{need.storage.rstrip('/')}/{need.mark}"
    try:
        drivers = CheckpointStore(folder)
        seen = drivers.filesystem.get_file_info(f"{drivers.path}/{DRIVER}").is_file
        if seen:
            CheckpointStore(f"{folder}/{uuid.uuid4().hex}").check_writable()
    except (SdditError, OSError) as error:
        reason = str(error) if isinstance(error, SdditError) else f"{need.storage}: {in_words(need.storage, error)}"
        yield Finding("storage", "problem", reason, SECRETS if is_remote(need.storage) else "")
        return
    if seen:
        yield Finding("storage", "ok", f"{need.storage} takes and gives files" + ", the driver's too" * need.on_cluster)
    else:
        yield Finding(
            "storage", "problem", f"{need.storage} is not the driver's: what that wrote there is not seen from here, "
            "so a cell that moves would begin again", SHARE,
        )  # fmt: skip


def check_tracking(need: Need) -> Iterator[Finding]:
    """Whether the record can be reached from here."""
    uri = need.tracking_uri
    if path := local_record(uri):
        if not Path(f"{path}.{need.mark}").exists():
            yield Finding("tracking", "problem", f"{path} is not the driver's: it lies on another machine", SERVE)
        elif need.on_cluster:
            yield Finding("tracking", "ok", f"{path} is there")
        return
    address = urlsplit(uri)
    port = address.port or PORTS.get(address.scheme.partition("+")[0], 80)
    loopback = address.hostname in ("localhost", "127.0.0.1", "::1")
    try:
        socket.create_connection((address.hostname or "", port), timeout=PORT_SECONDS).close()
    except OSError as error:
        own = f" ({address.hostname} is every node's own)" if loopback else ""
        yield Finding(
            "tracking", "problem",
            f"port {port} of {address.hostname} does not answer{own}: {error.strerror or error}",
            f"Open the port to the nodes in the firewall or security group. {SERVE}",
        )  # fmt: skip
        return
    try:
        open_client(uri)
    except TrackingError as error:
        yield Finding("tracking", "problem", str(error), f"{ACCEPT}. {SECRETS}")
    else:
        yield Finding("tracking", "ok", f"{without_password(uri)} answers")


def check_data(need: Need) -> Iterator[Finding]:
    """Whether the data are here, and those that the cells were planned with."""
    for path in dict.fromkeys(e.data.path for e in _experiments(need)):
        try:
            manifest = open_manifest(path)
        except SdditError as error:
            fix = f"Put the data on storage that all nodes reach (data.path=s3://…), or at {path} on every node"
            if not Path(path).expanduser().is_absolute():
                fix += " as an absolute path: this one is looked up where Ray was started"
            said = path in DATASETS or is_remote(path) or not need.on_cluster  # the error itself says what to do
            yield Finding("data", "problem", str(error), "" if said else fix)
            continue
        if manifest.digest != need.digests.get(path, manifest.digest):
            yield Finding(
                "data", "problem", f"{path} has other data than the driver's (digest {manifest.digest[:12]}, there "
                f"{need.digests[path][:12]})", "Copy the driver's there",
            )  # fmt: skip
        else:
            yield Finding("data", "ok", f"{path}: {manifest.count:,} images, digest {manifest.digest[:12]}")


def check_weights(need: Need) -> Iterator[Finding]:
    """Whether what scores need is here: extractor, reference, and the autoencoder of latents."""
    for experiment in _experiments(need):
        found = [experiment.eval.extractor]
        try:
            manifest = _manifest(experiment)
            if manifest:
                check_evaluation(experiment, manifest)
                found += [f"autoencoder {manifest.vae.name}"] if manifest.vae else []
                found += [f"reference {experiment.eval.reference}"] if experiment.eval.reference else []
            else:
                check_extractor(experiment.eval.extractor)
        except SdditError as error:
            yield Finding("weights", "problem", str(error))
        else:
            yield Finding("weights", "ok", ", ".join(found))


Check = Callable[[Need], Iterable[Finding]]
ON_NODES: tuple[Check, ...] = (
    check_libraries, check_devices, check_cores, check_memory, check_disk, check_token, check_storage,
    check_tracking, check_data, check_weights,
)  # fmt: skip


def _experiments(need: Need) -> list[Experiment]:
    return [Experiment.parse(values) for values in need.experiments]


def _manifest(experiment: Experiment) -> Manifest | None:
    """The data, or None where `check_data` says what is wrong with them."""
    with suppress(SdditError):
        return open_manifest(experiment.data.path)
    return None


def local_record(uri: str) -> Path | None:
    """The file or folder of a record that no server keeps."""
    scheme, _, path = uri.partition(":")
    return Path("/" + path.lstrip("/")) if scheme in ("sqlite", "file") else None


def _boot() -> str:
    """The same for all processes of one machine, in containers as well."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
