"""What figures of FID over the axes of a sweep collect: scores, means over seeds, and the caption with what is missing.

How they are drawn is in `lines`, and in the figures that draw something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import captions, common, style
from analysis.common import SCORE
from sddit.errors import SdditError, UsageError
from sddit.results import read_sweep

SYSTEM = "system"  # the axis that names methods with all their settings
INTERVAL = ["seeds", "mean", "low", "high"]  # number of seeds, mean and 95 % t-interval
NO_VALUES = "The paper's tables have no such axis, so nothing of it is overlaid."


@dataclass(frozen=True)
class Axis:
    """An axis of a sweep, as figures show it."""

    column: str  # of `load_results`
    name: str  # under the axis of the figure; may hold $mathematical text$, as may its labels
    noun: str  # before a value in the caption, as in 'ratio 0.3'
    rank: Callable[[Any], Any] | None = None  # sorts values that stand at equal distances; None: numbers, to scale
    label: Callable[[Any], str] = "{:g}".format

    @property
    def short(self) -> str:
        """Its column in the csv file."""
        return self.column.rpartition(".")[2]


@dataclass(frozen=True)
class Question:
    """A figure of FID over axes of a sweep."""

    name: str  # of the files, and of the sweep that answers it
    title: str  # how the caption begins
    axes: tuple[Axis, ...] = ()
    series: str = SYSTEM  # the column that names what is compared; without a column `system`, methods are
    at_end: bool = False  # only the last evaluation of each cell
    metrics: tuple[str, ...] = ()  # collected beside FID
    follows: tuple[str, ...] = ()  # fields that the axes determine
    max_series: int = 6
    shown_as: str = "lines a step"  # the series, in the message that there are more
    each_cell: bool = True  # cells are drawn beside their means; those that do not count faded
    paper: str = NO_VALUES  # what the caption says with --paper

    @property
    def needs(self) -> list[str]:
        """The columns without which a cell has no place in the figure."""
        return [axis.column for axis in self.axes] + ([self.series] if self.series != SYSTEM else [])

    @property
    def differs(self) -> list[str]:
        """The same in words."""
        return [axis.name for axis in self.axes] + ([self.series] if self.series != SYSTEM else [])


@dataclass(frozen=True)
class AxisData:
    """What is drawn. `frame` has one row per (cell, evaluation step), and is the csv file.

    Its columns: series (what is compared), method, kind, the axes, step, seed, state, identity, run_id, eval/fid and
    the question's other metrics; and, for the cells that count, seeds, mean, low, high over the seeds of that place and
    step (low and high: 95 % t-interval). Cells count that are done; in a figure of last steps, with as many as any.
    """

    question: Question
    frame: pd.DataFrame
    unevaluated: pd.DataFrame  # the same columns for cells without a score yet
    score_name: str
    caption: str
    floor: common.NoiseFloor | None = None

    @property
    def counting(self) -> pd.DataFrame:
        """The rows that means are over."""
        return self.frame[self.frame["seeds"].notna()]


def collect(
    question: Question, table: pd.DataFrame, cells: pd.DataFrame | None = None, *, paper: bool = False
) -> AxisData:
    """Collects what is drawn from the sweep's results and, to say what is missing, its cells.

    Args:
        question: which figure.
        table: as from `sddit.results.load_results`.
        cells: as from `sddit.results.load_cells`; without it, only cells that were evaluated are known.
        paper: say in the caption how this relates to the paper's values.

    Raises:
        UsageError: the cells differ in protocol, or in more than can be shown.
        SdditError: there is nothing to draw yet.
    """
    recorded = cells if cells is not None else table.drop_duplicates("identity")
    fresh = len(recorded)
    table = common.without_fresh_seeds(table)
    cells = common.without_fresh_seeds(cells) if cells is not None else None
    fresh -= len(common.without_fresh_seeds(recorded))
    needs = [*question.needs, SCORE]
    usable = table.dropna(subset=needs) if set(needs) <= set(table) else table[:0]
    if usable.empty or not np.isfinite(usable[SCORE]).any():
        known = f"{common.counted(len(cells), 'cell')} recorded, " if cells is not None else ""
        raise SdditError(
            f"Nothing to draw yet: {known}none with {' and '.join(needs)}. "
            f"Run the sweep, or run it again to resume: python sweeps/{question.name}.py"
        )
    common.check_protocol(usable)
    every = _frame(question, _with_unevaluated(question, usable, cells))
    frame = every[every[SCORE].notna()].reset_index(drop=True).astype({"step": int})
    if question.at_end:
        frame = frame.loc[frame.groupby("identity")["step"].idxmax().sort_values()].reset_index(drop=True)
    frame = frame.join(_over_seeds(question, frame))
    unevaluated = every[every[SCORE].isna()].reset_index(drop=True)
    extractor = common.the_value(usable, "eval.extractor")
    floor = common.noise_floor(cells[cells["identity"].isin(usable["identity"])]) if cells is not None else None
    left_out = f"{common.counted(fresh, 'cell')} with fresh seeds, which confirm a best setting, left out."
    sentences = [
        captions.reading(question, frame, common.the_value(usable, "model.size"), cells),
        common.provenance(usable, cells),
        str(floor or ""),
        captions.missing(question, frame, unevaluated, table, cells),
        left_out if fresh else "",
        question.paper if paper else "",
    ]
    score_name = f"FID ({extractor})" if extractor else "FID"
    return AxisData(question, frame, unevaluated, score_name, " ".join(s for s in sentences if s), floor)


def interval_columns(rows: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """`INTERVAL` of `column` over the rows that are alike in `by`, beside the rows they rest on."""
    columns = pd.DataFrame(np.nan, index=rows.index, columns=INTERVAL)
    for _, alike in rows.dropna(subset=[column]).groupby(list(by), observed=True):
        columns.loc[alike.index] = (len(alike), *common.t_interval(alike[column]))
    return columns


# ---------------------------------------------------------------------------------------------------------- collect


def _with_unevaluated(question: Question, usable: pd.DataFrame, cells: pd.DataFrame | None) -> pd.DataFrame:
    """The results, and a row without step and score for each cell that has a place in the figure but no result."""
    if cells is None:
        return usable.reset_index(drop=True)
    rest = cells[~cells["identity"].isin(usable["identity"])]
    rows = [
        {**cell["params"], **{name: cell[name] for name in ("identity", "run_id", "state", "seed")}}
        for cell in rest.to_dict("records")
        if all(cell["params"].get(name) is not None for name in question.needs)
    ]
    if not rows:
        return usable.reset_index(drop=True)
    recorded = {identity: i for i, identity in enumerate(cells["identity"])}  # the order in which cells began
    both = pd.concat([usable, pd.DataFrame(rows)])
    return both.sort_values("identity", key=lambda column: column.map(recorded), kind="stable", ignore_index=True)


def _frame(question: Question, rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of `AxisData.frame` up to the metrics, in the figure's order."""
    kinds = rows["diffusion.kind"].fillna("") if "diffusion.kind" in rows else pd.Series("", rows.index)
    rows = rows.assign(**{"diffusion.kind": kinds})
    columns: dict[str, Any] = {"series": _series(question, rows), "method": rows["method.name"], "kind": kinds}
    for axis in question.axes:
        values = rows[axis.column]
        if axis.rank is None:
            columns[axis.short] = values.astype(float)
        else:
            columns[axis.short] = pd.Categorical(values, sorted(values.unique(), key=axis.rank), ordered=True)
    names = ("step", "seed", "state", "identity", "run_id", SCORE, *question.metrics)
    frame = pd.DataFrame(columns | {name: rows.get(name) for name in names}, index=rows.index)
    by = ["series", *(axis.short for axis in question.axes), "step", "seed"]
    return frame.sort_values(by).reset_index(drop=True)


