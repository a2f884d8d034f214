"""What a sweep ends with: the best cell, the figures and the report, on disk and on the sweep's run."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from sddit.config import FRESH_SEED
from sddit.errors import SdditError, without_password
from sddit.intervals import t_interval
from sddit.orchestration.plan import label_of, point_of
from sddit.tracking import VIEW, SweepRecord

if TYPE_CHECKING:
    from sddit.orchestration.sweep import Job

FIGURES = Path("figures")


def finish(job: Job, record: SweepRecord, console: Console) -> None:
    """Says what is lowest, draws, reports, and shows where to look. What cannot be drawn yet is said, not raised."""
    from sddit import results

    cells = results.load_cells(job.name, job.uri)
    for line in best_lines(cells, job.axes):
        console.print(line)
    files: list[Path] = []
    for module in job.sweep.figures:
        files += _drawn(module, console, lambda draw: draw.figure(job.name, job.uri, FIGURES))
    for path in files:
        record.artifact(path)
    for path in _drawn("analysis.report", console, lambda draw: [draw.report(job.name, job.uri, FIGURES, files)]):
        record.artifact(path, "report.html")
    if job.searches and job.journal.exists():
        record.artifact(job.journal)
        console.print(f"Optuna's dashboard: optuna-dashboard {job.journal}")
    console.print(f"MLflow UI: {ui_line(job.uri)}")
    link = ui_link(job.uri, record.experiment_id)
    console.print(f"  then open {link} or, for charts, {link}&compareRunsMode=CHART")


def _drawn(module: str, console: Console, draw: Callable[[Any], list[Path]]) -> list[Path]:
    """The files that a module of `analysis` draws; none, and the reason, where it cannot."""
    try:
        return draw(importlib.import_module(module))
    except Exception as error:  # whatever it is, what was trained is done and recorded
        kind = "" if isinstance(error, SdditError) else f"{type(error).__name__} while drawing: "
        console.print(f"{module.rpartition('.')[2]}: {kind}{error}")
        return []


def best_lines(cells: pd.DataFrame, axes: list[str]) -> list[str]:
    """The setting with the lowest mean FID at the last step, as what it is: picked; then what fresh seeds gave it."""
    rows = [r for r in cells.to_dict("records") if r["state"] == "done" and "eval/fid" in r["metrics"]]
    if not rows:
        return ["No cell is done yet."]
    rows = [row for row in rows if row["step"] == max(row["step"] for row in rows)]  # only equal lengths compare
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        label = label_of(point_of(row, axes))
        scores.setdefault(label, {})[row["seed"]] = row["metrics"]["eval/fid"]
    picked = {k: [f for seed, f in v.items() if seed < FRESH_SEED] for k, v in scores.items()}
    picked = {k: v for k, v in picked.items() if v}
    best = min(picked, key=lambda label: sum(picked[label]) / len(picked[label]))
    lines = [
        f"Lowest FID at the last step: {_with_interval(picked[best])} ({best}); the lowest of {len(picked)}, so itself "
        "a lucky draw."
    ]
    if fresh := [f for seed, f in scores[best].items() if seed >= FRESH_SEED]:
        lines.append(f"With fresh seeds, which did not pick it: {_with_interval(fresh)}.")
    elif len(picked) > 1:
        lines[0] += " --confirm 3 trains it with fresh seeds."
    return lines


def _with_interval(values: list[float]) -> str:
    mean, low, high = t_interval(values)
    if len(values) == 1:
        return f"{mean:.2f}, one seed"
    return f"{mean:.2f} [{low:.2f}, {high:.2f}] over {len(values)} seeds"


def ui_line(uri: str) -> str:
    """The command that opens the MLflow UI on this record."""
    if uri.startswith("http"):
        return f"it runs at {without_password(uri)}"
    mlflow = Path(sys.executable).parent / "mlflow"
    return without_password(shlex.join([str(mlflow), "ui", "--workers", "1", "--backend-store-uri", uri]))


def ui_link(uri: str, experiment_id: str) -> str:
    """The cells of a sweep as a table sorted by FID, in the view that the tracker made."""
    root = without_password(uri.rstrip("/")) if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{root}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
