"""`sddit doctor`: what would fail a sweep on a node, found before anything is spent, with what to do about it.

Every node is asked by one task that claims nothing (ray-cluster.md §6). The answers are compared with this process, and
equal ones share a line. Without a cluster the same checks look at this machine, and Ray is not started.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from sddit import cost
from sddit.config import Experiment
from sddit.data import Manifest, open_manifest
from sddit.environment import SAME_CODE, source_digest, versions
from sddit.errors import SdditError, TrackingError, UsageError, without_password
from sddit.filesystem import is_remote
from sddit.orchestration import cluster
from sddit.orchestration.checks import (
    DRIVER,
    SERVE,
    SHARE,
    Finding,
    Need,
    examine,
    in_one_line,
    local_record,
)
from sddit.orchestration.progress import make_console
from sddit.tracking import check_writable, code_revision, resolve_uri
from sddit.training.store import CheckpointStore

if TYPE_CHECKING:
    from sddit.orchestration.sweep import Job

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
ORDER = (
    "capacity", "autoscaler", "code", "libraries", "devices", "cores", "memory", "disk", "clock", "token", "storage",
    "tracking", "data", "weights",
)  # fmt: skip
ANSWER_SECONDS = 120.0  # for a node to answer: it starts a process, which imports torch in another
CLOCK_SECONDS = 1.0  # that clocks may differ
MONITOR_SECONDS = 60.0  # that a living autoscaler may be silent; it writes every few seconds
MARK = "sddit-doctor-"  # what the driver leaves for the nodes to see, and takes away again, begins with it


class Line(NamedTuple):
    """A finding with the nodes that share it; none where it is the driver's own."""

    finding: Finding
    nodes: tuple[str, ...] = ()


def need_of(cells: Sequence[tuple[Experiment, Manifest | None]], *, storage: str, tracking_uri: str) -> Need:
    """What the cells of a sweep need; each with its data, where they could be opened."""
    distinct: dict[tuple[Any, ...], tuple[Experiment, Manifest | None]] = {}
    sizes = [(0, 0, 0)]
    for experiment, manifest in cells:
        data, options = experiment.data, experiment.eval
        key = (data.path, data.test_path, data.vae, options.extractor, options.reference, options.metrics)
        distinct.setdefault(key, (experiment, manifest))
        if manifest:
            what = experiment, manifest.shape, manifest.num_classes
            sizes.append((cost.worker_bytes(*what), sum(cost.training_bytes(*what)), cost.checkpoint_bytes(*what)))
    worker, device, checkpoint = map(max, zip(*sizes, strict=True))
    return Need(
        source_digest(),
        [experiment.model_dump() for experiment, _ in distinct.values()],
        storage,
        tracking_uri,
        {e.data.path: manifest.digest for e, manifest in distinct.values() if manifest},
        len(cells),
        worker,
        device,
        checkpoint,
    )


def diagnose(need: Need, *, connected: bool) -> list[Line]:
    """All findings; of every living node where `connected`, else of this machine."""
    need = replace(need, mark=f"{MARK}{uuid.uuid4().hex[:12]}", on_cluster=connected)
    with _marks(need) as (need, own):
        own += check_record(need.tracking_uri)
        answers = _ask_nodes(need) if connected else {"this machine": examine(asdict(need))}
    if connected:
        machines = {answer["about"]["boot"] for answer in answers.values() if "about" in answer}
        can_grow = _can_grow()
        own += check_sharing(need, len(machines), can_grow=can_grow)
        own += check_autoscaler(Path(cluster.connect(dashboard=False))) if can_grow else ()
    by_node = {name: list(judge(answer, need.source)) for name, answer in answers.items()}
    return grouped(own, by_node)


def judge(answer: Mapping[str, Any], source: str) -> Iterator[Finding]:
    """A node's findings, with what the driver sees in its answer: other code, other libraries, another time."""
    if "error" in answer:
        yield Finding("code", "problem", f"the project cannot be used: {answer['error']}", f"{SAME_CODE}, make setup")
        return
    about, mine = answer["about"], versions()
    if about["source"] != source:
        yield Finding(
            "code", "problem",
            f"runs other code ({about['revision']}, source {about['source']}) than the driver ({code_revision()}, "
            f"source {source}); nothing else was looked at", SAME_CODE,
        )  # fmt: skip
    else:
        yield Finding("code", "ok", f"revision {about['revision']}, source {about['source']}")
    other = [f"{name} {theirs} (driver: {mine[name]})" for name, theirs in about["versions"].items()
             if theirs != mine.get(name)]  # fmt: skip
    if other:
        yield Finding("libraries", "problem", ", ".join(other), "Make the same environment there: make setup")
    elif "missing" in mine.values():
        names = ", ".join(name for name, version in mine.items() if version == "missing")
        yield Finding("libraries", "problem", f"{names} is not installed", "Run make setup")
    else:
        yield Finding("libraries", "ok", ", ".join(f"{name} {version}" for name, version in mine.items()))
    if (behind := answer.get("arrived", answer["time"]) - answer["time"]) and abs(behind) > CLOCK_SECONDS:
        yield Finding(
            "clock", "warning", f"{abs(behind):.0f} s {'behind' if behind > 0 else 'before'} the driver's",
            "Keep time there, e.g. with chrony",
        )  # fmt: skip
    elif "arrived" in answer:
        yield Finding("clock", "ok", "within a second of the driver's")
    for values in answer["findings"]:
        yield Finding(*values)


