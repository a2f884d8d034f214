"""FID as training goes on, one line per system: against steps, images, FLOPs and device-hours.

    python analysis/plot_convergence.py                        # the sweep convergence, into figures/
    python analysis/plot_convergence.py --sweep NAME --paper   # published values too, where they are comparable

Also writes how many times fewer steps and FLOPs each system needs to reach the final FID of DiT (`analysis.speedup`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from analysis import axis, captions, common, finals, lines, paper, speedup, style
from analysis.common import SCORE
from analysis.finals import DEFAULT_RATE, RATE
from sddit.errors import SdditError
from sddit.results import STATE_WORDS, read_sweep

DEFAULT_SWEEP = "convergence"
PANELS = {
    "step": "optimiser steps",
    "cost/images": "training images",
    "cost/flops": "training FLOPs",
    "cost/device_hours": "device-hours",
}
SYSTEM = ["system", "method", "kind", "size"]
BAND, FAINT = 0.18, 0.35  # alpha of intervals, and of single seeds
PAPER: dict[str, Any] = {"linestyle": "", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.6}


@dataclass(frozen=True)
class ConvergenceData:
    """What is drawn. `frame` has one row per (cell, evaluation step), and is the csv file.

    Its columns: those of `speedup.curves` (seeds, mean, low, high are over the done seeds of that system, rate and
    step), and line: 'default' or 'best', the rate of its system, or 'not drawn'. `published` has the paper's values
    that may be drawn beside them: SYSTEM, step, cost/images, cost/flops, eval/fid.
    """

    frame: pd.DataFrame
    published: pd.DataFrame
    speedups: pd.DataFrame  # as from `speedup.speedups`
    floor: common.NoiseFloor | None
    score_name: str
    caption: str


# ---------------------------------------------------------------------------------------------------------- collect


def collect(table: pd.DataFrame, cells: pd.DataFrame, *, paper: bool = False) -> ConvergenceData:
    """The figure's data.

    Args:
        table: as from `sddit.results.load_results`, with the metrics `speedup.COSTS`.
        cells: as from `sddit.results.load_cells`.
        paper: draw published values where they are comparable, else say why not.

    Raises:
        UsageError: the cells differ in protocol, or in more than lines can show.
        SdditError: there is nothing to draw yet.
    """
    curves = speedup.curves(table, cells)
    frame = curves.frame
    fresh = len(cells) - len(cells := common.without_fresh_seeds(cells))
    best = _best_rates(frame)
    picked = frame[RATE] == frame["system"].map({system: pick.rate for system, pick in best.items()})
    default = frame[RATE] == DEFAULT_RATE
    frame["line"] = np.select([default, picked & (frame["state"] == "done")], ["default", "best"], "not drawn")
    drawn = frame[frame["line"] != "not drawn"]
    if not np.isfinite(drawn[SCORE]).any():
        raise SdditError(
            f"Nothing to draw yet: no finite FID at a default learning rate ({RATE} {DEFAULT_RATE}). "
            "Run the sweep again to resume it: python sweeps/convergence.py"
        )
    scored = cells[cells["identity"].isin(frame["identity"])]
    published, on_published = _published(drawn, scored) if paper else (_no_points(), "")
    factors = speedup.speedups_of(frame)
    evaluated = table[table["identity"].isin(frame["identity"])]
    paragraphs = [
        [_reading(frame, drawn, cells), _rates(frame, best)],
        [speedup.in_words(factors)],
        [common.provenance(evaluated, scored), str(curves.floor or ""), _samplers(drawn, scored)],
        [
            _missing(curves, table, cells),
            f"{common.counted(fresh, 'cell')} of fresh seeds left out." if fresh else "",
            on_published,
        ],
    ]
    caption = "\n".join(text for parts in paragraphs if (text := " ".join(part for part in parts if part)))
    return ConvergenceData(frame, published, factors, curves.floor, curves.score_name, caption)


def _best_rates(frame: pd.DataFrame) -> dict[str, finals.BestRate]:
    """System → the rate that is best at the last step of the default's, where there are several."""
    best = {}
    for system, rows in frame[frame["state"] == "done"].groupby("system", sort=False):
        last = rows.loc[rows[RATE] == DEFAULT_RATE, "step"].max()
        scores = {rate: at.set_index("seed")[SCORE].to_dict() for rate, at in rows[rows["step"] == last].groupby(RATE)}
        if (picked := finals.best_rate(scores)) and picked.among > 1:
            best[str(system)] = picked
    return best


