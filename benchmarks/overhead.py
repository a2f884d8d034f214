"""What a sweep costs beside the training and evaluation of its cells, and how long until the first step.

The overhead of a cell is what it takes from being handed out to being recorded as done, less its own training and
evaluation. The default sweep as a whole stands against its cells in a bare pool of processes that call the training
loop: no Ray, no MLflow, but the same checkpoints and evaluations. Both count from the first cell handed out to the last
one over, the start of processes and their imports within.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sddit import presets, results
from sddit.config import Experiment
from sddit.orchestration import cluster

ROOT = Path(__file__).parents[1]
RATIOS = (0.0, 0.2, 0.3, 0.5, 0.65, 0.75)  # of the default sweep
TINY = ["--steps", "3", "--set", "eval.every=1", "--set", "eval.samples=16", "--set", "eval.grid=10"]


@dataclass
class Run:
    """One sweep: seconds to the first step and to its evaluation, of all cells together from the first that was handed
    out, and each cell's overhead in their order."""

    first_step: float
    first_evaluated: float
    cells: float
    overheads: list[float]


def sweep(folder: Path, *flags: str) -> Run:
    """Runs the mask-ratio sweep and reads what it took from its lines and from the record."""
    begun = time.monotonic()
    command = [sys.executable, str(ROOT / "sweeps" / "mask_ratio.py"), *flags]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    evaluated, first = None, ""
    assert process.stdout is not None
    for line in process.stdout:
        now = time.monotonic()
        if match := re.search(r"\((\w{12})\): (\w+), step (\d+)/", line):
            identity, state, step = match.groups()
            started.setdefault(identity, now)
            if int(step) > 0 and evaluated is None:
                evaluated, first = now - begun, identity
            if state == "done":
                ended[identity] = now
    if process.wait() or evaluated is None:
        raise SystemExit(f"The sweep failed: {' '.join(command)}")
    uri = f"sqlite:///{folder}/mlflow.db"
    cells = results.load_cells("mask_ratio", uri).to_dict("records")
    table = results.load_results("mask_ratio", uri, metrics=["cost/device_hours"])
    reached = table[table["identity"] == first].sort_values("step")["cost/device_hours"].iloc[0] * 3600
    work = {c["identity"]: c["metrics"]["cost/device_hours"] * 3600 / int(c["tags"]["sddit.workers"]) for c in cells}
    order = sorted(ended, key=lambda identity: started[identity])
    lasted = max(ended.values()) - min(started.values())
    return Run(evaluated - reached, evaluated, lasted, [ended[i] - started[i] - work[i] for i in order])


def train(experiment: Experiment, folder: Path) -> str:
    """A cell of the bare pool: what `sddit.cell` joins, without a record."""
    import torch

    from sddit.data import open_manifest
    from sddit.data.sampler import BatchSampler
    from sddit.data.shards import Shards
    from sddit.methods import build_method
    from sddit.metrics import features
    from sddit.metrics.reference import reference_of
    from sddit.tracking import NullRecord
    from sddit.training import diagnostics, loop
    from sddit.training.store import CheckpointStore

    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(experiment.resources.cpus_per_worker)
    device, manifest = torch.device("cpu"), open_manifest(experiment.data.path)
    metrics = diagnostics.metrics_of(experiment)
    extractor = features.get_extractor(experiment.eval.extractor, device, metrics)
    sampler = BatchSampler.of(experiment, Shards(manifest))
    result = loop.train(
        experiment,
        build_method(experiment, manifest.shape, manifest.num_classes),
        sampler,
        store=CheckpointStore(folder / experiment.identity(manifest.digest)),
        reporter=NullRecord(lambda step, metrics: None),
        extractor=extractor,
        reference=lambda: reference_of(experiment, manifest).load(extractor, metrics),
        device=device,
        held_out=diagnostics.held_out_images(experiment, sampler),
    )
    return result.checkpoint


def pool(experiments: list[Experiment], folder: Path) -> float:
    """Seconds that the cells take in a bare pool of as many processes as a sweep has here."""
    begun = time.monotonic()
    slots = int(cluster.this_machine().cpus) // experiments[0].resources.cpus_per_worker
    with ProcessPoolExecutor(slots, mp_context=multiprocessing.get_context("spawn")) as processes:
        for waiting in [processes.submit(train, experiment, folder) for experiment in experiments]:
            waiting.result()
    return time.monotonic() - begun


def report() -> list[str]:
    """A section of RESULTS.md."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        one = sweep(path, *TINY)
        slots = 2 if len(one.overheads) > 2 else 1
        rows += [
            ("command → first training step, new record", f"{one.first_step:.1f} s", ""),
            ("command → first step evaluated, new record", f"{one.first_evaluated:.1f} s", "20 s"),
            ("overhead of the first cell in a slot, one worker", _spread(one.overheads[:slots]), ""),
            ("overhead of a later cell, one worker", _spread(one.overheads[slots:]), "0.5 s"),
        ]
        begun = time.monotonic()
        subprocess.run(
            [sys.executable, str(ROOT / "sweeps" / "mask_ratio.py"), *TINY], cwd=path, check=True, capture_output=True
        )
        rows.append(("the same command again, nothing to do", f"{time.monotonic() - begun:.1f} s", ""))
        more = sweep(path, *TINY, "--seeds", "2")
        rows.append(("command → first training step, existing record", f"{more.first_step:.1f} s", "18 s"))
    with tempfile.TemporaryDirectory() as folder:
        two = sweep(Path(folder), *TINY, "--workers", "2", "--set", "method.mask_ratio=[0.2, 0.5, 0.75]")
        rows.append(("overhead of a cell, --workers 2", _spread(two.overheads), "40 s"))
    with tempfile.TemporaryDirectory() as folder:
        whole = sweep(Path(folder))
        ideal = pool([presets.digits().replace({"method.mask_ratio": ratio}) for ratio in RATIOS], Path(folder))
        rows.append((f"the {len(RATIOS)} cells of `make sweep`, from the first handed out", f"{whole.cells:.0f} s", ""))
        rows.append(("the same in a bare pool of processes", f"{ideal:.0f} s", ""))
        rows.append(("the sweep takes", f"{whole.cells / ideal:.2f} ×", "1.15 ×"))
    rows += [
        (f"`{what}` (user and system)", f"{processor_seconds(*command):.2f} s", f"{target} s")
        for what, command, target in (
            ("import sddit", ("-c", "import sddit"), 0.3),
            ("sddit --help", ("-m", "sddit", "--help"), 0.5),
        )
    ]
    return [
        "## Overhead",
        "",
        "Median (least … most).",
        "",
        "| | measured | target |",
        "|---|---|---|",
        *(f"| {what} | {measured} | {target} |" for what, measured, target in rows),
    ]


def processor_seconds(*arguments: str) -> float:
    """What a Python command takes of the processor, the least of several times."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


def _spread(seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{seconds[0]:.1f} s"
    return f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} … {max(seconds):.1f})"
