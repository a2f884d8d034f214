"""How many times fewer steps, and FLOPs, a system needs to reach the final FID of DiT.

For each seed of a system that the reference has too: the level is the FID of the reference's cell of that seed at its
last step. The system's own curve reaches it at its first crossing, whatever comes after, found between evaluations on
the line of log FID over steps. The ratio is what the reference's cell took in all over what that took. Over seeds:
geometric mean and 95 % t-interval of the log ratio. Pairing by seed takes out what the seed gives to both.

A cell that is never as good, or is so at its first evaluation, gives a bound alone: then there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import axis, common
from analysis.common import SCORE
from analysis.finals import DEFAULT_RATE, RATE

COSTS = ("cost/images", "cost/flops", "cost/device_hours")  # beside steps; metrics to fetch
REFERENCES = ("iddpm", "edm")  # formulations of DiT: as published, and the control
MAX_SYSTEMS = 10


# ----------------------------------------------------------------------------------------------------------- curves


def curves(results: pd.DataFrame, cells: pd.DataFrame | None = None) -> axis.AxisData:
    """What convergence is read from: `axis.collect` with systems as series and, if recorded, learning rates as axis.

    Of its `frame`, series and model.size are called system and size; lr is the default's where there is no such axis;
    the columns `COSTS` are empty where they are not recorded. Raises as `axis.collect` does.
    """
    rates = axis.Axis(RATE, "learning rate", "lr", lambda rate: (rate != DEFAULT_RATE, str(rate)), str)
    several = RATE in results
    question = axis.Question(
        "convergence",
        "FID at each evaluation",
        axes=(rates,) if several else (),
        follows=("train.lr",) if several else (),
        metrics=(*COSTS, "model.size"),
        max_series=MAX_SYSTEMS,
    )
    data = axis.collect(question, results, cells)
    frame = data.frame.rename(columns={"series": "system", "model.size": "size"})
    frame[RATE] = frame[RATE].astype(str) if several else DEFAULT_RATE
    return replace(data, frame=frame.astype({"system": str, **dict.fromkeys(COSTS, float)}))


# --------------------------------------------------------------------------------------------------------- speed-up


class Crossing(NamedTuple):
    """Where a curve is first as low as a level; the bound is '<' or '>' where it lies beyond what was evaluated."""

    cost: np.ndarray  # steps, FLOPs
    bound: str  # of the speed-up


def crossing(fid: np.ndarray, cost: np.ndarray, level: float) -> Crossing:
    """First crossing of `level` by finite scores `fid` (n,) in the order of `cost` (n, k), in the units of cost."""
    low = np.flatnonzero(fid <= level)
    if not len(low):
        return Crossing(cost[-1], "<")
    i = low[0]
    if i == 0:
        return Crossing(cost[0], ">" if fid[0] < level else "")
    above, at, below = np.log((fid[i - 1], level, fid[i]))
    return Crossing(cost[i - 1] + (above - at) / (above - below) * (cost[i] - cost[i - 1]), "")


def speedups(results: pd.DataFrame) -> pd.DataFrame:
    """One row per (reference, other system of its size), of cells that are done at their default learning rates.

    Args:
        results: as from `sddit.results.load_results`, with the metrics `COSTS`.

    Returns:
        Columns reference, system, seeds (that both have), not_reached (seeds that never are as good), at_first (seeds
        that are at their first evaluation), early (seeds whose reference had been as good before its last step, so that
        the ratio flatters), bound ('<' or '>' where the values are bounds); steps and flops: the factor by which fewer
        are needed, with NAME_low, NAME_high (95 % t-interval) and NAME_text. NaN: not known.

    Raises as `curves` does.
    """
    return speedups_of(curves(results).frame)


def speedups_of(frame: pd.DataFrame) -> pd.DataFrame:
    """`speedups` of the frame of `curves`."""
    done = frame[(frame["state"] == "done") & (frame[RATE] == DEFAULT_RATE) & np.isfinite(frame[SCORE])]
    cells = {
        key: {seed: rows.sort_values("step") for seed, rows in members.groupby("seed")}
        for key, members in done.groupby(["system", "method", "kind", "size"], sort=False, dropna=False)
    }
    rows = []
    for kind in REFERENCES:
        for (reference, *what, size), theirs in cells.items():
            if what != ["dit", kind]:
                continue
            for (system, _, _, other_size), ours in cells.items():
                seeds = sorted(ours.keys() & theirs.keys())
                if system != reference and str(other_size) == str(size) and seeds:
                    pairs = [(theirs[seed], ours[seed]) for seed in seeds]
                    rows.append({"reference": reference, "system": system} | _over_seeds(pairs))
    of_costs = [f"{name}{part}" for name in ("steps", "flops") for part in ("", "_low", "_high", "_text")]
    columns = ["reference", "system", "seeds", "not_reached", "at_first", "early", "bound", *of_costs]
    return pd.DataFrame(rows, columns=columns)


def _over_seeds(pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]]) -> dict[str, object]:
    """The row of pairs (reference's cell, system's cell) of one seed each."""
    costs = ["step", "cost/flops"]
    log_ratios, bounds, early = [], [], 0
    for theirs, ours in pairs:
        fid, total = theirs[SCORE].to_numpy(), theirs[costs].to_numpy(dtype=float)[-1]
        early += bool((fid[:-1] <= fid[-1]).any())
        reached = crossing(ours[SCORE].to_numpy(), ours[costs].to_numpy(dtype=float), fid[-1])
        log_ratios.append(np.log(total / reached.cost))
        bounds.append(reached.bound)
    counts = {"seeds": len(pairs), "not_reached": bounds.count("<"), "at_first": bounds.count(">"), "early": early}
    bound = "".join(sorted(set(bounds) - {""}))  # both: a mean of upper and lower bounds bounds nothing
    row: dict[str, object] = counts | {"bound": bound if len(bound) < 2 else ""}
    for name, values in zip(("steps", "flops"), np.transpose(log_ratios), strict=True):
        mean, low, high = np.exp(common.t_interval(values))
        if bound:
            low = high = np.nan
        value = mean if len(bound) < 2 else np.nan
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        row[f"{name}_text"] = _text(value, low, high, bound)
    return row


def _text(value: float, low: float, high: float, bound: str) -> str:
    """'2.13× [1.80, 2.52]', '> 3.00×', '0.95×', or 'unknown'."""
    if np.isnan(value):
        return "unknown"
    interval = "" if np.isnan(low) else f" [{_factor(low)}, {_factor(high)}]"
    return (f"{bound} " if bound else "") + f"{_factor(value)}×{interval}"


def _factor(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def in_words(table: pd.DataFrame) -> str:
    """The caption's sentences on what `speedups` gives; empty where there is no DiT to compare with."""
    sentences = []
    for reference, rows in table.groupby("reference", sort=False):
        parts = []
        for row in rows.to_dict("records"):
            unreached = f", not reached by {row['not_reached']} of {common.counted(row['seeds'], 'seed')}"
            parts.append(
                f"{row['system']} {row['steps_text']} / {row['flops_text']}{unreached if row['not_reached'] else ''}"
            )
        sentences.append(f"Saved on the way to the final FID of {reference}, steps / FLOPs: {'; '.join(parts)}.")
        if rows["early"].any():
            sentences.append(f"{reference} had been as good before its last step, which flatters the others.")
    if sentences:
        several = "paired by seed, geometric mean [95% t-interval]"
        how = "one seed, no interval" if table["seeds"].max() == 1 else several
        sentences.append(f"Factors: {how}, up to the first crossing; below 1 more is needed.")
    return " ".join(sentences)
