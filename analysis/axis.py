"""What figures of FID over the axes of a sweep collect: scores, means over seeds, and the caption with what is missing.

How they are drawn is in `lines`, and in the figures that draw something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import common, style
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results

SCORE = "eval/fid"
SYSTEM = "system"  # the axis that names methods with all their settings
INTERVAL = ["seeds", "mean", "low", "high"]  # number of seeds, mean and 95 % t-interval
NO_VALUES = "The paper's tables have no such axis, so nothing of it is overlaid."


@dataclass(frozen=True)
class Axis:
    """An axis of a sweep, as figures show it."""

    column: str  # of `load_results`
    name: str  # under the axis of the figure; may hold $mathematical text$, as may its labels
    noun: str  # before a value in the caption, as in 'ratio 0.3'
    rank: Callable[[Any], Any] | None = None  # sorts the values, which stand at equal distances; None: numbers, to scale
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
        _reading(question, frame, common.the_value(usable, "model.size"), cells),
        common.provenance(usable, cells),
        str(floor or ""),
        _missing(question, frame, unevaluated, table, cells),
        left_out if fresh else "",
        question.paper if paper else "",
    ]
    score_name = f"FID ({extractor})" if extractor else "FID"
    return AxisData(question, frame, unevaluated, score_name, " ".join(s for s in sentences if s), floor)


def last_done(frame: pd.DataFrame) -> int | None:
    """The last evaluation step of the cells that are done: the one that counts."""
    done = frame.loc[frame["state"] == "done", "step"]
    return int(done.max()) if len(done) else None


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
    return pd.concat([usable, pd.DataFrame(rows)], ignore_index=True) if rows else usable.reset_index(drop=True)


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


def _series(question: Question, rows: pd.DataFrame) -> pd.Categorical:
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
            f"{', '.join(sorted(varied)) or question.series}, which makes {count} lines a step, and at most "
            f"{question.max_series} can be shown. For a sweep of many fields use: "
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
        counting &= frame["step"] == last_done(frame)
    by = ["series", *(axis.short for axis in question.axes), "step"]
    return interval_columns(frame[counting], by, SCORE).reindex(frame.index)


# ------------------------------------------------------------------------------------------------------------ words


def _reading(question: Question, frame: pd.DataFrame, size: str | None, cells: pd.DataFrame | None) -> str:
    """How to read the figure: what is compared, how many cells and steps, which intervals."""
    names = [str(name) for name in frame["series"].unique()]
    what = " ".join([question.title + ",", *(names if len(names) == 1 else []), *([size] if size else [])])
    seeds = frame["seeds"].dropna()
    if seeds.empty:
        spread = "no cell is done yet"
    elif seeds.max() == 1:
        spread = "one seed, no interval"
    elif seeds.min() == seeds.max():
        spread = f"mean and 95% t-interval over {seeds.max():.0f} seeds (the dots)"
    else:
        spread = f"mean over {seeds.min():.0f} to {seeds.max():.0f} seeds (the dots), 95% t-interval from two on"
    last = last_done(frame)
    if question.at_end:
        steps = "at the last step" + (f" ({last:,})" if last is not None else "")
    else:
        strongest = f", the last ({last:,}) strongest" if last is not None and frame["step"].nunique() > 1 else ""
        steps = f"one line per evaluation step{strongest}"
    done = frame.loc[frame["state"] == "done", "identity"].nunique()
    of = f" of {len(cells)}" if cells is not None and len(cells) > done else ""
    text = f"{what.rstrip(',')}: {steps}; {spread}. {done}{of} cells done, {_steps_asked(frame, cells)} steps."
    if infinite := int((~np.isfinite(frame[SCORE])).sum()):
        text += f" {common.counted(infinite, 'infinite score')} not drawn."
    return text


def _steps_asked(frame: pd.DataFrame, cells: pd.DataFrame | None) -> str:
    """The optimiser steps asked of the cells, or where that is not known, the steps they were evaluated at."""
    steps = sorted(set(cells["steps"]) - {0}) if cells is not None else []
    steps = steps or [int(frame["step"].max())]
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


def _place(question: Question, series: Any, values: Sequence[Any], seed: Any) -> str:
    """A cell in words: 'SD-DiT, ratio 0.3 seed 1', where `series` says something the figure's title does not."""
    pairs = zip(question.axes, values, strict=True)
    text = " ".join(f"{axis.noun} {axis.label(value)}" for axis, value in pairs) + f" seed {seed:g}"
    words = re.sub(r"[${}]", "", text).split()  # without the marks of mathematical text and line breaks
    return ", ".join(filter(None, (str(series or ""), " ".join(words))))


