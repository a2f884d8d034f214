"""Lines of FID over an axis of a sweep: means with intervals, the seeds beside them, what does not count faded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from analysis import common, style
from analysis.axis import Axis, AxisData
from analysis.common import SCORE
from sddit.results import STATE_WORDS

MAX_LEGEND_STEPS = 10
STATE_LABELS = {**STATE_WORDS, "done": "fewer steps"}
MIXED = "#404040"  # the legend's colour where panels differ in theirs


def draw_steps(data: AxisData, below: Callable[[Axes, pd.DataFrame], None] | None = None) -> Figure:
    """One panel a series, one line an evaluation step; under each, or beside the only one, what `below` draws over the
    same axis from the rows of the series."""
    (over,) = data.question.axes
    frame = finite(data.frame)
    steps, last = sorted(frame["step"].unique()), common.last_done(frame)
    names = list(dict.fromkeys(data.frame["series"]))
    low, high, cut = limits(frame)
    caption = f"{data.caption} {cut}".strip()
    with style.context():
        share: bool | Literal["row"] = True
        if below:
            share = "row" if len(names) > 1 else False  # of a single series both panels stand in one row
        figure, panels = style.panels(len(names) * (2 if below else 1), caption, share=share)
        upper = panels[: len(names)]
        for panel, name in zip(upper, names, strict=True):
            rows = frame[frame["series"] == name]
            look = look_of(rows)
            for step, colour in zip(steps, style.shades(look.colour, len(steps)), strict=True):
                draw_line(panel, over, rows[rows["step"] == step], look, colour, strong=step == last)
            if len(names) > 1:
                panel.set_title(name)
            style.score_axis(panel, low, high)
            ticks(panel, over, frame)
        floor = draw_floor(upper, data.floor)
        style.label_axes(upper, over.name, data.score_name)
        common_colour = look_of(frame).colour if len(names) == 1 else MIXED
        handles = [*_step_handles(steps, last, common_colour), *state_handles(frame, common_colour), *floor]
        figure.legend(handles=handles, title="step", loc="outside right upper", alignment="left")
        if below:
            for panel, name in zip(panels[len(names) :], names, strict=True):
                below(panel, frame[frame["series"] == name])
                ticks(panel, over, frame)
                panel.set_xlabel(over.name)
    return figure


def draw_line(
    panel: Axes,
    over: Axis,
    rows: pd.DataFrame,
    look: style.Look,
    colour: Any,
    *,
    y: str = SCORE,
    strong: bool = True,
    dots: bool = True,
    shift: float = 0.0,
) -> None:
    """The line of one series at one step.

    Args:
        panel: where.
        over: the axis along x.
        rows: as of `AxisData.frame`; those with `seeds` count, the others are drawn faded.
        look: marker and line.
        colour: of it all.
        y: the column that the rows' mean, low and high are of.
        strong: it lies over the others.
        dots: the seeds beside their means.
        shift: to the right, for lines whose intervals would cover each other.
    """
    counts = rows["seeds"].notna()
    rows = rows.assign(x=positions(over, rows) + shift)
    ranks = shift + np.arange(len(rows[over.short].cat.categories)) if over.rank else None
    places = np.sort(rows["x"].unique()) if ranks is None else ranks
    aside = dots * (0.02 * np.ptp(places) if len(places) > 1 else 0.01)  # else the mean would hide what lies under it
    # A place without a cell that counts breaks the line, which would otherwise claim a value there.
    means = rows[counts].drop_duplicates("x").set_index("x").reindex(places)
    above = 3 + strong
    panel.errorbar(
        places, means["mean"], yerr=[means["mean"] - means["low"], means["high"] - means["mean"]],
        color=colour, linewidth=2.0 if strong else 1.2, markersize=6 if strong else 4.5,
        elinewidth=1.2 if strong else 0.8, zorder=above, **marks(look),
    )  # fmt: skip
    several = rows[counts & (rows["seeds"] > 1)]
    if dots:
        panel.plot(several["x"] + aside, several[y], ".", color=colour, markersize=3.5, zorder=above)
    for state, some in rows[~counts].groupby("state"):
        taken = some["x"].isin(rows.loc[counts, "x"])
        draw_faded(panel, some["x"] - 1.5 * aside * taken, some[y], str(state), colour, zorder=above)


def marks(look: style.Look) -> dict[str, Any]:
    """The marker and the line of a look, as matplotlib names them."""
    return {"marker": look.marker, "linestyle": look.line}


def draw_faded(panel: Axes, x: Any, y: Any, state: str, colour: Any, zorder: float = 3) -> None:
    """Cells that count nowhere."""
    panel.plot(
        x, y, style.STATE_MARKERS.get(state, "o"), color=colour, markerfacecolor="none", alpha=style.STATE_ALPHA,
        markersize=6, zorder=zorder, clip_on=False,
    )  # fmt: skip


def draw_floor(panels: Iterable[Axes], floor: common.NoiseFloor | None, *, vertical: bool = False) -> list[Line2D]:
    """The noise floor, if it is in the visible range, and its handle for the legend."""
    handles: list[Line2D] = []
    for panel in panels:
        low, high = panel.get_xlim() if vertical else panel.get_ylim()
        if floor and low < floor.mean < high:
            draw = panel.axvline if vertical else panel.axhline
            draw(floor.mean, zorder=1.5, **style.FLOOR)  # type: ignore[arg-type]
            handles = [Line2D([], [], label="noise floor", **style.FLOOR)]  # type: ignore[arg-type]
    return handles


def limits(frame: pd.DataFrame, within: pd.Series | None = None) -> tuple[float, float, str]:
    """Lowest and highest value of the score's axis, and the caption's sentence on what reaches beyond.

    Of the rows `within`, where there are any, every score is inside; the others are for the caller to clip.
    """
    shown = frame[within] if within is not None and within.any() else frame
    low, high, cut = style.score_limits(shown[SCORE], shown["low"], shown["high"])
    beyond = not frame[SCORE].between(low, high).all()
    sentences = ["Some intervals reach beyond the frame."] if cut else []
    return low, high, " ".join([*sentences, *(["Faded marks at its edge are beyond it."] if beyond else [])])


def finite(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows whose score can be drawn."""
    return frame[np.isfinite(frame[SCORE])]


