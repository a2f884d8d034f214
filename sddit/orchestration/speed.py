"""How fast one worker of this machine is: measured once per kind of experiment, kept in the cache.

After a sweep the speed that its cells really had replaces the calibration, so predictions improve with use.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from sddit import cost
from sddit.config import Experiment
from sddit.data import cache_dir
from sddit.errors import SdditError
from sddit.orchestration import cluster
from sddit.orchestration.plan import Cell

MOST_ON_CPU, MOST_ON_GPU = 2e11, 2e14  # FLOPs of a step that is timed some twenty times, with a few samples


class Speeds:
    """What is known of this machine's speed, by kind of experiment."""

    def __init__(self) -> None:
        self.known = _read()

    def measure(
        self, experiments: Iterable[Experiment], shape: cost.Shape, side_by_side: int, console: Console
    ) -> None:
        """Calibrates what is not known yet, some seconds a kind, in processes of their own (the driver imports no
        torch): as many as cells will run side by side, since they share caches and memory. What would take this
        machine minutes is left unknown.

        Raises:
            SdditError: the calibration failed.
        """
        kinds = {_key(e): e for e in experiments if _key(e) not in self.known}
        most = MOST_ON_GPU if cluster.this_machine().gpus else MOST_ON_CPU
        large = [k for k, e in kinds.items() if cost.training_flops_per_image(e, shape) * e.train.batch_size > most]
        for key in large:
            console.print(f"Speed of {kinds.pop(key).model.size} not measured: a step takes this machine too long.")
        if not kinds:
            return
        number = f"{len(kinds)} kinds of experiment" if len(kinds) > 1 else "one kind of experiment"
        console.print(f"Measuring the speed of this machine for {number}, some seconds each, once …", style="dim")
        asked = json.dumps([e.model_dump(mode="json") for e in kinds.values()])
        threads = {"OMP_NUM_THREADS": str(next(iter(kinds.values())).resources.cpus_per_worker)}
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "sddit.training.calibrate"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **threads},
            )
            for _ in range(side_by_side)
        ]  # fmt: skip
        for process in running:
            assert process.stdin
            process.stdin.write(asked)
            process.stdin.close()
            process.stdin = None  # `communicate` would close it again
        answers = []
        for process in running:
            output, errors = process.communicate()
            if process.returncode:
                raise SdditError(f"The calibration failed: {(errors.strip().splitlines() or ['no message'])[-1]}")
            answers.append([cost.Speed(**speed) for speed in json.loads(output.splitlines()[-1])])
        for key, speeds in zip(kinds, zip(*answers, strict=True), strict=True):
            self._keep(key, speeds)

    def seconds(self, experiment: Experiment, shape: cost.Shape, from_step: int = 0) -> float | None:
        """Predicted seconds of the rest of a cell on its workers; None where its kind was never measured."""
        speed = self.known.get(_key(experiment))
        return speed.seconds(experiment, shape, from_step) if speed else None

    def learn(self, cells: Iterable[tuple[Cell, Mapping[Any, Any]]]) -> None:
        """Keeps the speed that done cells had, each given with its record (a row of `sddit.results.load_cells`)."""
        found = defaultdict(list)
        for cell, row in cells:
            if speed := _measured(cell, row):
                found[_key(cell.experiment)].append(speed)
        for key, speeds in found.items():
            self._keep(key, speeds)

    def _keep(self, key: str, speeds: Iterable[cost.Speed]) -> None:
        speeds = list(speeds)
        self.known[key] = cost.Speed(
            *(statistics.median(getattr(speed, part) for speed in speeds) for part in ("training", "sampling"))
        )
        _write(key, self.known[key])


def _measured(cell: Cell, row: Mapping[Any, Any]) -> cost.Speed | None:
    metrics, shape = row["metrics"], cell.manifest.shape
    workers = int(row["tags"].get("sddit.workers", 1))
    rate, hours = metrics.get("train/images_per_s"), metrics.get("cost/device_hours")
    if not rate or not hours or not row["step"]:
        return None
    experiment = cell.experiment.replace({"train.steps": row["step"]})
    training = workers / (rate * cost.training_flops_per_image(experiment, shape))
    left = hours * 3600 - row["step"] * experiment.train.batch_size / rate * workers
    images = cost.num_evaluations(experiment) * experiment.eval.samples
    sampled = images * cost.sampling_flops_per_image(experiment, shape)
    return cost.Speed(training, left / sampled) if left > 0 else None


def _key(experiment: Experiment) -> str:
    model, train, resources = experiment.model, experiment.train, experiment.resources
    gpu = cluster.this_machine().gpus and resources.gpus_per_worker != 0
    parts = ["GPU" if gpu else processor(), experiment.method.name, experiment.diffusion.kind, model.size, model.grid]
    return " | ".join(
        map(str, [*parts, train.batch_size, train.precision, experiment.data.path, resources.cpus_per_worker])
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read() -> dict[str, cost.Speed]:
    try:
        return {key: cost.Speed(**speed) for key, speed in json.loads((cache_dir() / "speed.json").read_text()).items()}
    except (OSError, ValueError, TypeError):
        return {}


def _write(key: str, measured: cost.Speed) -> None:
    path = cache_dir() / "speed.json"
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a calibration, no sweep
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({k: asdict(v) for k, v in {**_read(), key: measured}.items()}, indent=1))
        part.replace(path)