def grouped(own: Sequence[Finding], found: Mapping[str, Sequence[Finding]]) -> list[Line]:
    """The driver's `own` findings and those of each node, where equal ones share a line; by check, the worst last."""
    nodes: dict[Finding, list[str]] = {}
    for name, findings in found.items():
        for finding in dict.fromkeys(findings):
            nodes.setdefault(finding, []).append(name)
    lines = [Line(finding) for finding in own] + [Line(finding, tuple(names)) for finding, names in nodes.items()]
    states = list(STYLES)
    return sorted(lines, key=lambda line: (ORDER.index(line.finding.check), states.index(line.finding.state)))


def as_text(line: Line, total: int) -> str:
    """A line as it is shown; `total` nodes were asked."""
    state, names = line.finding.state, line.nodes
    if total == 1 or not names:
        where = ""
    elif len(names) == total:
        where = f"{total} nodes: "
    else:
        some = ", ".join(names[:4])
        where = f"{some}: " if len(names) <= 4 else f"{len(names)} of {total} nodes ({some}, …): "
    text, fix = (" ".join(words.split()).rstrip(".") for words in (line.finding.text, line.finding.fix))
    return f"{state:<8} {line.finding.check:<10} {where}{text}.{f' → {fix}.' if fix else ''}"


def _ask_nodes(need: Need) -> dict[str, dict[str, Any]]:
    """The answer of every living node by its name, or in 'error' why there is none; with when it 'arrived'."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def probe(values: dict[str, Any]) -> dict[str, Any]:
        # Travels by value, and so reaches a node whose code is another, or missing.
        from sddit.orchestration.checks import examine

        return examine(values)

    alive = [node for node in ray.nodes() if node["Alive"]]
    names = _names(alive)
    task = ray.remote(num_cpus=0, max_retries=0)(probe)
    waiting, answers = {}, {}
    for node in alive:
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        values = asdict(replace(need, resources=node["Resources"]))
        waiting[task.options(scheduling_strategy=on_node).remote(values)] = names[node["NodeID"]]
    until = time.monotonic() + ANSWER_SECONDS
    while waiting and (left := until - time.monotonic()) > 0:
        for reference in ray.wait(list(waiting), num_returns=1, timeout=left)[0]:
            arrived, name = time.time(), waiting.pop(reference)
            try:
                answers[name] = ray.get(reference) | {"arrived": arrived}
            except Exception as error:  # whatever its code, or its end, raised
                answers[name] = {"error": in_one_line(error)}
    for reference, name in waiting.items():
        ray.cancel(reference, force=True)
        answers[name] = {"error": f"no answer within {ANSWER_SECONDS:.0f} s"}
    alive_now = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # one that went away meanwhile is no problem
    return {name: answers[name] for node, name in names.items() if node in alive_now or "error" not in answers[name]}


def _names(alive: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Node id → address, with a part of the id where several nodes share one."""
    addresses = [node["NodeManagerAddress"] for node in alive]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"
        for node, address in zip(alive, addresses, strict=True)
    }


@contextlib.contextmanager
def _marks(need: Need) -> Iterator[tuple[Need, list[Finding]]]:
    """Leaves something for the nodes to see in the storage, and beside a record that is a file; then takes it away.

    Where the storage cannot be written to, that is found here, and the nodes are not asked for it.
    """
    found: list[Finding] = []
    with contextlib.ExitStack() as afterwards:
        if path := local_record(need.tracking_uri):
            with contextlib.suppress(OSError):  # `check_record` says so
                mark = Path(f"{path}.{need.mark}")
                mark.touch()
                afterwards.callback(mark.unlink, missing_ok=True)
        root, store = CheckpointStore(need.storage), CheckpointStore(f"{need.storage.rstrip('/')}/{need.mark}")
        try:
            path = Path(root.path)
            made = [] if is_remote(need.storage) else [p for p in (path, *path.parents) if not p.exists()]
            afterwards.callback(_remove, store, made)
            store.check_writable()
            with store.filesystem.open_output_stream(f"{store.path}/{DRIVER}") as file:  # a bucket has no empty folders
                file.write(need.mark.encode())
        except (SdditError, OSError) as error:
            found.append(Finding("storage", "problem", in_one_line(error)))
            need = replace(need, storage="")
        yield need, found


def _remove(store: CheckpointStore, made: Sequence[Path]) -> None:
    """The doctor's folder, and those above it that were `made` for it and are empty again."""
    with contextlib.suppress(OSError):
        store.filesystem.delete_dir(store.path)
        for folder in made:
            folder.rmdir()


