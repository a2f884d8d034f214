"""What docs/scale.md rests on and a machine without accelerators can tell: small real runs, kept in scale.json.

Operators, gradients and the autoencoder's FLOPs are counted on torch's meta device, which computes nothing; all else is
timed here. Run as `python -m benchmarks.scale --measure`; the tracking server's part takes some five minutes.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sddit import presets, seeding
from sddit.config import METHOD_CONFIGS

LATENT, CLASSES, IMAGES = (4, 32, 32), 1000, 1_281_167
CELLS, KEYS, PERIOD, SECONDS = 200, 16, 8.0, 40.0  # the simulated sweep: every cell puts KEYS points each PERIOD
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "detach", "alias",
         "split", "slice", "select", "unbind", "as_strided"}  # operators that launch no kernel  # fmt: skip


def measure(names: Sequence[str]) -> dict[str, Any]:
    """These parts, or all of them, with where and when.

    Raises:
        SystemExit: there is no such part.
    """
    from sddit.orchestration.speed import processor

    parts = {part.__name__: part for part in (counted, streams, store, statistics_of_samples, table, tracking)}
    if unknown := set(names) - set(parts):
        raise SystemExit(f"Unknown: {', '.join(sorted(unknown))}. Known: {', '.join(parts)}.")
    where = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    found: dict[str, Any] = {"machine": where, "date": datetime.date.today().isoformat()}
    return found | {name: parts[name]() for name in names or parts}


# ---------------------------------------------------------------------------------------------------------- counted


def counted() -> dict[str, Any]:
    """Of each method at XL/2: bytes of gradient, DDP's buckets and operators of a step; FLOPs of the VAE's decoder."""
    import torch
    from diffusers import AutoencoderKL
    from torch.distributed import _compute_bucket_assignment_by_size
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    from sddit.methods import build_method
    from sddit.methods.base import Batch

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += str(func).split(".")[1] not in VIEWS
            return func(*args, **(kwargs or {}))

    found: dict[str, Any] = {}
    with torch.device("meta"):
        for name in METHOD_CONFIGS:
            method = build_method(presets.imagenet256("XL/2", name), LATENT, CLASSES).train()
            draws = {stream: torch.empty((2, *shape)) for stream, (_, shape) in method.draws().items()}
            batch = Batch(torch.empty((2, *LATENT)), torch.empty(2, dtype=torch.int64), draws)
            with Operators() as operators, _no_autocast():
                (context,) = method.begin_step([batch], 0)
                method(batch, context, 0).total.backward()
            trained = [p for p in method.parameters() if p.requires_grad]
            gradient = sum(p.grad.nbytes for p in trained if p.grad is not None)
            caps = [2**20, 25 * 2**20]  # DDP's own: a first small bucket, then 25 MiB
            buckets, _ = _compute_bucket_assignment_by_size(
                list[torch.Tensor](trained[::-1]), caps, [False] * len(trained)
            )
            found[name] = {"gradient_bytes": gradient, "buckets": len(buckets), "operators": operators.count}
        vae = AutoencoderKL(  # as sd-vae-ft-ema and -mse
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        with FlopCounterMode(display=False) as flops:
            vae.decode(torch.empty(1, *LATENT))  # type: ignore[attr-defined]
    return {**found, "vae_decode_flops": flops.get_total_flops()}


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Autocast knows no meta device."""
    import torch

    before = torch.autocast
    torch.autocast = lambda *_args, **_options: contextlib.nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = before  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------- host's work


def streams() -> dict[str, float]:
    """Milliseconds, on one core, of what a worker draws for its slice of a step, and of its place in the data."""
    positions = 2_000_000 * 256 + np.arange(256)
    found = {"permuted_256": 1e3 * _least(lambda: seeding.permuted(0, positions, IMAGES))}
    for count in (256, 32, 4, 1):
        found[f"normal_{count}"] = 1e3 * _least(partial(seeding.normal, 0, "noise", 1000, 0, count, LATENT))
    return found


