"""FID against the mask ratio, one line per evaluation step.

    python analysis/plot_mask_ratio.py                         # the sweep mask_ratio, into figures/
    python analysis/plot_mask_ratio.py --sweep mask_ratio-cifar10

Draws what there is of a sweep that is still running, and says what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import common, style
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results

DEFAULT_SWEEP = "mask_ratio"
RATIO, SCORE = "method.mask_ratio", "eval/fid"
MAX_PANELS = 6
MAX_LEGEND_STEPS = 10
STATE_MARKERS = {"pruned": "v", "failed": "X", "running": "o"}  # hollow and faded


@dataclass(frozen=True)
class MaskRatioData:
    """What is drawn. `frame` has one row per (cell, evaluation step), and is the csv file.

    Its columns: series (the panel), method, mask_ratio, step, seed, state, identity, run_id, eval/fid; and, for cells
    that are done, seeds, mean, low, high over the done seeds of that ratio and step (low and high: 95 % t-interval).
    """

    frame: pd.DataFrame
    score_name: str
    caption: str


# ---------------------------------------------------------------------------------------------------------- collect


def collect(table: pd.DataFrame, cells: pd.DataFrame | None = None, *, paper: bool = False) -> MaskRatioData:
    """What is drawn, from the sweep's results and, to say what is missing, its cells.

    Args:
        table: as from `sddit.results.load_results`.
        cells: as from `sddit.results.load_cells`; without it, only cells that were evaluated are known.
        paper: say in the caption how this relates to the paper's figure.

    Raises:
        UsageError: the cells differ in protocol, or in more than panels can show.
        SdditError: there is nothing to draw yet.
    """
    usable = table[table[RATIO].notna() & table[SCORE].notna()] if {RATIO, SCORE} <= set(table) else table[:0]
    if usable.empty or not np.isfinite(usable[SCORE]).any():
        known = f"{common.counted(len(cells), 'cell')} recorded, " if cells is not None else ""
        raise SdditError(
            f"Nothing to draw yet: {known}none with both {RATIO} and {SCORE}. "
            "Run the sweep, or run it again to resume: python sweeps/mask_ratio.py"
        )
    common.check_protocol(usable)
    frame = pd.DataFrame(
        {
            "series": _series(usable),
            "method": usable["method.name"],
            "mask_ratio": usable[RATIO].astype(float),
            **{name: usable[name] for name in ("step", "seed", "state", "identity", "run_id", SCORE)},
        }
    )
    frame = frame.sort_values(["series", "mask_ratio", "step", "seed"], key=_in_order).reset_index(drop=True)
    frame = frame.join(_over_seeds(frame))
    extractor = common.the_value(usable, "eval.extractor")
    sentences = [
        _reading(frame, common.the_value(usable, "model.size"), cells),
        common.provenance(usable, cells),
        _missing(frame, table, cells),
        "The paper's Figure 5 is a curve without printed values, so nothing of it is overlaid." if paper else "",
    ]
    return MaskRatioData(frame, f"FID ({extractor})" if extractor else "FID", " ".join(s for s in sentences if s))


def _series(table: pd.DataFrame) -> pd.Series:
    """The panel of each row: its method, and whatever else the cells of that method differ in."""
    labels = table["method.name"].map(lambda name: style.METHOD_NAMES.get(name, name))
    fields = [c for c in table.columns if "." in c and "/" not in c and c not in ("method.name", RATIO)]
    varied: set[str] = set()
    for _, rows in table.groupby("method.name"):
        for field in fields:
            values = rows[field].map(repr)
            if values.nunique() > 1:
                varied.add(field)
                labels[rows.index] += ", " + field.rpartition(".")[2] + " " + rows[field].map(str)
    if labels.nunique() > MAX_PANELS:
        raise UsageError(
            f"The cells differ in more than mask ratio, method and seed: {', '.join(sorted(varied))}, which makes "
            f"{labels.nunique()} lines a step, and at most {MAX_PANELS} can be shown. "
            "For a sweep of many fields use: python analysis/plot_search.py --sweep NAME"
        )
    return labels


def _in_order(column: pd.Series) -> pd.Series:
    """Sort key: panels by method as the style lists them, everything else by value."""
    if column.name != "series":
        return column
    names = list(style.METHOD_NAMES.values())
    return column.map(lambda label: f"{names.index(m) if (m := label.partition(',')[0]) in names else 9}{label}")


def _over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Number, mean and interval over the done seeds of each (series, ratio, step), beside the rows they rest on."""
    columns = pd.DataFrame(np.nan, index=frame.index, columns=["seeds", "mean", "low", "high"])
    for _, rows in frame[frame["state"] == "done"].groupby(["series", "mask_ratio", "step"]):
        columns.loc[rows.index] = (len(rows), *common.t_interval(rows[SCORE]))
    return columns


