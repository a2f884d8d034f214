"""What a sweep says: its settings with their final scores over seeds, and its question answered in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import common
from sddit.config import FRESH_SEED
from sddit.results import STATE_WORDS

SCORE = "eval/fid"
SPEAKING = ("system", "component")  # axes whose values need no name beside them


@dataclass(frozen=True)
class Setting:
    """The cells that differ in their seeds alone."""

    point: dict[str, Any]  # axis → value
    steps: int
    cells: list[dict[str, Any]]  # rows as from `load_cells`

    @property
    def name(self) -> str:
        words = (
            value_text(v) if a in SPEAKING else f"{common.axis_name(a)} {value_text(v)}" for a, v in self.point.items()
        )
        return ", ".join(words) or "the one setting"

    def values(self, metric: str = SCORE, *, fresh: bool = False) -> dict[int, float]:
        """seed → value at the last step, of the cells that are done; of the fresh seeds or of the others."""
        done = [c for c in self.cells if c["state"] == "done" and (c["seed"] >= FRESH_SEED) == fresh]
        found = {c["seed"]: c["metrics"].get(metric, np.nan) for c in done}
        return {seed: value for seed, value in sorted(found.items()) if not np.isnan(value)}


def collect(cells: pd.DataFrame, axes: Sequence[str] = ()) -> list[Setting]:
    """The settings of a sweep: in the order of their values, those of more than two axes by FID.

    Args:
        cells: as from `sddit.results.load_cells`.
        axes: the names of the sweep's axes, in order; without any, all fields that the cells differ in.

    Raises:
        UsageError: cells were scored under several protocols.
    """
    cells = cells[cells["seed"].notna()]  # a process that dies at once leaves a run without fields
    if not axes:
        values = {(name, repr(value)) for params in cells["params"] for name, value in params.items()}
        axes = sorted(name for name, count in Counter(name for name, _ in values).items() if count > 1)
        axes = [name for name in axes if name != "seed"]
    common.check_protocol(cells[(cells["state"] == "done") & cells["metrics"].map(lambda m: SCORE in m)])
    groups: dict[str, Setting] = {}
    for cell in rows_of(cells):
        point = {axis: cell["params"].get(axis) for axis in axes}
        groups.setdefault(repr((point, cell["steps"])), Setting(point, cell["steps"], [])).cells.append(cell)
    settings = list(groups.values())
    if len(axes) > 2:
        return sorted(settings, key=_mean)
    met: dict[Any, int] = {}  # words have no order but that in which the sweep lists them
    for setting in settings:
        for value in setting.point.values():
            met.setdefault(value_text(value), len(met))

    def place(value: Any) -> tuple[bool, float]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return not number, value if number else met[value_text(value)]

    return sorted(settings, key=lambda s: ([place(v) for v in s.point.values()], s.steps))


def rows_of(cells: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in cells.to_dict("records")]


def _mean(setting: Setting) -> float:
    return interval(setting.values().values())[0] if setting.values() else np.inf


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval; over infinite values there is no interval."""
    sample = list(values)
    return common.t_interval(sample) if np.isfinite(sample).all() else (np.inf, np.nan, np.nan)


def value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def ranked(settings: Iterable[Setting]) -> list[Setting]:
    """Those with a score at the sweep's last step, lowest mean first."""
    scored = [setting for setting in settings if setting.values()]
    last = max((setting.steps for setting in scored), default=0)
    return sorted((setting for setting in scored if setting.steps == last), key=_mean)


def answer(settings: Sequence[Setting], floor: common.NoiseFloor | None, reference: dict[str, Any]) -> list[str]:
    """Sentences, the first of which answers the question; the others say what it is worth.

    Args:
        settings: as from `collect`.
        floor: the noise floor, where one is recorded.
        reference: axis → value of the setting that others are compared with; empty: with the runner-up.
    """
    compared = ranked(settings)
    if not compared:
        cells = [cell for s in settings for cell in s.cells]
        known = f"none of {common.counted(len(cells), 'cell')} is done with a FID ({states_text(cells)})"
        return [f"No answer yet: {known if cells else 'no cell is recorded'}."]
    best, *others = compared
    sentences = [f"Lowest mean FID at the last step ({best.steps:,}): {_over(best.values())}, with {best.name}."]
    if floor:
        sentences.append(f"{floor} No score below it means anything.")
    if others:
        rival = next((s for s in others if reference and reference.items() <= s.point.items()), others[0])
        role = "the reference" if reference and reference.items() <= rival.point.items() else "the runner-up"
        sentences.append(f"Difference to {rival.name}, {role}: {_difference(best.values(), rival.values())}")
        picked = f"Picked from {len(compared)} settings by these seeds, which flatters it"
        if fresh := best.values(fresh=True):
            sentences.append(f"{picked}; with fresh seeds, which did not pick it: {_over(fresh)}.")
            if against := rival.values(fresh=True):
                sentences.append(f"Difference with fresh seeds: {_difference(fresh, against)}")
        else:
            sentences.append(f"{picked}: no fresh seed has confirmed it yet (--confirm K trains it with K).")
    if len({len(s.values()) for s in compared}) > 1:
        sentences.append("The settings differ in how many seeds are done.")
    if out := len(settings) - len(compared):
        sentences.append(f"Not compared: {common.counted(out, 'setting')} without a FID at step {best.steps:,}.")
    return sentences


def _over(values: dict[int, float]) -> str:
    """'25.62 (95% interval 24.08 to 27.15 over 3 seeds)'."""
    mean, low, high = interval(values.values())
    if len(values) == 1:
        return f"{mean:.2f} (seed {next(iter(values))} alone: one seed allows no conclusion)"
    spread = f"95% interval {low:.2f} to {high:.2f}" if np.isfinite(mean) else "no interval"
    return f"{mean:.2f} ({spread} over {len(values)} seeds)"


def _difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    mean, low, high, seeds = common.paired_difference(pd.Series(ours), pd.Series(theirs))
    if not seeds:
        return "unknown, since they share no seed with a finite FID."
    words = [f"{value:+.2f}".replace("-", "−") for value in (mean, low, high)]
    if seeds == 1:
        return f"{words[0]} with one seed, which allows no conclusion."
    apart = low > 0 or high < 0
    verdict = "which excludes 0" if apart else "which includes 0, so these seeds do not tell them apart"
    return f"{words[0]}, 95% interval {words[1]} to {words[2]}, paired over {seeds} seeds, {verdict}."


def states_text(cells: Iterable[dict[str, Any]]) -> str:
    """'3 done, 1 stopped early'."""
    counts = Counter(c["state"] for c in cells)
    return ", ".join(f"{n} {STATE_WORDS.get(state, state)}" for state, n in sorted(counts.items()))