def _no_points() -> pd.DataFrame:
    return pd.DataFrame(columns=[*SYSTEM, "step", "cost/images", "cost/flops", SCORE])


def _published(drawn: pd.DataFrame, cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The values of Table 1 that may stand beside ours, and the caption's words on them."""
    reasons = {
        finals.not_comparable(fields, tags) for fields, tags in zip(cells["params"], cells["tags"], strict=True)
    } - {""}
    if reasons:
        return _no_points(), f"Published values are not drawn. {' '.join(sorted(reasons))}"
    points, notes = [], dict.fromkeys([paper.SOURCE])
    for _, ours in drawn.drop_duplicates(SYSTEM).iterrows():
        batch = ours["cost/images"] / ours["step"]
        for row in paper.TABLE_1:
            same = (row.method, row.size, row.batch) == (ours["method"], ours["size"], batch)
            if same and ours["kind"] == finals.published_kind(ours["method"]):
                costs = {"step": row.steps, "cost/images": row.images, "cost/flops": row.flops}
                points.append({name: ours[name] for name in SYSTEM} | costs | {SCORE: row.fid})
                notes |= dict.fromkeys(row.notes)
    if not points:
        return _no_points(), "The paper has no value for these methods, sizes and batch sizes."
    return pd.DataFrame(points), f"Open markers: the paper's Table 1. {' '.join(notes)}"


# ---------------------------------------------------------------------------------------------------------- caption


def _reading(frame: pd.DataFrame, drawn: pd.DataFrame, cells: pd.DataFrame) -> str:
    """How to read the figure: what is compared, how many cells, which intervals."""
    size = common.the_value(drawn, "size")
    seeds = drawn["seeds"].dropna()
    if seeds.empty:
        spread = "no cell is done yet"
    elif seeds.max() == 1:
        spread = "one seed, no interval"
    else:
        number = f"{seeds.min():.0f} to " * bool(seeds.min() < seeds.max()) + f"{seeds.max():.0f}"
        spread = f"mean and 95% t-interval (bands) over {number} seeds (thin lines)"
    done = (cells["state"] == "done").sum()
    infinite = int((~np.isfinite(frame[SCORE])).sum())
    not_drawn = f"{common.counted(infinite, 'infinite score')} not drawn. " if infinite else ""
    return (
        f"FID at each evaluation{f', {size}' if size else ''}: {spread}. {done} of "
        f"{common.counted(len(cells), 'cell')} done. {not_drawn}FLOPs: all passes of a training step, two per "
        "multiply-add, a pass with gradient counted three times."
    )


def _rates(frame: pd.DataFrame, best: dict[str, finals.BestRate]) -> str:
    """What the lines show of the axis of learning rates."""
    if frame[RATE].nunique() == 1:
        return ""
    text = "Strong lines, and the factors below, are at each system's default learning rate."
    other = [f"{system} {pick.rate} of {pick.among}" for system, pick in best.items() if pick.rate != DEFAULT_RATE]
    if other:
        text += f" Thin lines with markers: the rate that is best at the last step ({', '.join(other)}), "
        text += "picked on the same seeds, which flatters it."
    kept = [f"{system} (of {pick.among})" for system, pick in best.items() if pick.rate == DEFAULT_RATE]
    return text + f" The default is itself the best for {', '.join(kept)}." * bool(kept)


def _samplers(drawn: pd.DataFrame, cells: pd.DataFrame) -> str:
    """Formulation, sampler and cost of a sample: they belong to the system, not to the protocol; batch where unlike."""
    unlike = len({cell.get("train.batch_size") for cell in cells["params"]}) > 1
    facts = {cell["identity"]: cell for cell in cells.to_dict("records")}
    systems: dict[str, list[str]] = {}
    for system, rows in drawn.groupby("system", sort=False):
        cell = facts[rows["identity"].iloc[0]]
        fields, cost = cell["params"], cell["tags"].get("sddit.sampling_flops")
        sampler, steps, average = (fields.get(name, "unknown") for name in finals.SAMPLER_FIELDS)
        what = f"{fields.get('diffusion.kind', 'unknown')}, {sampler} with {steps} steps, weight average {average}"
        what += f", batch size {fields.get('train.batch_size')}" * unlike
        spent = f" {EngFormatter('FLOPs')(float(f'{float(cost):.3g}'))}" if cost else ""
        systems.setdefault(what, []).append(f"{system}{spent}")
    told = " and FLOPs of a sample" if any("FLOPs" in name for names in systems.values() for name in names) else ""
    listed = "; ".join(f"{what} ({', '.join(names)})" for what, names in systems.items())
    return f"Formulation, sampler{told}: {listed}."


def _missing(curves: axis.AxisData, table: pd.DataFrame, cells: pd.DataFrame) -> str:
    """What a reader who expects a whole sweep has to know: of the default rates, and in short of the others."""
    frame = curves.frame.rename(columns={"system": "series"})
    default = [params.get(RATE, DEFAULT_RATE) == DEFAULT_RATE for params in cells["params"]]
    ours, others = cells[default], cells[~np.array(default, dtype=bool)]
    unevaluated = curves.unevaluated[curves.unevaluated["identity"].isin(ours["identity"])]
    evaluated = table[table["identity"].isin(ours["identity"])]
    question = replace(curves.question, axes=())  # names of cells without the rate
    text = captions.missing(question, frame[frame[RATE] == DEFAULT_RATE], unevaluated, evaluated, ours)
    if len(states := others.loc[others["state"] != "done", "state"].value_counts()):
        counts = ", ".join(f"{n} {STATE_WORDS.get(str(state), state)}" for state, n in states.items())
        text += f" Not drawn, at other learning rates: {counts}."
    return text.strip()


# ------------------------------------------------------------------------------------------------------------- draw


def draw(data: ConvergenceData) -> Figure:
    """The figure: one panel a cost, one line a system."""
    frame = lines.finite(data.frame[data.frame["line"] != "not drawn"])
    costs = [name for name in PANELS if frame[name].notna().any()]
    looks = _looks(frame)
    low, high, cut = style.score_limits([*frame[SCORE], *data.published[SCORE]], frame["low"], frame["high"])
    caption = data.caption + (" Some intervals reach beyond the frame." if cut else "")
    with style.context():
        figure, panels = style.panels(len(costs), caption, share="row")
        for panel, cost in zip(panels, costs, strict=True):
            for system, rows in frame.groupby("system", sort=False):
                _draw_system(panel, rows, cost, looks[str(system)], (low, high))
            for point in data.published.to_dict("records"):
                look = looks[point["system"]]
                panel.plot(point.get(cost, np.nan), point[SCORE], look.marker, color=look.colour, zorder=5, **PAPER)
            style.score_axis(panel, low, high)
            panel.set_xlabel(PANELS[cost])
            panel.set_xlim(left=0)
            panel.locator_params(axis="x", nbins=6)
            if cost != "cost/device_hours":
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        for panel in panels[:: panels[0].get_gridspec().ncols]:  # type: ignore[union-attr]  # made by `subplots`
            panel.set_ylabel(data.score_name)
        floor = lines.draw_floor(panels, data.floor)
        published = (
            [Line2D([], [], color=lines.MIXED, marker="o", label="paper", **PAPER)] if len(data.published) else []
        )
        handles = [*_handles(frame, looks), *lines.state_handles(frame, lines.MIXED), *published, *floor]
        figure.legend(handles=handles, loc="outside right upper", alignment="left")
    return figure


def _looks(frame: pd.DataFrame) -> dict[str, style.Look]:
    """One look a system; where several are of one method and formulation, in shades of its colour."""
    looks: dict[str, style.Look] = {}
    for _, rows in frame.groupby(["method", "kind"], sort=False):
        look, systems = lines.look_of(rows), list(rows["system"].unique())
        colours = [to_hex(shade) for shade in style.shades(look.colour, len(systems))]
        looks |= {name: look._replace(colour=colour) for name, colour in zip(systems, colours, strict=True)}
    return {name: looks[name] for name in frame["system"].unique()}


def _draw_system(panel: Axes, rows: pd.DataFrame, cost: str, look: style.Look, limits: tuple[float, float]) -> None:
    drawn: dict[str, Any] = {"color": look.colour, "linestyle": look.line}
    for line, of_line in rows[rows["state"] == "done"].groupby("line"):
        strong = line == "default"
        means = of_line.groupby("step")[[cost, "mean", "low", "high"]].mean()
        panel.plot(
            means[cost], means["mean"], **drawn, marker=look.marker, linewidth=1.8 if strong else 0.9,
            markersize=5 if strong else 3.5, zorder=4 - strong,
        )  # fmt: skip
        if strong and of_line["seeds"].max() > 1:
            low, high = (means[edge].clip(*limits) for edge in ("low", "high"))  # a logarithm may have no low end
            panel.fill_between(means[cost], low, high, color=look.colour, alpha=BAND, linewidth=0)
            for _, cell in of_line.groupby("identity"):
                panel.plot(cell[cost], cell[SCORE], color=look.colour, linewidth=0.6, alpha=FAINT)
    for (state, _), cell in rows[rows["state"] != "done"].groupby(["state", "identity"]):
        panel.plot(cell[cost], cell[SCORE], **drawn, linewidth=0.9, alpha=style.STATE_ALPHA)
        lines.draw_faded(panel, cell[cost], cell[SCORE], str(state), look.colour)


def _handles(frame: pd.DataFrame, looks: dict[str, style.Look]) -> list[Line2D]:
    """Of the systems' lines."""
    best = frame[frame["line"] == "best"].drop_duplicates("system").set_index("system")[RATE]
    handles = []
    for system, look in looks.items():
        drawn: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker}
        handles.append(Line2D([], [], **drawn, linewidth=1.8, markersize=5, label=system))
        if system in best.index:
            handles.append(Line2D([], [], **drawn, linewidth=0.9, markersize=3.5, label=f"{system}, lr {best[system]}"))
    return handles


# ------------------------------------------------------------------------------------------------------------- main


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure, its data and the speed-ups to `out`, and gives their paths.

    Raises as `collect` does.
    """
    table, cells, _ = read_sweep(sweep, tracking_uri, metrics=speedup.COSTS)
    data = collect(table, cells, paper=paper)
    name = common.output_name("convergence", sweep, DEFAULT_SWEEP)
    shown = pd.concat([data.frame.assign(source="ours"), data.published.assign(source="paper")])
    paths = common.save(draw(data), shown if len(data.published) else data.frame, name, out)
    if len(data.speedups):
        paths += common.write({"csv": lambda path: data.speedups.to_csv(path, index=False)}, f"{name}-speedup", out)
    return paths


def main() -> None:
    flags = common.parse_flags(__doc__, DEFAULT_SWEEP)
    figure(flags.sweep, flags.tracking_uri, flags.out, paper=flags.paper)


if __name__ == "__main__":
    common.run(main)
