"""FID against the noise of the teacher's view, one line per evaluation step, and whether its targets say anything.

    python analysis/plot_teacher_sigma.py                      # the sweep teacher_sigma, into figures/
    python analysis/plot_teacher_sigma.py --sweep NAME

Draws what there is of a sweep that is still running, and says what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import axis, common, health, lines, style

WORDS = {"drawn": "drawn in\n[σ$_{min}$, σ$_S$]", "student": "σ$_S$"}  # σ_S: of the student's view


def rank(value: Any) -> tuple[int, float]:
    """Sort key: fixed values, then those that follow the student's."""
    words = list(WORDS)
    return (1 + words.index(value), 0.0) if value in words else (0, float(value))


def label(value: Any) -> str:
    return WORDS.get(value) or f"{value:g}"


QUESTION = axis.Question(
    name="teacher_sigma",
    title="FID against the noise σ_T of the teacher's view",
    axes=(axis.Axis("method.teacher_sigma", "noise of the teacher's view, σ$_T$", "σ_T", rank, label),),
    metrics=tuple(health.METRICS),
    max_series=3,
    paper="The paper's ablation of the teacher's noise is known to us without values, so nothing of it is overlaid.",
)


def collect(table: pd.DataFrame, cells: pd.DataFrame | None = None, *, paper: bool = False) -> axis.AxisData:
    """What is drawn: see `axis.collect`. The health of the targets is that of the last step."""
    return health.explained(axis.collect(QUESTION, table, cells, paper=paper))


def draw(data: axis.AxisData) -> Figure:
    """The figure: FID, one line an evaluation step; and the information of the targets where it was recorded."""
    return lines.draw_steps(data, draw_health if health.recorded(data) else None)


def draw_health(panel: Axes, rows: pd.DataFrame) -> None:
    """The information of [CLS] and patch targets at the last step, and where they are dead."""
    (over,) = QUESTION.axes
    rows = rows[rows["seeds"].notna() & (rows["step"] == rows["step"].max())].drop(columns=axis.INTERVAL)
    look = lines.look_of(rows)
    handles: list[Artist] = []
    for (metric, name), strength in zip(health.METRICS.items(), (1.0, 0.6), strict=True):
        own = look if strength == 1 else look._replace(marker="s", line="--")
        values = rows.join(axis.interval_columns(rows, [over.short], metric))
        colour = style.shade(look.colour, strength)
        lines.draw_line(panel, over, values, own, colour, y=metric, shift=0.1 * (strength < 1))
        handles.append(Line2D([], [], color=colour, label=name, **lines.marks(own)))
    handles.append(panel.axhspan(0, health.DEAD, color="#D9D9D9", zorder=0.5, label="dead"))
    panel.set_ylim(0, 1.35 * max(np.nanmax(rows[list(health.METRICS)]), 5 * health.DEAD))  # with room for the legend
    panel.legend(handles=handles, loc="upper center", ncols=3, columnspacing=1.2)
    panel.locator_params(axis="y", nbins=6)
    panel.set_ylabel("information of the targets (nat)")


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    return axis.make(QUESTION, collect, draw, sweep, tracking_uri, out, paper=paper)


def main() -> None:
    axis.main(figure, QUESTION, __doc__)


if __name__ == "__main__":
    common.run(main)