def store(megabytes: int = 600) -> dict[str, float]:
    """MB/s of a checkpoint to this disk by `CheckpointStore`, by its parts, and the memory that it takes on the way."""
    import psutil
    import safetensors.torch
    import torch

    from sddit.training.store import CheckpointStore, _digest

    tensors = {f"layer-{i}": torch.randn(2_500_000) for i in range(megabytes // 10)}
    size = sum(t.nbytes for t in tensors.values()) / 1e6
    found = {
        "digest_mb_s": size / _least(partial(_digest, safetensors.torch.save(tensors)), 3),
        "serialise_mb_s": size / _least(lambda: safetensors.torch.save(tensors), 3),
    }
    process, before, peak, over = psutil.Process(), psutil.Process().memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointStore(folder, keep=1)
        thread = threading.Thread(target=watch)
        thread.start()
        steps = iter(range(10))
        found["save_mb_s"] = size / _least(lambda: checkpoints.save(next(steps), {"training": tensors}, {}), 3)
        over.set()
        thread.join()
        checkpoint = checkpoints.checkpoints()[0]
        found["load_mb_s"] = size / _least(lambda: checkpoint.load("training"), 3)
    return {**found, "extra_memory": max(0.0, peak[0] - before) / 1e6 / size}


def statistics_of_samples() -> dict[str, float]:
    """Seconds, on one core, of FID's distance between two Gaussians of 2,048 features; ms of a batch's moments."""
    import torch

    from sddit.metrics.statistics import Moments, frechet_distance

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((4096, 2048)).astype(np.float32) for _ in range(2)]
    moments = [Moments(), Moments()]
    for each, values in zip(moments, features, strict=True):
        each.update(values)
    pair = [(each.mean, each.covariance()) for each in moments]
    distance = _least(lambda: frechet_distance(*pair[0], *pair[1]), 2)
    return {"distance_s": distance, "update_128_ms": 1e3 * _least(lambda: moments[0].update(features[1][:128]), 5),
            "bytes": float(moments[0].to_array().nbytes)}  # fmt: skip


def table() -> dict[str, float]:
    """Milliseconds to draw the driver's live table of all cells once; it is drawn twice a second."""
    from rich.console import Console

    from sddit.orchestration.progress import Progress, Row

    rows = [Row(f"mask_ratio={i / CELLS:.3f}", 0, f"{i:012x}", "running", i, 400_000, 10.0 + i, "run", 0.0)
            for i in range(CELLS)]  # fmt: skip
    console = Console(file=io.StringIO(), width=160)
    progress = Progress("Sweep", rows, dict, CELLS, console)
    return {"ms": 1e3 * _least(lambda: console.print(progress.render()), 5)}


def _least(call: Callable[[], Any], rounds: int = 7) -> float:
    """Seconds; what else the machine does only adds."""
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


# ---------------------------------------------------------------------------------------------------------- tracking


def tracking() -> dict[str, Any]:
    """A sweep of 200 cells without the training: their records against a real `mlflow server` on sqlite.

    Server, cells and driver share this machine. First each kind of call alone, then cells and the driver's table
    together, in real time and with the classes that sweeps use.
    """
    from benchmarks.reading import server
    from sddit.tracking import CellRecord, SweepRecord

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # artifacts go to the current folder
        with server(f"sqlite:///{Path(folder)}/mlflow.db") as address:
            record = SweepRecord(address, "scale")
            owner = record.claim()
            begun = time.monotonic()
            experiments = [presets.imagenet256("XL/2", "sddit").replace({"seed": i}) for i in range(CELLS)]
            runs = [
                record.start_cell(e, identity=f"{i:012x}", data_digest="d", label=f"cell {i}", run_id=None)
                for i, e in enumerate(experiments)
            ]
            found: dict[str, Any] = {"start_cell_ms": 1e3 * (time.monotonic() - begun) / CELLS}
            cells = [CellRecord(address, run, owned_run=record.parent_id, token=owner.token) for run in runs[:8]]
            found["report_ms"] = 1e3 * _least(lambda: _report(cells[0], 1), 20)
            found["reports_per_s"] = _saturated(cells)
            assert len(record.read_steps()) == CELLS
            found["read_steps_ms"] = 1e3 * _least(record.read_steps, 3)
            for cell in cells:
                cell.close()
            found["together"] = [_together(folder, record, owner.token, runs[:count]) for count in (32, CELLS)]
            owner.release("FINISHED")
        return {**found, "bytes_a_point": _bytes_a_point(f"{folder}/points.db")}


def _report(cell: Any, step: int) -> None:
    """What a cell's sender does with what it has: asks whose the sweep is, and writes."""
    cell.fence()
    cell._send([["points", step, {f"train/metric_{k}": float(step) for k in range(KEYS)}]])


def _saturated(cells: list[Any], seconds: float = 10.0) -> float:
    """Reports a second where eight writers never wait for anything but the server."""
    until = time.monotonic() + seconds

    def write(cell: Any) -> int:
        step = 2
        while time.monotonic() < until:
            _report(cell, step)
            step += 1
        return step - 2

    with ThreadPoolExecutor(len(cells)) as pool:
        return sum(pool.map(write, cells)) / seconds


def _together(folder: str, record: Any, token: str, runs: list[str]) -> dict[str, float]:
    """These cells at once, in two processes, while the driver reads the steps of all, as its table does."""
    command = [sys.executable, "-m", "benchmarks.scale_measured", record.uri, record.parent_id, token]
    root, before = Path(__file__).parents[1], _points(folder)
    writers = [subprocess.Popen([*command, *runs[i::2]], cwd=root, stdout=subprocess.PIPE, text=True) for i in (0, 1)]
    rounds, begun, failed = 0, time.monotonic(), 0
    while any(writer.poll() is None for writer in writers):
        time.sleep(2.0)  # as `Progress` does between two rounds
        rounds += 1
        failed += not _answered(record.read_steps)
    seconds = (time.monotonic() - begun) / rounds
    answers = [[float(word) for word in writer.communicate()[0].split()] for writer in writers]
    put, waiting, _, lost = (sum(a) for a in zip(*answers, strict=True))
    return {
        "cells": len(runs), "period_s": PERIOD, "seconds": SECONDS, "put": put, "stored": _points(folder) - before,
        "still_waiting": waiting, "waited_s": max(a[2] for a in answers), "round_s": seconds,
        "failed_reads": failed, "failed_reports": lost,
    }  # fmt: skip


def _answered(call: Callable[[], Any]) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        call()
    except MlflowException:
        return False
    return True


def _points(folder: str) -> int:
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"{folder}/mlflow.db", timeout=60)) as db:
        return db.execute("SELECT COUNT(*) FROM metrics").fetchone()[0]