def positions(over: Axis, rows: pd.DataFrame) -> pd.Series:
    """Where the rows stand along the axis: at their values, or at the rank of these."""
    return rows[over.short] if over.rank is None else rows[over.short].cat.codes.astype(float)


def ticks(panel: Axes, over: Axis, frame: pd.DataFrame) -> None:
    """Ticks at the values themselves, unless their labels would touch; of a ranked axis always."""
    if over.rank is not None:
        values = list(frame[over.short].cat.categories)
        panel.set_xlim(-0.4, len(values) - 0.6)
        panel.set_xticks(range(len(values)), [over.label(value) for value in values])
        return
    places = np.sort(frame[over.short].unique())
    span = places[-1] - places[0]
    panel.set_xlim(places[0] - (0.06 * span or 0.1), places[-1] + (0.06 * span or 0.1))
    if len(places) == 1 or np.diff(places).min() >= 0.11 * span:
        panel.set_xticks(places, [over.label(place) for place in places])


def log_ticks(panel: Axes) -> None:
    """A logarithmic x axis over numbers like 2×10¹³."""
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def state_handles(frame: pd.DataFrame, colour: Any) -> list[Line2D]:
    """What the faded marks mean."""
    return [
        Line2D([], [], linestyle="", marker=style.STATE_MARKERS.get(state, "o"), color=colour, markerfacecolor="none",
               alpha=style.STATE_ALPHA, label=STATE_LABELS.get(state, state))
        for state in frame.loc[frame["seeds"].isna(), "state"].unique()
    ]  # fmt: skip


def _step_handles(steps: list[int], last: int | None, colour: str) -> list[Line2D]:
    """Steps from the first to the last, at most `MAX_LEGEND_STEPS` of them."""
    colours = style.shades(colour, len(steps))
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(len(steps), MAX_LEGEND_STEPS))})
    return [
        Line2D([], [], color=colours[i], linewidth=2.0 if steps[i] == last else 1.2, label=f"{steps[i]:,}")
        for i in shown
    ]


def look_of(rows: pd.DataFrame) -> style.Look:
    """How the method of these rows is drawn."""
    return style.look(rows["method"].iloc[0], rows["kind"].iloc[0]) if len(rows) else style.look("")


def series_colours(frame: pd.DataFrame) -> dict[Any, Any]:
    """A colour for each series: its method's, and shades of that where several share it."""
    looks = {name: look_of(frame[frame["series"] == name]) for name in dict.fromkeys(frame["series"])}
    alike: dict[style.Look, list[Any]] = {}
    for name, look in looks.items():
        alike.setdefault(look, []).append(name)
    return {
        name: colour
        for look, names in alike.items()
        for name, colour in zip(names, style.shades(look.colour, len(names)), strict=True)
    }
