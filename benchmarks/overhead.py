"""What a cell costs beside its training and evaluation, and how long until the first step.

Overhead is what a cell takes from being handed out to being recorded as done, less its own training and evaluation.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sddit import results

ROOT = Path(__file__).parents[1]
TINY = ["--steps", "3", "--set", "eval.every=1", "--set", "eval.samples=16", "--set", "eval.grid=10"]


@dataclass
class Run:
    """One sweep of tiny cells: seconds to the first evaluated step, and each cell's overhead in its order."""

    first_step: float
    total: float
    overheads: list[float]


def sweep(folder: Path, *flags: str) -> Run:
    """Runs the mask-ratio sweep with tiny cells and reads what it took from its lines and from the record."""
    begun = time.monotonic()
    command = [sys.executable, str(ROOT / "sweeps" / "mask_ratio.py"), *TINY, *flags]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    first_step = None
    assert process.stdout is not None
    for line in process.stdout:
        now = time.monotonic()
        if match := re.search(r"\((\w{12})\): (\w+), step (\d+)/", line):
            identity, state, step = match.groups()
            started.setdefault(identity, now)
            if int(step) > 0 and first_step is None:
                first_step = now - begun
            if state == "done":
                ended[identity] = now
    if process.wait() or first_step is None:
        raise SystemExit(f"The sweep failed: {' '.join(command)}")
    cells = results.load_cells("mask_ratio", f"sqlite:///{folder}/mlflow.db").to_dict("records")
    work = {c["identity"]: c["metrics"]["cost/device_hours"] * 3600 / int(c["tags"]["sddit.workers"]) for c in cells}
    order = sorted(ended, key=lambda identity: started[identity])
    return Run(first_step, time.monotonic() - begun, [ended[i] - started[i] - work[i] for i in order])


def report() -> list[str]:
    """A section of RESULTS.md."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        one = sweep(path)
        slots = 2 if len(one.overheads) > 2 else 1
        later = one.overheads[slots:]
        rows += [
            ("command → first step evaluated, new record", f"{one.first_step:.1f} s", "20 s"),
            ("overhead of the first cell in a slot, one worker", _spread(one.overheads[:slots]), ""),
            ("overhead of a later cell, one worker", _spread(later), "1 s"),
        ]
        begun = time.monotonic()
        subprocess.run(
            [sys.executable, str(ROOT / "sweeps" / "mask_ratio.py"), *TINY], cwd=path, check=True, capture_output=True
        )
        rows.append(("the same command again, nothing to do", f"{time.monotonic() - begun:.1f} s", ""))
    with tempfile.TemporaryDirectory() as folder:
        two = sweep(Path(folder), "--workers", "2", "--set", "method.mask_ratio=[0.2, 0.5, 0.75]")
        rows.append(("overhead of a cell, --workers 2", _spread(two.overheads), "40 s"))
    return [
        "## Overhead",
        "",
        "Median (least … most).",
        "",
        "| | measured | target |",
        "|---|---|---|",
        *(f"| {what} | {measured} | {target} |" for what, measured, target in rows),
    ]


def _spread(seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{seconds[0]:.1f} s"
    return f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} … {max(seconds):.1f})"
