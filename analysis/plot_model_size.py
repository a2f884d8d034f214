"""FID at the last step against the size of the model, and against what its training cost.

    python analysis/plot_model_size.py                         # the sweep model_size, into figures/
    python analysis/plot_model_size.py --sweep NAME --paper    # with the values of the paper's Table 1

Draws what there is of a sweep that is still running, and says what is missing.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import axis, common, finals, lines, style
from analysis import paper as published
from analysis.common import SCORE
from sddit.config import SIZE_GRIDS

FLOPS = axis.Axis(finals.FLOPS, "training FLOPs", "FLOPs")
SHIFT = 0.14  # between systems, of the distance of two sizes
PAPER: dict[str, Any] = {"marker": "*", "markersize": 9, "markerfacecolor": "none", "linestyle": ""}


def rank(size: str) -> tuple[int, str]:
    """Sort key: small to large."""
    letter, _, patch = size.partition("/")
    return list(SIZE_GRIDS["paper"]).index(letter), patch


SIZE = axis.Axis("model.size", "model size", "size", rank, str)
QUESTION = axis.Question(
    name="model_size",
    title="FID against the size of the model",
    axes=(SIZE,),
    at_end=True,
    metrics=(FLOPS.column,),
    paper="",
)


def collect(table: pd.DataFrame, cells: pd.DataFrame | None = None, *, paper: bool = False) -> axis.AxisData:
    """What is drawn: see `axis.collect`.

    `frame` has the further columns source ('ours', 'paper') and as_long: whether a value of the paper is of as many
    steps and as large a batch as ours.
    """
    data = axis.collect(QUESTION, table, cells)
    frame = data.frame.assign(source=finals.SOURCE, as_long=True)
    if not paper:
        return replace(data, frame=frame)
    counting = set(data.counting["identity"])
    ends = cells[cells["identity"].isin(counting)].to_dict("records") if cells is not None else []
    reasons = {finals.not_comparable(cell["params"], cell["tags"]) for cell in ends} - {""}
    if reasons or not ends:
        why = sorted(reasons)[0] if reasons else "No cell is done that could be set beside the paper's values."
        return replace(data, frame=frame, caption=f"{data.caption} {why} None of them is overlaid.")
    sizes = data.frame[SIZE.short].cat.categories
    as_long = (common.last_done(data.frame), common.the_value(table, "train.batch_size"))
    rows = [
        _published_row(row) | {"as_long": (row.steps, row.batch) == as_long}
        for row in published.TABLE_1
        if row.size in sizes
    ]
    overlaid = pd.DataFrame(rows).astype({SIZE.short: data.frame[SIZE.short].dtype})
    caption = (
        f"{data.caption} Stars: the paper's values; over the size only those of as many steps and as large a batch. "
        f"{published.SOURCE}"
    )
    return replace(data, frame=pd.concat([frame, overlaid], ignore_index=True), caption=caption)


def _published_row(row: published.Published) -> dict[str, Any]:
    look = style.look(str(row.method))
    return {
        "source": "paper", "series": f"{look.label} (paper)", "method": row.method, "kind": "", SIZE.short: row.size,
        "step": row.steps, SCORE: row.fid, FLOPS.column: row.flops,
    }  # fmt: skip


def draw(data: axis.AxisData) -> Figure:
    """The figure: one line a system; over the size, and where they were recorded over the training FLOPs."""
    frame = lines.finite(data.frame)
    ours, theirs = frame[frame["source"] == finals.SOURCE], frame[frame["source"] != finals.SOURCE]
    low, high, cut = lines.limits(frame, frame["seeds"].notna() | (frame["source"] != finals.SOURCE))
    caption = f"{data.caption} {cut}".strip()
    ours = ours.assign(**{SCORE: ours[SCORE].clip(low, high)})
    axes = [SIZE, *([FLOPS] if ours[FLOPS.column].notna().any() else [])]
    with style.context():
        figure, panels = style.panels(len(axes), caption, share="row")
        handles: list[Line2D] = []
        for panel, over in zip(panels, axes, strict=True):
            handles = []
            colours = lines.series_colours(ours)
            for i, (name, colour) in enumerate(colours.items()):
                rows = ours[ours["series"] == name]
                look = lines.look_of(rows)
                if over is SIZE:
                    lines.draw_line(panel, over, rows, look, colour, shift=SHIFT * (i - (len(colours) - 1) / 2))
                else:  # no place along FLOPs lacks a cell, so that only those that count are joined
                    lines.draw_line(panel, over, rows[rows["seeds"].notna()], look, colour, dots=False)
                handles.append(
                    Line2D([], [], color=colour, label=textwrap.fill(str(name), 28), linewidth=2.0, **lines.marks(look))
                )
            for name, rows in theirs.groupby("series", sort=False):
                shown = rows[rows["as_long"]] if over is SIZE else rows
                colour = lines.look_of(rows).colour
                panel.plot(lines.positions(over, shown), shown[SCORE], color=colour, **PAPER)
                handles.append(Line2D([], [], color=colour, label=str(name), **PAPER))
            style.score_axis(panel, low, high)
            panel.set_xlabel(over.name)
        panels[0].set_ylabel(data.score_name)
        lines.ticks(panels[0], SIZE, ours)
        if FLOPS in axes:
            lines.log_ticks(panels[1])
        floor = lines.draw_floor(panels, data.floor)
        handles += [*lines.state_handles(ours, lines.MIXED), *floor]
        figure.legend(handles=handles, loc="outside right upper", alignment="left")
    return figure


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    return axis.make(QUESTION, collect, draw, sweep, tracking_uri, out, paper=paper)


def main() -> None:
    axis.main(figure, QUESTION, __doc__)


if __name__ == "__main__":
    common.run(main)
