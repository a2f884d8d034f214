"""What each part of SD-DiT buys: FID at the last step without it, and the difference to the reference.

    python analysis/plot_components.py                         # the sweep components, into figures/
    python analysis/plot_components.py --sweep NAME

Draws what there is of a sweep that is still running, and says what is missing.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import axis, common, lines, style
from analysis.common import SCORE
from sddit.results import load_sweep

ROW_HEIGHT, PANEL_WIDTH, MARGIN = 0.34, 3.4, 3.2  # inches; the margin holds the settings' names and the differences
DIFFERENCE = ["difference", "difference_low", "difference_high", "difference_seeds"]
QUESTION = axis.Question(
    name="components",
    title="FID by component",
    series="component",
    at_end=True,
    max_series=40,
    shown_as="rows",
    paper="The paper's ablation of its components is not among the values held here, so nothing of it is overlaid.",
)


def collect(
    table: pd.DataFrame, cells: pd.DataFrame | None = None, *, paper: bool = False, reference: str | None = None
) -> axis.AxisData:
    """What is drawn: see `axis.collect`. The reference comes first; None: `nearest_to_all`.

    `frame` has the further columns difference, difference_low, difference_high (mean and 95 % t-interval of the
    difference to the reference over the seeds that both have) and difference_seeds, for the cells that count.
    """
    data = axis.collect(QUESTION, table, cells, paper=paper)
    names = list(data.frame["series"].cat.categories)
    fields = list(cells["params"]) if cells is not None else table.to_dict("records")
    first = str(next((name for name in (reference, nearest_to_all(fields)) if name in names), names[0]))
    names.sort(key=lambda name: name != first)  # stable: the others stay in their order
    frame = data.frame.assign(series=data.frame["series"].cat.reorder_categories(names))
    frame = frame.sort_values(["series", "seed"]).reset_index(drop=True)
    counting = frame["seeds"].notna()
    scores = {n: rows.set_index("seed")[SCORE] for n, rows in frame[counting].groupby("series", observed=True)}
    frame[DIFFERENCE] = np.nan
    for name in scores.keys() - {first} if first in scores else ():
        for column, value in zip(DIFFERENCE, common.paired_difference(scores[name], scores[first]), strict=True):
            frame.loc[counting & (frame["series"] == name), column] = value
    paired = f"At the right: difference to {first}, paired over the seeds that both have"
    if frame["difference_seeds"].max() > 1:
        paired += ", with its 95% t-interval, not corrected for the number of comparisons; below zero is better."
    else:
        paired += "; one seed is no evidence of a difference."
    caption = f"{data.caption} {paired}"
    return replace(data, frame=frame, caption=caption)


def nearest_to_all(cells: Iterable[Mapping[Any, Any]]) -> str:
    """The setting that the others are changes of: it shares the most values of fields with them; of equals, the first.

    Used where the record names no reference, since cells that run side by side begin in any order.
    """
    settings: dict[str, dict[str, str]] = {}
    for cell in cells:
        if isinstance(name := cell.get(QUESTION.series), str):
            settings.setdefault(name, {k: repr(v) for k, v in cell.items() if "." in k and "/" not in k and v == v})
    fields = pd.DataFrame.from_dict(settings, orient="index")
    return str(fields.apply(lambda values: values.map(values.value_counts())).sum(axis=1).idxmax())


def draw(data: axis.AxisData) -> Figure:
    """The figure: one row a setting, with seeds, mean and interval; the difference to the reference at the right."""
    frame = lines.finite(data.frame)
    names = list(frame["series"].cat.categories)
    low, high, cut = lines.limits(frame, frame["seeds"].notna())
    frame = frame.assign(**{SCORE: frame[SCORE].clip(low, high)})
    with style.context():
        size = (PANEL_WIDTH, 0.9 + ROW_HEIGHT * len(names))
        figure, (panel,) = style.panels(1, f"{data.caption} {cut}".strip(), size=size, margin=MARGIN)
        style.score_axis(panel, low, high, "x")
        beside: dict[str, Any] = {"transform": panel.get_yaxis_transform(), "fontsize": 8}
        for y, name in enumerate(names):
            rows = frame[frame["series"] == name]
            look, counting = lines.look_of(rows), rows[rows["seeds"].notna()]
            if len(counting):
                mean, least, most = counting[["mean", "low", "high"]].iloc[0]
                panel.errorbar(
                    mean, y, xerr=[[mean - least], [most - mean]], color=look.colour, marker=look.marker,
                    markersize=6.5, elinewidth=1.4, zorder=4,
                )  # fmt: skip
            several = counting if len(counting) > 1 else counting[:0]
            panel.plot(several[SCORE], np.full(len(several), y + 0.24), ".", color=look.colour, markersize=4, zorder=4)
            for state, some in rows[rows["seeds"].isna()].groupby("state"):
                lines.draw_faded(panel, some[SCORE], np.full(len(some), y + 0.24), str(state), look.colour)
            panel.text(1.03, y, _difference(y, counting), va="center", **beside)
        handles = [*_reference_line(panel, frame, names[0]), *lines.draw_floor([panel], data.floor, vertical=True)]
        handles += lines.state_handles(frame, lines.MIXED)
        panel.set_yticks(range(len(names)), [textwrap.fill(name, 28) for name in names])
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="y", visible=False)
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.set_xlabel(data.score_name)
        panel.text(1.03, -0.62, "difference, paired", va="bottom", **beside)
        if handles:
            figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def _difference(y: int, counting: pd.DataFrame) -> str:
    """'+3.2 [+1.0, +5.4], n=4'"""
    if counting.empty:
        return "no cell done"
    if y == 0:
        return "reference"
    mean, low, high, seeds = counting[DIFFERENCE].iloc[0]
    if not seeds > 0:
        return "no seed in common"
    interval = f" [{low:+.1f}, {high:+.1f}]" if seeds > 1 else ""
    return f"{mean:+.1f}{interval}, n={seeds:.0f}".replace("-", "−")


def _reference_line(panel: Axes, frame: pd.DataFrame, name: str) -> list[Line2D]:
    means = frame.loc[frame["series"] == name, "mean"].dropna()
    if means.empty:
        return []
    drawn = panel.axvline(means.iloc[0], color=lines.MIXED, linewidth=0.9, zorder=1.5, label=f"mean of {name}")
    return [drawn]


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    named = json.loads(load_sweep(sweep, tracking_uri).tags.get("sddit.reference", "{}"))
    collected = partial(collect, reference=named.get(QUESTION.series))
    return axis.make(QUESTION, collected, draw, sweep, tracking_uri, out, paper=paper)


def main() -> None:
    axis.main(figure, QUESTION, __doc__)


if __name__ == "__main__":
    common.run(main)
