"""How every figure looks: one style, and one colour, marker and line for each method.

Figures are made without pyplot, so nothing here touches a screen, or the figures of a notebook that imports it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import matplotlib.style
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from numpy.typing import ArrayLike

from sddit.config import METHOD_CONFIGS

METHOD_NAMES = {"dit": "DiT", "maskdit": "MaskDiT", "mdt": "MDT", "sddit": "SD-DiT"}
# Okabe and Ito's colours, told apart by colour-blind readers; in grey the markers and lines tell them apart.
COLOURS = {"dit": "#404040", "maskdit": "#D55E00", "mdt": "#007A59", "sddit": "#0060A0"}
MARKERS = {"dit": "s", "maskdit": "^", "mdt": "D", "sddit": "o"}
LINES = {"dit": ":", "maskdit": "-.", "mdt": "--", "sddit": "-"}
OTHER_COLOUR, OTHER_MARKER, OTHER_LINE = "#7A4988", "P", "-"  # a method that is not in the tables


class Look(NamedTuple):
    """How one method is drawn, in every figure."""

    label: str
    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


# The control that the paper lacks has a look of its own; it is no variant of the method "sddit" or "dit".
DIT_EDM = Look("DiT (EDM)", "#A0407A", "v", (0, (5, 1, 1, 1, 1, 1)))

LABELS = ("DiT", DIT_EDM.label, "MaskDiT", "MDT", "SD-DiT")  # the order of figures and tables


def look(method: str, kind: str | None = None) -> Look:
    """Of a method under a formulation ('edm', 'iddpm'; else its published one), which the label names if unusual."""
    unusual = method in METHOD_CONFIGS and bool(kind) and kind != METHOD_CONFIGS[method].published_kind  # type: ignore[attr-defined]
    if unusual and method == "dit":
        return DIT_EDM
    label = METHOD_NAMES.get(method, method) + (f" ({kind.upper()})" if unusual and kind else "")
    return Look(
        label,
        COLOURS.get(method, OTHER_COLOUR),
        MARKERS.get(method, OTHER_MARKER),
        LINES.get(method, OTHER_LINE),
    )


# Cells that are in no mean are faded, and hollow.
STATE_MARKERS = {"pruned": "v", "failed": "X", "running": "o", "done": "d"}  # done: with fewer steps than others
STATE_ALPHA = 0.6
FLOOR = {"color": "#8C8C8C", "linewidth": 0.9, "linestyle": "--"}  # of the noise floor

PANEL_WIDTH, PANEL_HEIGHT, MARGIN_WIDTH = 3.2, 2.7, 1.5  # inches; the margin holds axis label and legend
CAPTION_POINTS = 7.0
POINTS_PER_INCH = 72

FONT = "DejaVu Sans"  # ships with matplotlib: the same letters on every machine
RC = {
    "font.family": FONT,
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "errorbar.capsize": 2.0,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType: text stays text, as journals ask
}


def context() -> AbstractContextManager[None]:
    """The style, whatever the user's own matplotlib settings; draw and save inside it."""
    return matplotlib.style.context(RC, after_reset=True)


def shade(colour: str, strength: float) -> tuple[float, float, float]:
    """The colour mixed with white; strength 1 is the colour itself."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def shades(colour: str, count: int) -> list[tuple[float, float, float]]:
    """`count` shades from light to the colour itself, which the last one has; evenly lighter in grey as well."""
    return [shade(colour, strength) for strength in np.linspace(0.4, 1.0, count)] if count > 1 else [to_rgb(colour)]


def panels(
    count: int,
    caption: str,
    *,
    size: tuple[float, float] = (PANEL_WIDTH, PANEL_HEIGHT),
    margin: float = MARGIN_WIDTH,
    share: bool | Literal["row"] = True,
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, and the caption below them in as many lines as it needs.

    Args:
        count: two and three panels stand side by side, four in two rows, more in rows of three.
        caption: its paragraphs end with a line break.
        size: width and height of a panel, in inches.
        margin: what the figure is wider than its panels, in inches.
        share: one pair of axes for all panels; 'row': one y axis for each row; False: each its own.
    """
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    width = columns * size[0] + margin
    lines = [line for part in caption.split("\n") for line in _wrap(part, width - 0.3)]
    caption_height = (len(lines) + 1) * 1.25 * CAPTION_POINTS / POINTS_PER_INCH
    height = rows * size[1] + caption_height
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    below = caption_height / height
    figure.set_layout_engine("constrained", rect=(0, below, 1, 1 - below))
    figure.text(
        0.15 / width, below - 0.04 / height, "\n".join(lines), va="top", fontsize=CAPTION_POINTS, linespacing=1.25
    )
    axes = figure.subplots(rows, columns, sharex=share is True, sharey=share, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def label_axes(axes: list[Axes], x_label: str, y_label: str) -> None:
    """Names the common axes of `panels` at the left, and below the last panel of each column."""
    for i, panel in enumerate(axes):
        columns = panel.get_gridspec().ncols  # type: ignore[union-attr]  # made by `subplots`, so it has one
        if i + columns >= len(axes):
            panel.set_xlabel(x_label)
            panel.tick_params(labelbottom=True)
        if i % columns == 0:
            panel.set_ylabel(y_label)


def score_limits(scores: ArrayLike, lows: ArrayLike, highs: ArrayLike) -> tuple[float, float, bool]:
    """Lowest and highest value of a score's axis, and whether intervals reach beyond.

    Every score is inside, and intervals up to half as much again: with two seeds they can be far wider than all that
    was measured, and would press the lines flat. Room is left at both ends as a logarithmic axis needs it where
    `score_axis` makes one.
    """
    least, most = np.nanmin(scores), np.nanmax(scores)
    low = max(np.nanmin(np.append(lows, least)), least / 1.5)
    high = min(np.nanmax(np.append(highs, most)), most * 1.5)
    room = 0.06 * (high - low) or 0.5
    if low > 0 and (low <= room or (high + room) / (low - room) > 10):
        low, high = low / 1.15, high * 1.15
    else:
        low, high = low - room, high + room
    return low, high, bool((np.asarray(lows) < low).any() or (np.asarray(highs) > high).any())


def score_axis(panel: Axes, low: float, high: float, which: Literal["x", "y"] = "y") -> None:
    """Sets the limits of an axis with scores; beyond a decade it is logarithmic."""
    if low > 0 and high / low > 10:
        panel.set(**{f"{which}scale": "log"})
        axis = panel.yaxis if which == "y" else panel.xaxis
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    panel.set(**{f"{which}lim": (low, high)})


def _wrap(text: str, width: float) -> list[str]:
    """The text in lines of at most `width` inches in the caption's font, broken between words."""
    font = FontProperties(family=FONT, size=CAPTION_POINTS)
    measure = TextToPath()
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        points, _, _ = measure.get_text_width_height_descent(longer, font, ismath=False)
        if points > width * POINTS_PER_INCH and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