def _reading(frame: pd.DataFrame, size: str | None, cells: pd.DataFrame | None) -> str:
    """How to read the figure: what is compared, how many cells and steps, which intervals."""
    names = [str(name) for name in frame["series"].unique()]
    what = " ".join(["FID against mask ratio,", *(names if len(names) == 1 else []), *([size] if size else [])])
    seeds = frame["seeds"].dropna()
    if seeds.empty:
        spread = "no cell is done yet"
    elif seeds.max() == 1:
        spread = "one seed, no interval"
    elif seeds.min() == seeds.max():
        spread = f"mean and 95% t-interval over {seeds.max():.0f} seeds (the dots)"
    else:
        spread = f"mean over {seeds.min():.0f} to {seeds.max():.0f} seeds (the dots), 95% t-interval from two on"
    last = _last_done(frame)
    strongest = f", the last ({last:,}) strongest" if last is not None and frame["step"].nunique() > 1 else ""
    done = frame.loc[frame["state"] == "done", "identity"].nunique()
    of = f" of {len(cells)}" if cells is not None and len(cells) > done else ""
    asked = _steps_asked(frame, cells)
    text = (
        f"{what.rstrip(',')}: one line per evaluation step{strongest}; {spread}. {done}{of} cells done, {asked} steps."
    )
    if infinite := int((~np.isfinite(frame[SCORE])).sum()):
        text += f" {common.counted(infinite, 'infinite score')} not drawn."
    return text


def _last_done(frame: pd.DataFrame) -> int | None:
    """The last evaluation step of the cells that are done: the one that counts."""
    done = frame.loc[frame["state"] == "done", "step"]
    return int(done.max()) if len(done) else None


def _steps_asked(frame: pd.DataFrame, cells: pd.DataFrame | None) -> str:
    """The optimiser steps asked of the cells, or where that is not known, the steps they were evaluated at."""
    steps = sorted(set(cells["steps"]) - {0}) if cells is not None else []
    steps = steps or [int(frame["step"].max())]
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