def _missing(
    question: Question,
    frame: pd.DataFrame,
    unevaluated: pd.DataFrame,
    table: pd.DataFrame,
    cells: pd.DataFrame | None,
) -> str:
    """What a reader who expects a whole sweep has to know."""
    sentences = []
    several = frame["series"].nunique() > 1
    shorts = [axis.short for axis in question.axes]

    def named(rows: pd.DataFrame) -> str:
        """The cells of these rows as 'ratio 0.3 seed 1', at most four of them."""
        one = rows.drop_duplicates("identity").to_dict("records")
        return common.listed(
            _place(question, several and row["series"], [row[s] for s in shorts], row["seed"]) for row in one
        )

    faded = frame[frame["state"] != "done"]
    if len(faded):
        parts = [
            f"{rows['identity'].nunique()} {common.STATE_WORDS.get(str(state), state)} ({named(rows)})"
            for state, rows in faded.groupby("state", sort=False)
        ]
        at = ", at the step they reached" if question.at_end else ""
        sentences.append(f"Faded{at}, and in no line or mean: {', '.join(parts)}.")
    last = last_done(frame)
    done = frame[frame["state"] == "done"]
    reached = done.groupby("identity")["step"].transform("max")
    if last is not None and len(short := done[reached < last]):
        faded_too = ", and so faded" if question.at_end else ""
        sentences.append(f"Done, but with fewer steps than {last:,}{faded_too}: {named(short)}.")
    if cells is not None:
        rest = cells[~cells["identity"].isin(table["identity"])]
        if len(rest):
            counts = rest["state"].value_counts().items()
            states = ", ".join(f"{n} {common.STATE_WORDS.get(str(s), s)}" for s, n in counts)
            sentences.append(f"Not evaluated yet: {common.counted(len(rest), 'cell')} ({states}).")
    elsewhere = table["identity"].nunique() - frame["identity"].nunique()
    if elsewhere:
        what = " or ".join([*question.differs, "FID"])
        sentences.append(f"Without a {what}, not drawn: {common.counted(elsewhere, 'cell')}.")
    if absent := _absent(question, pd.concat([frame, unevaluated]) if len(unevaluated) else frame):
        sentences.append(f"Not recorded: {common.listed(absent)}.")
    return " ".join(sentences)


def _absent(question: Question, known: pd.DataFrame) -> list[str]:
    """Series, values and seeds that occur in the sweep, but not with each other."""
    columns = ["series", *(axis.short for axis in question.axes), "seed"]
    there = set(known[columns].itertuples(index=False, name=None))
    several = known["series"].nunique() > 1
    everywhere = product(*(known[column].sort_values().unique() for column in columns))
    return [
        _place(question, several and series, values, seed)
        for series, *values, seed in everywhere
        if (series, *values, seed) not in there
    ]


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
    table = load_results(sweep, tracking_uri, metrics=question.metrics)
    data = collected(table, load_cells(sweep, tracking_uri), paper=paper)
    return common.save(draw(data), data.frame, common.output_name(question.name, sweep, question.name), out)


def main(figure: Callable[..., list[Path]], question: Question, description: str | None) -> None:
    """The script of a figure."""
    flags = common.parse_flags(description, question.name)
    figure(flags.sweep, flags.tracking_uri, flags.out, paper=flags.paper)
