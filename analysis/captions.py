"""Captions of figures over the axes of a sweep: how to read them, and what a reader who expects a whole sweep has to
know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import common
from sddit.results import STATE_WORDS

if TYPE_CHECKING:
    from analysis.axis import Question


def reading(question: Question, frame: pd.DataFrame, size: str | None, cells: pd.DataFrame | None) -> str:
    """How to read the figure: what is compared, how many cells and steps, which intervals."""
    names = [str(name) for name in frame["series"].unique()]
    what = " ".join([question.title + ",", *(names if len(names) == 1 else []), *([size] if size else [])])
    seeds = frame["seeds"].dropna()
    dots = " (the dots)" if question.each_cell else ""
    if seeds.empty:
        spread = "no cell is done yet"
    elif seeds.max() == 1:
        spread = "one seed, no interval"
    elif seeds.min() == seeds.max():
        spread = f"mean and 95% t-interval over {seeds.max():.0f} seeds{dots}"
    else:
        spread = f"mean over {seeds.min():.0f} to {seeds.max():.0f} seeds{dots}, 95% t-interval from two on"
    last = common.last_done(frame)
    if question.at_end:
        steps = "at the last step" + (f" ({last:,})" if last is not None else "")
    else:
        strongest = f", the last ({last:,}) strongest" if last is not None and frame["step"].nunique() > 1 else ""
        steps = f"one line per evaluation step{strongest}"
    done = frame.loc[frame["state"] == "done", "identity"].nunique()
    of = f" of {len(cells)}" if cells is not None and len(cells) > done else ""
    text = f"{what.rstrip(',')}: {steps}; {spread}. {done}{of} cells done, {_steps_asked(frame, cells)} steps."
    if infinite := int((~np.isfinite(frame[common.SCORE])).sum()):
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


def missing(
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
            f"{rows['identity'].nunique()} {STATE_WORDS.get(str(state), state)} ({named(rows)})"
            for state, rows in faded.groupby("state", sort=False)
        ]
        at = ", at the step they reached" if question.at_end else ""
        how = f"Faded{at}, and in no line or mean" if question.each_cell else "In no mean"
        sentences.append(f"{how}: {', '.join(parts)}.")
    last = common.last_done(frame)
    done = frame[frame["state"] == "done"]
    reached = done.groupby("identity")["step"].transform("max")
    if last is not None and len(short := done[reached < last]):
        so = (", and so faded" if question.each_cell else ", and so in no mean") if question.at_end else ""
        sentences.append(f"Done, but with fewer steps than {last:,}{so}: {named(short)}.")
    if cells is not None:
        rest = cells[~cells["identity"].isin(table["identity"])]
        if len(rest):
            counts = rest["state"].value_counts().items()
            states = ", ".join(f"{n} {STATE_WORDS.get(str(s), s)}" for s, n in counts)
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