def _bytes_a_point(path: str, steps: int = 1000) -> float:
    """By which a sqlite record grows with each point, index included."""
    import sqlite3

    from mlflow.entities import Metric

    from sddit.tracking import SweepRecord

    def size() -> int:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return os.path.getsize(path)

    record = SweepRecord(f"sqlite:///{path}", "points")
    run, before = record.client.get_run(record.parent_id).info, size()
    for first in range(0, steps, 50):
        points = [
            Metric(f"train/metric_{key}", step / 7, run.start_time + step, step)
            for step in range(first, first + 50)
            for key in range(KEYS)
        ]
        record.client.log_batch(run.run_id, points)
    return (size() - before) / (steps * KEYS)


def _write(uri: str, parent: str, token: str, runs: list[str]) -> None:
    """One of the processes of `_together`. Prints the points put, those that still wait at the end, the longest that
    any has waited, and the reports that got no answer and were sent again."""
    import logging

    from sddit import tracking

    warnings: list[Any] = []  # one for each report without an answer
    logging.getLogger("sddit.tracking").addFilter(warnings.append)  # type: ignore[arg-type]  # None: it goes no further
    cells = [tracking.CellRecord(uri, run, owned_run=parent, token=token) for run in runs]
    begun, waited, put = time.monotonic(), 0.0, 0
    due = [begun + PERIOD * i / len(cells) for i in range(len(cells))]
    since: list[float | None] = [None] * len(cells)
    while (now := time.monotonic()) < begun + SECONDS or any(start is not None for start in since):
        for i, cell in enumerate(cells):
            if not cell.pending():
                since[i] = None
            elif (start := since[i]) is not None:
                waited = max(waited, now - start)
            if due[i] <= now < begun + SECONDS:
                cell.points(round(now * 1000), {f"train/metric_{k}": now for k in range(KEYS)})
                since[i] = since[i] or now
                due[i] += PERIOD
                put += KEYS
        if now > begun + 2 * SECONDS:  # it falls behind for good
            break
        time.sleep(0.2)
    waiting = sum(len(item[2]) for cell in cells for item in cell.pending())
    print(put, waiting, waited, len(warnings), flush=True)
    os._exit(0)  # what still waits is not written


if __name__ == "__main__":
    _write(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