def check_record(uri: str) -> Iterator[Finding]:
    """Whether the driver can write to the record, which is left as it was."""
    path = local_record(uri)
    if path and not path.exists():
        folder = next(p for p in path.parents if p.exists())
        if folder.is_dir() and os.access(folder, os.W_OK):
            yield Finding("tracking", "ok", f"{path} will be made")
        else:
            yield Finding(
                "tracking", "problem", f"{folder} is no folder that can be written to", "Use another --tracking-uri"
            )
        return
    try:
        check_writable(uri)
    except TrackingError as error:
        yield Finding("tracking", "problem", str(error))
        return
    yield Finding("tracking", "ok", f"{without_password(uri)} can be written to")


def check_sharing(need: Need, machines: int, *, can_grow: bool) -> Iterator[Finding]:
    """Whether what works on one machine is asked of several, or may be: of nodes that join later nothing is known."""
    later = "nodes that join later lie on other machines"
    if path := local_record(need.tracking_uri):
        if machines > 1:
            yield Finding(
                "tracking", "problem", f"{path} is a file, which several machines cannot write to at once, on a shared "
                "file system either", SERVE,
            )  # fmt: skip
        elif can_grow:
            yield Finding("tracking", "warning", f"{path} is a file of this machine, and {later}", SERVE)
    if need.storage and not is_remote(need.storage) and can_grow:
        yield Finding("storage", "warning", f"{need.storage} is a path of this machine, and {later}", SHARE)


def check_autoscaler(logs: Path) -> Iterator[Finding]:
    """Whether what adds nodes is alive, where this is the head: `ray start` does not tell when it died (ray-cluster.md
    §5), and cells would wait for ever."""
    log = logs / "monitor.log"
    if not log.exists():
        return
    if (silent := time.time() - log.stat().st_mtime) > MONITOR_SECONDS:
        fix = f"See {log.with_suffix('.err')}, and start the head again"
        yield Finding("autoscaler", "warning", f"has written nothing for {silent:.0f} s, so it may be dead", fix)
    else:
        yield Finding("autoscaler", "ok", "alive")


def _can_grow() -> bool:
    growth = cluster.growth()
    return growth is not None and any(most for _, most in growth.types)


# ---------------------------------------------------------------------------------------------- the command, the sweep


def before_sweep(job: Job, console: Console) -> None:
    """At the start of a sweep on several nodes: warnings are printed.

    Raises:
        SdditError: there are problems, which are named.
    """
    begun, nodes = time.monotonic(), len(cluster.alive())
    if nodes < 2 and not _can_grow():
        return
    cells = [(cell.experiment, cell.manifest) for cell in job.cells]
    if not cells:  # of a search that has not begun
        cells = [(job.base, open_manifest(job.base.data.path))]
    lines = diagnose(need_of(cells, storage=job.storage, tracking_uri=job.uri), connected=True)
    for line in lines:
        if line.finding.state == "warning":
            console.print(as_text(line, nodes), style=STYLES["warning"])
    if problems := [as_text(line, nodes) for line in lines if line.finding.state == "problem"]:
        raise SdditError("\n".join(["The cluster is not ready, so nothing was started:", *problems]))
    seconds = time.monotonic() - begun
    console.print(f"Doctor: {nodes} node{'s' * (nodes > 1)} without a problem, asked in {seconds:.0f} s.")


def run(experiment: Experiment, *, storage: str, tracking_uri: str | None) -> None:
    """The command: every finding on a line of its own.

    Raises:
        SdditError: there is a problem.
    """
    try:
        manifest = open_manifest(experiment.data.path)
    except SdditError:
        manifest = None  # the nodes say so, this one among them
    console = make_console()
    need = need_of(
        [(experiment, manifest)],
        storage=storage if "://" in storage else str(Path(storage).absolute()),
        tracking_uri=resolve_uri(tracking_uri),
    )
    if not os.environ.get("RAY_ADDRESS"):
        capacity = check_capacity(need, experiment, [cluster.this_machine()])
        _show([Line(capacity), *diagnose(need, connected=False)], 1, console)
        return
    cluster.connect(dashboard=False)
    import ray

    try:
        nodes = cluster.nodes()
        lines = [Line(check_capacity(need, experiment, nodes)), *diagnose(need, connected=True)]
    finally:
        ray.shutdown()
    _show(lines, len(nodes), console)


def check_capacity(need: Need, experiment: Experiment, nodes: Sequence[cluster.Node]) -> Finding:
    """Whether a cell can ever run."""
    try:
        placement = cluster.place(
            nodes, experiment.resources, need.worker_bytes, device_bytes=need.device_bytes, growth=cluster.growth()
        )
    except UsageError as error:
        return Finding("capacity", "problem", str(error))
    return Finding("capacity", "ok", placement.arithmetic)


def _show(lines: Sequence[Line], total: int, console: Console) -> None:
    for line in lines:
        console.print(as_text(line, total), style=STYLES[line.finding.state] if console.is_terminal else None)
    states = [line.finding.state for line in lines]
    if problems := states.count("problem"):
        raise SdditError(f"{problems} problem{'s' * (problems > 1)} to solve before anything runs here.")
    warnings = states.count("warning")
    console.print(f"Ready, with {warnings} warning{'s' * (warnings > 1)}." if warnings else "Ready.")
