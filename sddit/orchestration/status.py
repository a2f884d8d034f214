"""`sddit status`: a sweep as its record shows it, from any shell or machine that reaches the record."""

from __future__ import annotations

import json
import time

from sddit import results
from sddit.config import FRESH_SEED
from sddit.orchestration.plan import device_hours, label_of, point_of
from sddit.orchestration.progress import Progress, Row, make_console


def show(sweep: str, tracking_uri: str | None) -> None:
    """Prints the cells of a sweep, who drives it, and what it has cost.

    Raises:
        UsageError: no sweep has this name.
        TrackingError: the record cannot be read.
    """
    _, cells, parent = results.read_sweep(sweep, tracking_uri, metrics=())
    rows, spent = [], 0.0
    for cell in cells.to_dict("records"):
        tags = cell["tags"]
        spent += device_hours(cell)
        label = label_of(point_of(cell, parent.axes)) + (" (fresh)" if cell["seed"] >= FRESH_SEED else "")
        note = (tags.get("sddit.error") or "").strip().splitlines()[-1:]
        rows.append(
            Row(label, cell["seed"], cell["identity"], cell["state"], cell["step"], cell["steps"],
                cell["metrics"].get("eval/fid"), note=note[0] if note else "")
        )  # fmt: skip
    owner = json.loads(parent.tags.get("sddit.owner") or "null")
    if not owner:
        driver = "nobody drives it now"
        for row in rows:
            row.state = "interrupted" if row.state == "running" else row.state
    else:
        silent = time.time() - float(parent.tags.get("sddit.heartbeat") or 0)
        driver = f"driven by process {owner['pid']} on {owner['host']}, last heard of {silent:.0f} s ago"
    spent = max(spent, float(parent.tags.get("sddit.device_hours") or 0))
    optional = {name: parent.tags.get(f"sddit.{name}") for name in ("budget_hours", "price")}
    budget, price = (float(text) if text else None for text in optional.values())
    logs = next((c["tags"].get("sddit.log", "") for c in cells.to_dict("records") if c["state"] == "failed"), "")
    console = make_console()
    progress = Progress(
        f"Sweep {sweep}: {driver}", rows, dict, 1, console, logs,
        spent=lambda: spent, budget=budget, price=price,
    )  # fmt: skip
    console.print(progress.render())
