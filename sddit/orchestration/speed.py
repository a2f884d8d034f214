"""How fast one worker of this machine is: measured once per kind of experiment, kept in the cache.

After a sweep the speed that its cells really had replaces the calibration, so predictions improve with use.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from sddit import cost
from sddit.config import Experiment
from sddit.data import cache_dir, open_manifest
from sddit.errors import SdditError


def of_this_machine(base: Experiment, console: Console) -> cost.Speed:
    """The speed remembered for experiments like `base`, or that of a calibration of some seconds in a process of its
    own (the driver imports no torch)."""
    known = _read().get(_key(base))
    if known:
        return cost.Speed(**known)
    console.print("Measuring the speed of this machine (once, some seconds) …", style="dim")
    command = [sys.executable, "-m", "sddit.training.calibrate"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(base.resources.cpus_per_worker)}
    done = subprocess.run(
        command, input=base.model_dump_json(), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SdditError(f"The calibration failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    measured = cost.Speed(**json.loads(done.stdout.splitlines()[-1]))
    _write(_key(base), measured)
    return measured


def remember(base: Experiment, cells: pd.DataFrame) -> None:
    """Keeps the speed that finished cells (`sddit.results.load_cells`) had, for later plans."""
    shape = open_manifest(base.data.path).shape
    speeds = [s for row in cells.to_dict("records") if row["state"] == "done" if (s := _measured(base, shape, row))]
    if speeds:
        medians = (statistics.median(getattr(s, part) for s in speeds) for part in ("training", "sampling"))
        _write(_key(base), cost.Speed(*medians))


def _measured(base: Experiment, shape: cost.Shape, row: Mapping[Any, Any]) -> cost.Speed | None:
    metrics, params = row["metrics"], row["params"]
    workers = int(row["tags"].get("sddit.workers", 1))
    rate, hours = metrics.get("train/images_per_s"), metrics.get("cost/device_hours")
    experiment = base.replace({k: v for k, v in params.items() if k.startswith("method.") and k != "method.name"})
    evaluations = cost.num_evaluations(experiment.replace({"train.steps": row["step"]})) if row["step"] else 0
    if not rate or not hours or not evaluations:
        return None
    training = workers / (rate * cost.training_flops_per_image(experiment, shape))
    left = hours * 3600 - row["step"] * experiment.train.batch_size / rate * workers
    sampled = evaluations * experiment.eval.samples * cost.sampling_flops_per_image(experiment, shape)
    return cost.Speed(training, left / sampled) if left > 0 else None


def _key(base: Experiment) -> str:
    model, train = base.model, base.train
    parts = [processor(), base.method.name, model.size, model.grid, train.batch_size, train.precision]
    return " | ".join(map(str, [*parts, base.data.path, base.resources.cpus_per_worker]))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read() -> dict[str, Any]:
    try:
        return json.loads((cache_dir() / "speed.json").read_text())
    except (OSError, ValueError):
        return {}


def _write(key: str, measured: cost.Speed) -> None:
    path = cache_dir() / "speed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({**_read(), key: asdict(measured)}, indent=1))
    part.replace(path)