def _missing(frame: pd.DataFrame, table: pd.DataFrame, cells: pd.DataFrame | None) -> str:
    """What a reader who expects a whole sweep has to know."""
    sentences = []
    several = frame["series"].nunique() > 1

    def named(rows: pd.DataFrame) -> str:
        """The cells of these rows as 'ratio 0.3 seed 1', at most four of them."""
        one = rows.drop_duplicates("identity")
        names = [
            f"{f'{row.series}, ' if several else ''}ratio {row.mask_ratio:g} seed {row.seed}"
            for row in one.itertuples()
        ]
        return "; ".join(names[:4]) + (f"; and {len(names) - 4} more" if len(names) > 4 else "")

    faded = frame[frame["state"] != "done"]
    if len(faded):
        parts = [
            f"{rows['identity'].nunique()} {common.STATE_WORDS.get(str(state), state)} ({named(rows)})"
            for state, rows in faded.groupby("state", sort=False)
        ]
        sentences.append(f"Faded, and in no line or mean: {', '.join(parts)}.")
    last = _last_done(frame)
    done = frame[frame["state"] == "done"]
    reached = done.groupby("identity")["step"].transform("max")
    if last is not None and len(short := done[reached < last]):
        sentences.append(f"Done, but with fewer steps than {last:,}: {named(short)}.")
    if cells is not None:
        unevaluated = cells[~cells["identity"].isin(table["identity"])]
        if len(unevaluated):
            states = ", ".join(
                f"{n} {common.STATE_WORDS.get(str(s), s)}" for s, n in unevaluated["state"].value_counts().items()
            )
            sentences.append(f"Not evaluated yet: {common.counted(len(unevaluated), 'cell')} ({states}).")
    elsewhere = table["identity"].nunique() - frame["identity"].nunique()
    if elsewhere:
        sentences.append(f"Without a mask ratio or FID, not drawn: {common.counted(elsewhere, 'cell')}.")
    if absent := _absent(frame, cells):
        listed = "; ".join(absent[:4]) + (f"; and {len(absent) - 4} more" if len(absent) > 4 else "")
        sentences.append(f"Not recorded: {listed}.")
    return " ".join(sentences)


def _absent(frame: pd.DataFrame, cells: pd.DataFrame | None) -> list[str]:
    """Ratios and seeds that occur in the sweep, but not with each other; where there is one series."""
    if frame["series"].nunique() > 1:
        return []
    there = set(zip(frame["mask_ratio"], frame["seed"], strict=True))
    if cells is not None:
        there |= {(p[RATIO], seed) for p, seed in zip(cells["params"], cells["seed"], strict=True) if RATIO in p}
    ratios, seeds = ({pair[i] for pair in there} for i in (0, 1))
    pairs = product(sorted(ratios), sorted(seeds))
    return [f"ratio {ratio:g} seed {seed}" for ratio, seed in pairs if (ratio, seed) not in there]


# ------------------------------------------------------------------------------------------------------------- draw


def draw(data: MaskRatioData) -> Figure:
    """The figure: one panel a series, one line an evaluation step."""
    frame = data.frame[np.isfinite(data.frame[SCORE])]
    steps, last = sorted(frame["step"].unique()), _last_done(frame)
    names = list(dict.fromkeys(data.frame["series"]))
    caption = data.caption
    low, high, cut = _limits(frame)
    if cut:
        caption += " Some intervals reach beyond the frame."
    with style.context():
        figure, panels = style.panels(len(names), caption)
        for panel, name in zip(panels, names, strict=True):
            _draw_panel(panel, frame[frame["series"] == name], steps, last)
            if len(names) > 1:
                panel.set_title(name)
        panels[0].set_ylim(low, high)  # shared by all
        if low > 0 and high / low > 10:
            _logarithmic(panels[0])
        _ratio_ticks(panels[0], frame["mask_ratio"].unique())
        style.label_axes(panels, "mask ratio", data.score_name)
        colour = style.COLOURS.get(frame["method"].iloc[0], style.OTHER_COLOUR) if len(names) == 1 else "#404040"
        handles = _legend(frame, steps, last, colour)
        figure.legend(handles=handles, title="step", loc="outside right upper", alignment="left")
    return figure


