"""FID at the last step over the temperatures of student and teacher, and whether the targets say anything.

    python analysis/plot_temperatures.py                       # the sweep temperatures, into figures/
    python analysis/plot_temperatures.py --sweep NAME

Draws what there is of a sweep that is still running, and says what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis import axis, common, health, style
from analysis.axis import INTERVAL
from analysis.common import SCORE
from sddit.results import STATE_WORDS

COLOURS = "cividis"  # dark to light in grey as well, and alike to colour-blind readers
STUDENT = axis.Axis("method.tau_student", "temperature of the student, τ$_S$", "τ_S", float)
TEACHER = axis.Axis("method.tau_teacher", "temperature of the teacher, τ$_T$", "τ_T", float)
QUESTION = axis.Question(
    name="temperatures",
    title="FID over the temperatures τ_S of the student and τ_T of the teacher",
    axes=(STUDENT, TEACHER),
    at_end=True,
    metrics=tuple(health.METRICS),
    follows=("method.tau_teacher_cls",),
    max_series=1,
    shown_as="maps",
    each_cell=False,
)


def collect(table: pd.DataFrame, cells: pd.DataFrame | None = None, *, paper: bool = False) -> axis.AxisData:
    """What is drawn: see `axis.collect`."""
    return health.explained(axis.collect(QUESTION, table, cells, paper=paper))


def draw(data: axis.AxisData) -> Figure:
    """The figure: a map of FID; and of the information of the targets where it was recorded."""
    maps = {SCORE: data.score_name}
    if health.recorded(data):
        maps |= {metric: f"information of the {name} targets (nat)" for metric, name in health.METRICS.items()}
    several = "; ± is half the interval" if (data.counting["seeds"] > 1).any() else ""
    caption = f"{data.caption} Dark is good{several}; a hatched place has no cell that counts."
    with style.context():
        figure, panels = style.panels(len(maps), caption, margin=0.6)
        for panel, (column, title) in zip(panels, maps.items(), strict=True):
            _draw_map(panel, data, column)
            panel.set_title(title)
        style.label_axes(panels, TEACHER.name, STUDENT.name)
    return figure


def _draw_map(panel: Axes, data: axis.AxisData, column: str) -> None:
    """One number of each pair of temperatures: its mean over the seeds that count."""
    counting = data.counting[np.isfinite(data.counting[column])].drop(columns=INTERVAL)
    counting = counting.join(axis.interval_columns(counting, [STUDENT.short, TEACHER.short], column))
    shown = {place: rows.iloc[0] for place, rows in counting.groupby([STUDENT.short, TEACHER.short], observed=True)}
    students, teachers = (list(data.frame[a.short].cat.categories) for a in (STUDENT, TEACHER))
    # Colours in the order of goodness: FID is good when it is low, information when it is high.
    shades = matplotlib.colormaps[COLOURS if column == SCORE else f"{COLOURS}_r"]
    scale = _scale(counting["mean"], column)
    points = min(8.0, 32.0 / max(len(teachers), len(students) * 1.2))
    for y, student in enumerate(students):
        for x, teacher in enumerate(teachers):
            values = shown.get((student, teacher))
            if values is None:
                look: dict[str, Any] = {"facecolor": "#F4F4F4", "edgecolor": "#B0B0B0", "hatch": "////", "linewidth": 0}
                text, ink = _why_missing(data, student, teacher), "#202020"
            else:
                colour = shades(scale(values["mean"]))
                look = {"facecolor": colour, "edgecolor": "white", "linewidth": 1.0}
                text, ink = _number(values, column), "white" if _lightness(colour) < 0.5 else "black"
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **look))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if values is None else None
            panel.text(x, y, text, ha="center", va="center", fontsize=points, color=ink, bbox=box, linespacing=1.1)
    panel.set(xlim=(-0.5, len(teachers) - 0.5), ylim=(-0.5, len(students) - 0.5))
    panel.set_xticks(range(len(teachers)), [TEACHER.label(value) for value in teachers])
    panel.set_yticks(range(len(students)), [STUDENT.label(value) for value in students])
    panel.tick_params(length=0)
    panel.grid(visible=False)


def _scale(means: pd.Series, column: str) -> Normalize:
    """From the lowest to the highest mean; of FID beyond a decade logarithmic, of information from 0."""
    low, high = (means.min(), means.max()) if len(means) else (0.0, 1.0)
    if column != SCORE:
        return Normalize(0, max(high, health.DEAD))
    return LogNorm(low, high) if low > 0 and high / low > 10 else Normalize(low, max(high, low + 1e-9))


def _number(values: pd.Series, column: str) -> str:
    """'24.1' and '±2.3' below it; of information whether the targets are dead."""
    mean, half = values["mean"], values["high"] - values["mean"]
    digits = 2 if column != SCORE else 1 if mean < 100 else 0
    spread = f"\n±{half:.{digits}f}" if np.isfinite(half) else ""
    return f"{mean:.{digits}f}{spread}" + ("\ndead" if column != SCORE and mean < health.DEAD else "")


def _why_missing(data: axis.AxisData, student: float, teacher: float) -> str:
    """What is known of the cells of a place that has no number."""
    known = pd.concat([data.frame, data.unevaluated]) if len(data.unevaluated) else data.frame
    states = known.loc[(known[STUDENT.short] == student) & (known[TEACHER.short] == teacher), "state"]
    if states.empty:
        return "not run"
    return "\n".join(STATE_WORDS.get(state, "no value").replace(" ", "\n") for state in states.unique())


def _lightness(colour: Any) -> float:
    """How light it is in grey, from 0 to 1."""
    return float(np.dot(colour[:3], (0.299, 0.587, 0.114)))


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    return axis.make(QUESTION, collect, draw, sweep, tracking_uri, out, paper=paper)


def main() -> None:
    axis.main(figure, QUESTION, __doc__)


if __name__ == "__main__":
    common.run(main)
