"""Parallel coordinates: one upright scale an axis, one line a cell; for axes of numbers, of words, and of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import common
from sddit.config import SIZE_GRIDS

ABSENT = -0.16  # where a cell stands that does not have the axis
WORD_ROOM = 0.16  # of the scale, for each word above numbers, and for a zero below them
MAX_MARKS = 6  # different numbers that have a mark each
WIDE = 30.0  # highest over lowest, from which on a scale is logarithmic
SIZES = list(SIZE_GRIDS["paper"])
SPREAD = 0.05  # lines through one value are drawn beside each other, over so much of the scale


def sorted_out(values: Sequence[Any]) -> list[float | str | None]:
    """Numbers as numbers, None or NaN as None, all else as words; so is a zero among numbers of a wide range,
    which a logarithmic scale has no place for."""
    known = [None if value is None or value != value else value for value in values]
    plain = [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in known]
    numbers = [value for value in plain if isinstance(value, float)]
    switched = 0.0 in numbers and _wide([value for value in numbers if value])
    return [
        value if value is None else str(known[i]) if not isinstance(value, float) else "0" if switched and not value
        else value for i, value in enumerate(plain)
    ]  # fmt: skip


def _wide(numbers: Sequence[float]) -> bool:
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE


def spread(numbers: Sequence[float]) -> Callable[[float], float]:
    """What makes these numbers even: their logarithm if they have a wide range; for rates like 0.9, 0.99, 0.999 that of
    their distance to one; or nothing."""
    if _wide(numbers):
        return math.log10
    if min(numbers) >= 0.5 and max(numbers) < 1 and _wide([1 - number for number in numbers]):
        return lambda number: -math.log10(1 - number)
    return float


def scale(values: Sequence[Any]) -> tuple[np.ndarray, dict[float, str]]:
    """Where the values stand on an upright scale from 0 to 1, and its marks.

    Words stand above the numbers, a zero that counts as one below them, and a value that is absent below it all.
    """
    known = sorted_out(values)
    numbers = [value for value in known if isinstance(value, float)]
    words = sorted({value for value in known if isinstance(value, str)}, key=_size)
    marks: dict[float, str] = {}
    places: dict[Any, float] = {None: ABSENT}
    if numbers:
        zero = {"0"} & set(words) if _wide(numbers) else set()
        bottom, above = WORD_ROOM * len(zero), [word for word in words if word not in zero]
        top = max(0.5, 1 - WORD_ROOM * len(above))
        even = spread(numbers)
        low, high = even(min(numbers)), even(max(numbers))

        def place(number: float) -> float:
            share = (even(number) - low) / (high - low) if high > low else 0.5
            return bottom + share * (top - bottom)

        places |= {number: place(number) for number in numbers}
        marks |= {place(mark): f"{mark:.4g}" for mark in _marks(numbers, [places[n] for n in sorted(set(numbers))])}
        places |= dict.fromkeys(zero, 0.0)
        places |= dict(zip(above, np.linspace(top, 1, len(above) + 1)[1:].tolist(), strict=True))
    else:
        places |= dict(zip(words, np.linspace(0, 1, len(words)).tolist() if len(words) > 1 else [0.5], strict=False))
    marks |= {places[word]: word for word in words}
    if None in known:
        marks[ABSENT] = "none"
    return np.array([places[value] for value in known]), marks


def _size(word: str) -> tuple[int, str]:
    """Sort key: sizes like 'S/2' from small to large, other words by their letters."""
    letter = word.partition("/")[0]
    return (SIZES.index(letter) if letter in SIZES and "/" in word else len(SIZES)), word


def _marks(numbers: Sequence[float], places: Sequence[float]) -> list[float]:
    """Numbers to mark: each, where they are few and short and lie apart, else round ones."""
    low, high = min(numbers), max(numbers)
    each = sorted(set(numbers))
    if len(each) <= MAX_MARKS and (np.diff(places) > 0.08).all() and all(float(f"{n:.4g}") == n for n in each):
        return each
    if spread(numbers) is float:
        found = list(matplotlib.ticker.MaxNLocator(4).tick_values(low, high))
    elif _wide(numbers):
        decades = np.log10(high / low)
        subs = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        found = list(matplotlib.ticker.LogLocator(subs=subs).tick_values(low, high))
    else:
        found = [1 - 10.0**-i for i in range(1, 10)]
    slack = 1e-9 * (high - low)
    inside = [float(mark) for mark in found if low - slack <= mark <= high + slack]
    return inside if len(inside) > 1 else [low, high] if high > low else [low]


def draw(panel: Axes, values: pd.DataFrame, looks: Sequence[dict[str, Any]]) -> None:
    """One line a row of `values`, over its columns; `looks` has keywords of `Axes.plot` for each. The last lies on top.

    Raises:
        ValueError: there are fewer than two columns.
    """
    width = values.shape[1] - 1
    if width < 1:
        raise ValueError("parallel coordinates need two axes")
    places = np.empty(values.shape)
    lowest = 0.0
    for i, axis in enumerate(values):
        where, marks = scale(values[axis].tolist())
        places[:, i] = _beside_each_other(where)
        lowest = min(lowest, *marks)
        panel.plot([i, i], [0, 1], color="#404040", linewidth=1.0, zorder=5)
        for place, mark in marks.items():
            panel.plot([i - 0.003 * width, i + 0.003 * width], [place, place], color="#404040", linewidth=1.0, zorder=5)
            panel.text(
                i + 0.006 * width, place, mark, fontsize=7, va="center", zorder=6,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip
        name = common.axis_name(str(axis))
        panel.text(i, 1.07, name if len(name) < 9 else name.replace(" ", "\n"), ha="center", va="bottom", fontsize=8)
    for row, look in zip(places, looks, strict=True):
        panel.plot(np.arange(width + 1), row, **look)
    panel.set(xlim=(-0.04 * width, 1.08 * width), ylim=(lowest - 0.05, 1.05))
    panel.set_axis_off()


def _beside_each_other(where: np.ndarray) -> np.ndarray:
    """Lines through one value moved apart, in the order they come in."""
    moved = where.astype(float)
    for place in np.unique(where):
        (same,) = np.nonzero(where == place)
        if len(same) > 2:
            moved[same] += np.linspace(SPREAD / 2, -SPREAD / 2, len(same))
    return moved