def _draw_panel(panel: Axes, frame: pd.DataFrame, steps: list[int], last: int | None) -> None:
    method = frame["method"].iloc[0] if len(frame) else ""
    marker = style.MARKERS.get(method, style.OTHER_MARKER)
    colours = style.shades(style.COLOURS.get(method, style.OTHER_COLOUR), len(steps))
    ratios = np.sort(frame["mask_ratio"].unique())
    aside = 0.02 * np.ptp(ratios) if len(ratios) > 1 else 0.01  # else the mean would hide what lies under it
    for step, colour in zip(steps, colours, strict=True):
        rows = frame[frame["step"] == step]
        strong = step == last
        done = rows[rows["state"] == "done"]
        # A ratio without a done cell breaks the line, which would otherwise claim a value there.
        means = done.drop_duplicates("mask_ratio").set_index("mask_ratio").reindex(ratios)
        above = 3 + strong  # the last step lies over the others
        panel.errorbar(
            ratios, means["mean"], yerr=[means["mean"] - means["low"], means["high"] - means["mean"]],
            color=colour, marker=marker, linestyle=style.LINES.get(method, style.OTHER_LINE),
            linewidth=2.0 if strong else 1.2, markersize=6 if strong else 4.5, elinewidth=1.2 if strong else 0.8,
            zorder=above,
        )  # fmt: skip
        several = done[done["seeds"] > 1]
        panel.plot(several["mask_ratio"] + aside, several[SCORE], ".", color=colour, markersize=3.5, zorder=above)
        for state, some in rows[rows["state"] != "done"].groupby("state"):
            taken = some["mask_ratio"].isin(done["mask_ratio"])
            panel.plot(
                some["mask_ratio"] - 1.5 * aside * taken, some[SCORE], STATE_MARKERS.get(str(state), "o"), color=colour,
                markerfacecolor="none", alpha=0.6, markersize=6, zorder=above,
            )  # fmt: skip


def _limits(frame: pd.DataFrame) -> tuple[float, float, bool]:
    """Lowest and highest value shown, and whether intervals reach beyond.

    Every score is inside, and intervals up to half as much again: with two seeds they can be far wider than all that
    was measured, and would press the lines flat.
    """
    shown = frame[SCORE]
    low = np.nanmax([np.nanmin([shown.min(), frame["low"].min()]), shown.min() / 1.5])
    high = np.nanmin([np.nanmax([shown.max(), frame["high"].max()]), shown.max() * 1.5])
    if low > 0 and high / low > 10:
        low, high = low / 1.15, high * 1.15
    else:
        room = 0.06 * (high - low) or 0.5
        low, high = low - room, high + room
    return low, high, bool((frame["low"] < low).any() or (frame["high"] > high).any())


def _logarithmic(panel: Axes) -> None:
    low, high = panel.get_ylim()
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    panel.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _ratio_ticks(panel: Axes, ratios: np.ndarray) -> None:
    """Ticks at the ratios themselves, unless their labels would touch."""
    ratios = np.sort(ratios)
    span = ratios[-1] - ratios[0]
    panel.set_xlim(ratios[0] - (0.06 * span or 0.1), ratios[-1] + (0.06 * span or 0.1))
    if len(ratios) == 1 or np.diff(ratios).min() >= 0.11 * span:
        panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])


def _legend(frame: pd.DataFrame, steps: list[int], last: int | None, colour: str) -> list[Line2D]:
    """Steps from the first to the last, at most `MAX_LEGEND_STEPS` of them, then what the faded marks mean."""
    colours = style.shades(colour, len(steps))
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(len(steps), MAX_LEGEND_STEPS))})
    handles = [
        Line2D([], [], color=colours[i], linewidth=2.0 if steps[i] == last else 1.2, label=f"{steps[i]:,}")
        for i in shown
    ]
    for state in frame.loc[frame["state"] != "done", "state"].unique():
        handles.append(
            Line2D([], [], linestyle="", marker=STATE_MARKERS.get(state, "o"), color=colour, markerfacecolor="none",
                   alpha=0.6, label=common.STATE_WORDS.get(state, state))
        )  # fmt: skip
    return handles


# ------------------------------------------------------------------------------------------------------------- main


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    table = load_results(sweep, tracking_uri, metrics=())
    data = collect(table, load_cells(sweep, tracking_uri), paper=paper)
    return common.save(draw(data), data.frame, common.output_name("mask_ratio", sweep, DEFAULT_SWEEP), out)


def main() -> None:
    flags = common.parse_flags(__doc__, DEFAULT_SWEEP)
    figure(flags.sweep, flags.tracking_uri, flags.out, paper=flags.paper)


if __name__ == "__main__":
    common.run(main)
