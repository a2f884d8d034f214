"""Parallel coordinates: one upright scale an axis, one line a cell; for axes of numbers, of words, and of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes


ABSENT = -0.16  # where a cell stands that does not have the axis
WORD_ROOM = 0.16  # of the scale, for each word above numbers
MAX_MARKS = 6  # different numbers that have a mark each
DECADE = 10.0
SPREAD = 0.05  # lines through one value are drawn beside each other, over so much of the scale


def axis_name(axis: str) -> str:
    """
    >>> axis_name("method.mask_ratio"), axis_name("method.name"), axis_name("system")
    ('mask ratio', 'method', 'system')
    """
    section, _, name = axis.rpartition(".")
    return (section if section and name == "name" else name).replace("_", " ")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and not pd.isna(value)


def is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def spans_decade(numbers: Sequence[float]) -> bool:
    """Whether an axis of these numbers is logarithmic."""
    return min(numbers) > 0 and max(numbers) / min(numbers) >= DECADE


def scale(values: Sequence[Any]) -> tuple[np.ndarray, dict[float, str]]:
    """Where the values stand on an upright scale from 0 to 1, and its marks.

    Numbers are spread over it, by their logarithm where they span a decade. Words have places of their own, above the
    numbers if there are any; a value that is absent has one below.
    """
    numbers = [float(value) for value in values if is_number(value)]
    words = sorted({str(value) for value in values if not is_number(value) and not is_absent(value)})
    top = max(0.4, 1 - WORD_ROOM * len(words)) if words else 1.0
    marks: dict[float, str] = {}
    places: dict[str, float] = {}
    if numbers:
        marks = {_on(mark, numbers) * top: f"{mark:g}" for mark in _marks(numbers)}
        places = dict(zip(words, np.linspace(top, 1, len(words) + 1)[1:], strict=True))
    elif words:
        places = dict(zip(words, np.linspace(0, 1, len(words)) if len(words) > 1 else [0.5], strict=True))
    marks |= {place: word for word, place in places.items()}
    if any(map(is_absent, values)):
        marks[ABSENT] = "none"
    where = [
        _on(float(value), numbers) * top if is_number(value) else ABSENT if is_absent(value) else places[str(value)]
        for value in values
    ]
    return np.array(where), marks


def _on(value: float, numbers: Sequence[float]) -> float:
    """The place of a number between the lowest, 0, and the highest, 1."""
    low, high = min(numbers), max(numbers)
    if low == high:
        return 0.5
    if spans_decade(numbers):
        return float(np.log(value / low) / np.log(high / low))
    return (value - low) / (high - low)


def _marks(numbers: Sequence[float]) -> list[float]:
    """Numbers to mark: each, where they are few and lie apart, else round ones."""
    low, high = min(numbers), max(numbers)
    each = sorted(set(numbers))
    if len(each) <= MAX_MARKS and (np.diff([_on(value, numbers) for value in each]) > 0.08).all():
        return each
    if spans_decade(numbers):
        decades = np.log10(high / low)
        subs = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        locator: matplotlib.ticker.Locator = matplotlib.ticker.LogLocator(subs=subs)
    else:
        locator = matplotlib.ticker.MaxNLocator(4)
    slack = 1e-9 * (high - low)
    return [float(mark) for mark in locator.tick_values(low, high) if low - slack <= mark <= high + slack]


def draw(panel: Axes, values: pd.DataFrame, styles: Sequence[dict[str, Any]]) -> None:
    """One line a row of `values`, over its columns, drawn in this order with these keywords of `Axes.plot`."""
    places = np.empty(values.shape)
    for i, axis in enumerate(values):
        where, marks = scale(values[axis].tolist())
        places[:, i] = _beside_each_other(where)
        low = min(0.0, *marks)
        panel.plot([i, i], [0, 1], color="#404040", linewidth=1.0, zorder=5)
        for place, mark in marks.items():
            panel.plot([i - 0.015, i + 0.015], [place, place], color="#404040", linewidth=1.0, zorder=5)
            panel.text(
                i + 0.03, place, mark, fontsize=7, va="center", zorder=6, clip_on=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip
        panel.text(
            i, 1.07, axis_name(str(axis)).replace(" ", "\n"), ha="center", va="bottom",
            fontsize=8, linespacing=1.0, clip_on=False,
        )  # fmt: skip
        panel.set_ylim(min(low - 0.04, panel.get_ylim()[0] if i else 0), 1.04)
    for row, look in zip(places, styles, strict=True):
        panel.plot(np.arange(len(row)), row, **look)
    panel.set_xlim(-0.15, values.shape[1] - 0.6)
    panel.set_axis_off()


def _beside_each_other(where: np.ndarray) -> np.ndarray:
    """Lines through one value moved apart, in the order they come in."""
    moved = where.astype(float)
    for place in np.unique(where):
        (same,) = np.nonzero(where == place)
        if len(same) > 2:
            moved[same] += np.linspace(SPREAD / 2, -SPREAD / 2, len(same))
    return moved
