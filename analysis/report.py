"""The report of a sweep: one file that answers its question, shows what the answer rests on and how to repeat it.

    python analysis/report.py --sweep mask_ratio            # figures/report-mask_ratio.html

Everything is inside the file: it can be mailed, printed and read without a network. The same record gives the same
bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import common, evidence
from analysis.answer import (
    SCORE,
    Setting,
    answer,
    collect,
    interval,
    ranked,
    rows_of,
    states_text,
    value_text,
)
from analysis.page import Html, bullets, element, listed, page, section, table
from analysis.tables import SCORES
from sddit.errors import without_password
from sddit.results import STATE_WORDS, default_tracking_uri, open_record, read_sweep

DEFAULT_SWEEP = "mask_ratio"
LABELS = {f"eval/{name}": label for name, label in SCORES.items() if name != "fid"} | {
    "eval/kid": "KID ↓",
    "eval/fid_seeds_std": "FID, sd over noise",
}


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    name: str  # of the sweep
    address: str  # of the record
    tags: dict[str, str]  # of the sweep's own run
    cells: list[dict[str, Any]]
    settings: list[Setting]
    floor: common.NoiseFloor | None
    ended: int | None  # ms: when the last cell ended
    complete: bool  # whether the last command came to its end
    figures: list[Html]
    health: Html
    grids: list[Html]
    left_out: int  # cells whose grid is not shown

    def tag(self, name: str, default: str = "") -> str:
        return self.tags.get(f"sddit.{name}", default)


# ------------------------------------------------------------------------------------------------------------- read


def read(sweep: str, tracking_uri: str | None = None, figures: Sequence[Path] | None = None) -> Report:
    """All that the page shows, from the record.

    Args:
        sweep: its name, i.e. that of its MLflow experiment.
        tracking_uri: default MLFLOW_TRACKING_URI, else mlflow.db in the current folder.
        figures: files of the sweep's figures and tables; None: those that its last command recorded.

    Raises:
        UsageError: no sweep has this name, or its cells were scored under several protocols.
        TrackingError: the record cannot be reached, or does not exist.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for every grid
    _, cells, record = read_sweep(sweep, tracking_uri, metrics=())
    settings = collect(cells, record.axes)
    with open_record(sweep, tracking_uri) as (client, experiment), tempfile.TemporaryDirectory() as folder:
        only_cells, latest = "tags.`sddit.kind` = 'cell'", ["attributes.end_time DESC"]
        last = client.search_runs([experiment.experiment_id], only_cells, order_by=latest, max_results=1)
        status = "RUNNING"
        if parent := record.run_id:
            status = client.get_run(parent).info.status
            if figures is None:
                figures = evidence.recorded_files(client, parent, folder)
        grids, left_out = evidence.grids(client, settings, folder)
        return Report(
            sweep, without_password(tracking_uri or default_tracking_uri()), record.tags, rows_of(cells), settings,
            common.noise_floor(cells), last[0].info.end_time if last else None, status not in ("KILLED", "FAILED"),
            evidence.drawings(figures or ()), evidence.health(client, settings), grids, left_out,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- page


def render(report: Report) -> str:
    """The page."""
    question = report.tag("question", f"Sweep {report.name}")
    answered = answer(report.settings, report.floor, json.loads(report.tag("reference", "{}")))
    collapsed = [f"{_named(cell)}: {text}" for cell in report.cells if (text := cell["tags"].get("sddit.collapse"))]
    samples = Html()
    if report.grids:
        hidden = f" Not shown: {common.counted(report.left_out, 'cell')}." if report.left_out else ""
        note = f"The last grid of each cell, of the same noise and classes in all.{hidden}"
        samples = Html(element("p", note, class_="soft") + element("div", *report.grids, class_="grids"))
    return page(
        f"{report.name}: {question}",
        element("p", f"Sweep {report.name}", class_="soft"),
        element("h1", question),
        _status(report),
        element("div", *(element("p", sentence) for sentence in answered), class_="answer"),
        section("Figures", *report.figures),
        section("Settings", _table(report)),
        section("Health of the discriminative loss", report.health, bullets(collapsed, at_most=10)),
        section("Samples", samples),
        section("Cost", _cost(report)),
        section("Not done", _not_done(report)),
        section("How to repeat it", _repeat(report)),
    )


def _named(cell: dict[str, Any]) -> str:
    return cell["name"] or cell["identity"]


def _status(report: Report) -> Html:
    """How far the sweep is, and as of when."""
    known = f"{common.counted(len(report.cells), 'cell')}: {states_text(report.cells)}." if report.cells else "No cell."
    if report.ended:
        known += f" The last cell ended {datetime.fromtimestamp(report.ended / 1000, UTC):%Y-%m-%d %H:%M} UTC."
    warning = ""
    if unfinished := sum(cell["state"] == "running" for cell in report.cells):
        warning = f"Half-finished: {common.counted(unfinished, 'cell')} unfinished, so all below may change."
    elif not report.complete:
        warning = "The last command was interrupted or failed, so cells may be missing. Run it again to resume."
    return Html(element("p", known, class_="soft") + (element("p", warning, class_="warn") if warning else ""))


def _table(report: Report) -> Html:
    """One row a setting; the lowest FID stands out."""
    if not report.settings:
        return Html()
    done = [cell for cell in report.cells if cell["state"] == "done"]
    found = {key for cell in done for key in cell["metrics"] if key.startswith(("eval/", "probe/", "copying/"))}
    others = [key for key in LABELS if key in found] + sorted(found - LABELS.keys() - {SCORE})
    axes = list(report.settings[0].point)
    confirmed = any(setting.values(fresh=True) for setting in report.settings)
    extractor = common.the_value(pd.DataFrame([cell["params"] for cell in done]), "eval.extractor")
    head = [
        *map(common.axis_name, axes), "seeds", f"FID ↓ ({extractor})" if extractor else "FID ↓",
        *(["fresh seeds"] if confirmed else []), *(LABELS.get(key) or _readable(key) for key in others),
        "steps", "FLOPs a cell", "device-hours", "cells",
    ]  # fmt: skip
    rows = []
    for setting in report.settings:
        flops = [cell["metrics"].get("cost/flops", np.nan) for cell in setting.cells if cell["state"] == "done"]
        rows.append([
            *(value_text(value) for value in setting.point.values()),
            len(setting.values()),
            _score(setting.values()),
            *([_score(setting.values(fresh=True))] if confirmed else []),
            *(_score(setting.values(key)) for key in others),
            f"{setting.steps:,}",
            f"{max(flops):.2e}" if flops else "–",
            f"{_total(setting.cells, 'cost/device_hours'):.3g}",
            states_text(setting.cells),
        ])  # fmt: skip
    marked = [report.settings.index(best) for best in ranked(report.settings)[:1]]
    note = "Mean over done seeds, ± half width of the 95% t-interval from two seeds on. In bold: the lowest mean FID."
    return Html(table(head, rows, marked) + element("p", note, class_="soft"))


def _readable(metric: str) -> str:
    return metric.removeprefix("eval/").replace("/", " ").replace("_", " ")


def _score(values: dict[int, float]) -> str:
    if not values:
        return "–"
    mean, low, high = interval(values.values())
    digits = 2 if abs(mean) >= 1 else 3
    half = f" ± {(high - low) / 2:.{digits}f}" if np.isfinite(high - low) else ""
    return f"{mean:.{digits}f}{half}"


def _total(cells: Sequence[dict[str, Any]], metric: str) -> float:
    return sum(cell["metrics"].get(metric, 0.0) for cell in cells)


def _cost(report: Report) -> Html:
    hours = _total(report.cells, "cost/device_hours")
    if not hours:
        return Html()
    entries: dict[str, object] = {
        "Device-hours": f"{hours:.3g}, of all cells whatever became of them",
        "Training FLOPs": f"{_total(report.cells, 'cost/flops'):.3g}",
        "Training images": f"{_total(report.cells, 'cost/images'):,.0f}",
    }
    if budget := report.tag("budget_hours"):
        entries["Budget"] = f"{float(budget):g} device-hours"
    if text := report.tag("prediction"):
        predicted, measured = (json.loads(text)[name] / 3600 for name in ("predicted_s", "measured_s"))
        ratio = f" ({measured / predicted - 1:+.0%})" if predicted else ""
        entries["Prediction"] = f"{predicted:.3g} device-hours, by the last command; measured {measured:.3g}{ratio}"
    if price := report.tag("price"):
        entries["Money"] = f"{hours * float(price):,.2f}, at {float(price):g} a device-hour"
    return listed(entries)


def _not_done(report: Report) -> Html:
    """Failed, stopped, unfinished and impossible cells, each with the reason."""
    parts: dict[str, list[str]] = {"failed": [], "pruned": [], "running": []}
    for cell in report.cells:
        if cell["state"] not in parts:
            continue
        text = f"{_named(cell)}: step {cell['step']:,} of {cell['steps']:,}."
        if cell["state"] == "failed":
            error, log = (cell["tags"].get(f"sddit.{name}", "").strip() for name in ("error", "log"))
            text += f" {(error or 'Cause not recorded.').splitlines()[-1]}" + (f" Log: {log}" if log else "")
        parts[cell["state"]].append(text)
    parts["impossible"] = [f"{label}: {reason}" for label, reason in json.loads(report.tag("excluded", "{}")).items()]
    names = {"impossible": "Impossible"} | {state: word.capitalize() for state, word in STATE_WORDS.items()}
    return listed({f"{names[state]} ({len(items)})": bullets(items) for state, items in parts.items() if items})


def _repeat(report: Report) -> Html:
    codes = Counter(cell["code"] or "unknown" for cell in report.cells)
    texts = (f"{c['protocol']}: {c['tags'].get('sddit.protocol.text', '')}" for c in report.cells if c["protocol"])
    command = report.tag("command")
    facts = listed({
        "Command": element("pre", command, class_="command") if command else "",
        "Record": element("code", report.address),
        "Code": "; ".join(f"{code} ({common.counted(n, 'cell')})" for code, n in codes.items()),
        "Protocol": bullets(dict.fromkeys(texts)),
    })  # fmt: skip
    rows = [[_named(c), c["identity"], c["state"], f"{c['step']:,}", c["run_id"]] for c in report.cells]
    cells = table(["cell", "identity", "state", "step", "MLflow run"], rows)
    return Html(facts + (element("details", element("summary", "Identities"), cells) if rows else ""))


# ------------------------------------------------------------------------------------------------------------- main


def report(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), figures: Sequence[Path] | None = None
) -> Path:
    """Writes `out/report-SWEEP.html` and gives its path. Arguments and errors as of `read`.

    Raises:
        UsageError: also where `out` cannot be written to.
    """
    text = render(read(sweep, tracking_uri, figures))
    writers = {"html": lambda path: path.write_text(text, encoding="utf-8")}
    return common.write(writers, common.output_name("report", sweep, ""), out)[0]


def main() -> None:
    flags = common.parse_flags(__doc__, DEFAULT_SWEEP)
    report(flags.sweep, flags.tracking_uri, flags.out)


if __name__ == "__main__":
    common.run(main)