def _series(question: Question, rows: pd.DataFrame) -> Any:
    """What is compared in each row, and whatever else the cells of one such setting differ in; in order."""
    if question.series in rows:
        labels = rows[question.series].map(str)
    else:
        looks = map(style.look, rows["method.name"], rows["diffusion.kind"])
        labels = pd.Series([look.label for look in looks], rows.index)
    bases = labels.copy()
    settled = {"method.name", "diffusion.kind", *question.follows, *(axis.column for axis in question.axes)}
    fields = [c for c in rows.columns if "." in c and "/" not in c and c not in settled]
    varied: set[str] = set()
    for _, members in rows.groupby(bases):
        for field in fields:
            values = members[field].map(_in_words)
            if values.nunique() > 1:
                varied.add(field)
                labels[members.index] += ", " + field.rpartition(".")[2] + " " + values
    if (count := labels.nunique()) > question.max_series:
        raise UsageError(
            f"The cells differ in more than {', '.join([*question.differs, 'method'])} and seed: "
            f"{', '.join(sorted(varied)) or question.series}, which makes {count} {question.shown_as}, "
            f"and at most {question.max_series} can be shown. For a sweep of many fields use: "
            "python analysis/plot_search.py --sweep NAME"
        )
    known = style.LABELS if question.series == SYSTEM else ()
    order = [*known, *(base for base in bases.unique() if base not in known)]
    pairs = sorted({(order.index(base), label) for base, label in zip(bases, labels, strict=True)})
    return pd.Categorical(labels, [label for _, label in pairs], ordered=True)


def _in_words(value: Any) -> str:
    """A field's value, the same whichever column it was read into."""
    if value is None or value != value:
        return "none"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _over_seeds(question: Question, frame: pd.DataFrame) -> pd.DataFrame:
    """`interval_columns` of the score over the cells that count."""
    counting = frame["state"] == "done"
    if question.at_end:
        counting &= frame["step"] == common.last_done(frame)
    by = ["series", *(axis.short for axis in question.axes), "step"]
    return interval_columns(frame[counting], by, SCORE).reindex(frame.index)


# ------------------------------------------------------------------------------------------------------------- make


def make(
    question: Question,
    collected: Callable[..., AxisData],
    draw: Callable[[AxisData], Figure],
    sweep: str,
    tracking_uri: str | None,
    out: Path,
    *,
    paper: bool,
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    table, cells, record = read_sweep(sweep, tracking_uri, metrics=question.metrics)
    data = collected(table, cells, paper=paper)
    if excluded := json.loads(record.tags.get("sddit.excluded", "{}")):
        reasons = common.listed(f"{label} ({reason})" for label, reason in excluded.items())
        data = replace(data, caption=f"{data.caption} Not part of the sweep: {reasons}.")
    return common.save(draw(data), data.frame, common.output_name(question.name, sweep, question.name), out)


def main(figure: Callable[..., list[Path]], question: Question, description: str | None) -> None:
    """The script of a figure."""
    flags = common.parse_flags(description, question.name)
    figure(flags.sweep, flags.tracking_uri, flags.out, paper=flags.paper)
