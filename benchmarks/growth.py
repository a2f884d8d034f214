"""How costs grow: with the workers of a cell, the cells of a sweep, the nodes of a cluster and the cells of a record.

Each as a line of growth.png and as the exponent b of cost ∝ n^b, fitted to the logarithms: 1 is proportional, 0 does
not grow. Nodes are simulated: they share this machine's cores, so what they show is what the driver does for each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks import overhead
from sddit import results
from sddit.orchestration.sweep import Flags, resolve
from sddit.tracking import SweepRecord, open_client

OUT = Path(__file__).with_name("growth.png")
RATIOS = "[0.0, 0.2, 0.3, 0.5, 0.65]"
WORKERS, TRIALS, NODES, CELLS = (1, 2), (4, 16, 64), (1, 2, 4), (10, 100, 1000)
STEPS = 120  # of the cell whose workers are counted: long beside the variation of a step


@dataclass(frozen=True)
class Growth:
    """What one panel shows: `lines` are values at each of `counts`."""

    of: str
    unit: str
    counts: tuple[int, ...]
    lines: Mapping[str, list[float]]
    target: str = ""

    def exponent(self, line: str) -> float:
        return float(np.polyfit(np.log(self.counts), np.log(self.lines[line]), 1)[0])


def by_workers() -> Growth:
    """Seconds of a training step at a fixed global batch."""
    seconds = []
    for workers in WORKERS:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--steps", str(STEPS), "--set", f"eval.every={STEPS}", "--set", "method.mask_ratio=0.5"]
            overhead.sweep(Path(folder), *flags, "--workers", str(workers))
            table = results.load_results("mask_ratio", f"sqlite:///{folder}/mlflow.db")
            seconds.append(64 / table["train/images_per_s"].iloc[-1])
    return Growth("workers of a cell", "s a step of 64 images", WORKERS, {"step": seconds}, "−1")


def by_trials() -> Growth:
    """Seconds of a cell that are neither training nor evaluation, after the first of each slot."""
    each = []
    for trials in TRIALS:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--set", "method.mask_ratio=[0.2, 0.5]", "--seeds", str(trials // 2)]
            found = overhead.sweep(Path(folder), *overhead.TINY, *flags).overheads[2:]
            each.append(float(np.mean(found)))
    return Growth("cells of a sweep", "s of overhead a cell", TRIALS, {"mean of later cells": each}, "0")


def by_nodes() -> Growth:
    """Seconds from the command to the first training step, and of overhead a cell."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
    from nodes import Nodes  # type: ignore[import-not-found]

    lines: dict[str, list[float]] = {"command to first step": [], "overhead of a later cell": []}
    for count in NODES:
        nodes = Nodes(*[1] * count)
        before = dict(os.environ)
        try:
            os.environ.update(nodes.environment)
            with tempfile.TemporaryDirectory() as folder:
                flags = ["--set", "method.mask_ratio=[0.2, 0.5]", "--seeds", "8"]
                run = overhead.sweep(Path(folder), *overhead.TINY, *flags)
        finally:
            os.environ.clear()
            os.environ.update(before)
            nodes.close()
        lines["command to first step"].append(run.first_step)
        lines["overhead of a later cell"].append(float(np.mean(run.overheads[count:])))
    return Growth("simulated nodes of one CPU", "s", NODES, lines)


def by_cells() -> Growth:
    """Seconds of the commands that read a record with so many finished cells."""
    flags = [*overhead.TINY, "--set", f"method.mask_ratio={RATIOS}"]
    lines: dict[str, list[float]] = {"--plan": [], "nothing to do": [], "figure": []}
    with tempfile.TemporaryDirectory() as folder:
        overhead.sweep(Path(folder), *flags, "--seeds", str(CELLS[0] // 5))
        for cells in CELLS:
            fill(Path(folder), flags, cells // 5)
            again = [str(overhead.ROOT / "sweeps" / "mask_ratio.py"), *flags, "--seeds", str(cells // 5)]
            figure = [str(overhead.ROOT / "analysis" / "plot_mask_ratio.py")]
            for name, command in {"--plan": [*again, "--plan"], "nothing to do": again, "figure": figure}.items():
                begun = time.monotonic()
                subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
                lines[name].append(time.monotonic() - begun)
    return Growth("cells of a record", "s a command", CELLS, lines)


def fill(folder: Path, flags: list[str], seeds: int) -> None:
    """Records the missing seeds as finished cells, with the points of those that were trained."""
    from mlflow.entities import RunTag

    from sweeps.mask_ratio import sweep

    uri = f"sqlite:///{folder}/mlflow.db"
    sets = tuple(value for value in flags if "=" in value)
    job = resolve(sweep, Flags(steps=3, seeds=seeds, set=sets, tracking_uri=uri))
    known = results.load_cells("mask_ratio", uri)
    client, record, points, tags = open_client(uri), SweepRecord(uri, "mask_ratio"), {}, {}
    for row in known[known["seed"] == 0].to_dict("records"):
        ratio = row["params"]["method.mask_ratio"]
        points[ratio] = [m for key in row["metrics"] for m in client.get_metric_history(row["run_id"], key)]
        tags[ratio] = [RunTag(k, v) for k, v in row["tags"].items() if k.startswith(("sddit.protocol", "sddit.noise"))]
        tags[ratio] += [RunTag("sddit.step", "3"), RunTag("sddit.reference_images", "1797")]
    there = set(known["identity"])
    for cell in job.cells:
        if cell.identity not in there:
            run = record.start_cell(
                cell.experiment, identity=cell.identity, data_digest=cell.manifest.digest, label=cell.run_label,
                run_id=None, more_tags=cell.tags,
            )  # fmt: skip
            ratio = cell.experiment.digest_fields()["method.mask_ratio"]
            client.log_batch(run, metrics=points[ratio], tags=tags[ratio])
            record.end_cell(run, "done")


def draw(growths: list[Growth]) -> Figure:
    figure = Figure(figsize=(3.2 * len(growths), 2.8), layout="constrained")
    for axes, growth in zip(figure.subplots(1, len(growths)), growths, strict=True):
        for name, values in growth.lines.items():
            axes.plot(growth.counts, values, "o-", label=f"{name}: b = {growth.exponent(name):.2f}")
        values = np.concatenate(list(growth.lines.values()))
        axes.set(xscale="log", yscale="log", xlabel=growth.of, ylabel=growth.unit)
        axes.set(ylim=(values.min() / 2, values.max() * 3))
        axes.set_xticks(growth.counts, [str(count) for count in growth.counts])
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize=7)
    return figure


def report() -> list[str]:
    """A section of RESULTS.md, and growth.png beside it."""
    parts: list[Callable[[], Growth]] = [by_workers, by_trials, by_nodes, by_cells]
    growths = [part() for part in parts]
    draw(growths).savefig(OUT, dpi=150)
    rows = []
    for growth in growths:
        for name, values in growth.lines.items():
            shown = ", ".join(f"{value:.3g} ({count})" for count, value in zip(growth.counts, values, strict=True))
            rows.append(
                f"| {growth.of} | {name}, {growth.unit} | {shown} | {growth.exponent(name):.2f} | {growth.target} |"
            )
    return [
        "## Growth",
        "",
        "![costs against counts](growth.png)",
        "",
        "Fitted exponents b of cost ∝ n^b. Simulated nodes share this machine's cores.",
        "",
        "| with | what | at (n) | b | ideal |",
        "|---|---|---|---|---|",
        *rows,
    ]
