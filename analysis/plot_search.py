"""What a search over many axes found: cell by cell, against cost, which axes matter, and all axes at once.

    python analysis/plot_search.py                       # the sweep search, into figures/
    python analysis/plot_search.py --sweep temperatures  # any sweep, seen as a search

Draws what there is of a sweep that is still running, and says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import common, lines, parallel, style
from analysis.importance import LEAST, SCORE, importances, top
from sddit.config import FRESH_SEED
from sddit.errors import SdditError
from sddit.results import AXIS_TAG, parse_param, read_sweep

DEFAULT_SWEEP = "search"
FLOPS = "cost/flops"
DISCRIMINATIVE = ("method.tau_", "method.teacher_", "method.centr", "method.head_")  # fields of that loss
MANY = 50  # from which on it is more than a hint
DECADE = 10.0
# Dark is low; monotone in grey, and told apart by colour-blind readers. Without the lightest, which white swallows.
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256)))
UNFINISHED, LINE, BEST = "#C4C4C4", "#5A6470", "#C23B00"
RING: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": BEST, "markeredgewidth": 1.4}
PANEL = (4.0, 2.9)  # inches, of four


@dataclass(frozen=True)
class SearchData:
    """What is drawn. `frame` has one row per evaluated cell at its last evaluation, in the order of their start.

    Its columns: number (in that order, of all cells), identity, run_id, method, kind, seed, state, step, counts (done
    at the last step), eval/fid, best_so_far, cost/flops, front (on the Pareto front); then the axes by their names.
    """

    frame: pd.DataFrame
    axes: list[str]  # those that vary
    importance: dict[str, float] | None  # axis → share; None: too few cells
    floor: common.NoiseFloor | None
    score_name: str
    caption: str

    @property
    def csv(self) -> pd.DataFrame:
        """The frame, and below it the importances under their axes."""
        row = pd.DataFrame([{"state": "importance", **self.importance}]) if self.importance else self.frame[:0]
        return pd.concat([self.frame.astype(object), row.astype(object)], ignore_index=True)


# ---------------------------------------------------------------------------------------------------------- collect


def collect(table: pd.DataFrame, cells: pd.DataFrame, axes: Sequence[str] = (), *, paper: bool = False) -> SearchData:
    """What is drawn, from the sweep's results and cells.

    Args:
        table: as from `sddit.results.load_results`.
        cells: as from `sddit.results.load_cells`.
        axes: of the sweep; none: every field that its cells differ in.
        paper: say in the caption that the paper has no such figure.

    Raises:
        UsageError: the cells differ in protocol.
        SdditError: there is nothing to draw yet.
    """
    everything = _ends(table, cells)
    searched = common.without_fresh_seeds(cells)
    frame = everything[everything["seed"] < FRESH_SEED].reset_index(drop=True)
    if frame.empty or not np.isfinite(frame[SCORE]).any():
        raise SdditError(
            f"Nothing to draw yet: {common.counted(len(cells), 'cell')} recorded, none with {SCORE}. "
            "Run the sweep, or run it again to resume: python sweeps/search.py"
        )
    usable = table[table["identity"].isin(everything["identity"])]
    common.check_protocol(usable)
    axes = list(axes) or _fields_that_differ(searched)
    values = pd.DataFrame({axis: _values(searched, axis) for axis in axes}, index=searched["identity"], dtype=object)
    varied = [axis for axis in axes if values[axis].map(repr).nunique() > 1]
    twins = _twins(values, varied)
    varied = [axis for axis in varied if axis not in twins]
    frame = frame.join(values, on="identity")
    importance = importances(frame[frame["counts"]], varied)
    floor, extractor = common.noise_floor(cells), common.the_value(usable, "eval.extractor")
    sentences = [
        _reading(frame, searched, varied, [a for a in axes if a not in [*varied, *twins]], twins),
        _missing(frame, searched),
        _best(frame, varied, cells, everything),
        _importance_words(frame, importance, varied),
        str(floor) if floor else "",
        common.provenance(usable, cells),
        "The paper has no such figure." if paper else "",
    ]
    score_name = f"FID ({extractor})" if extractor else "FID"
    return SearchData(frame, varied, importance, floor, score_name, " ".join(s for s in sentences if s))


def _ends(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of each cell, in the order of their start."""
    scored = table[table[SCORE].notna()] if SCORE in table else table[:0]
    last = scored.loc[scored.groupby("identity")["step"].idxmax()].set_index("identity")
    frame = cells[["identity", "run_id", "seed", "state"]].assign(number=np.arange(1, len(cells) + 1))
    frame = frame[frame["identity"].isin(last.index)].reset_index(drop=True)
    for name, column in {
        "method": "method.name", "kind": "diffusion.kind", "step": "step", SCORE: SCORE, FLOPS: FLOPS
    }.items():  # fmt: skip
        frame[name] = frame["identity"].map(last[column]) if column in last else None
    reached = frame["identity"].map(cells.set_index("identity")["step"])
    done = (frame["state"] == "done") & (frame["step"] >= reached)
    counts = done & (frame["step"] == frame.loc[done, "step"].max()) & np.isfinite(frame[SCORE].astype(float))
    frame["counts"] = counts
    picked = frame[SCORE].where(counts & (frame["seed"] < FRESH_SEED))
    frame["best_so_far"] = picked.cummin().ffill()
    frame["front"] = _front(picked, pd.to_numeric(frame[FLOPS]))
    return frame


def _front(score: pd.Series, flops: pd.Series) -> pd.Series:
    """Which cells none is better than in both."""
    order = pd.DataFrame({"flops": flops, "score": score}).dropna().sort_values(["flops", "score"])
    before = order["score"].cummin().shift(fill_value=np.inf)
    return (order["score"] < before).reindex(score.index, fill_value=False)


def _values(cells: pd.DataFrame, axis: str) -> list[Any]:
    """Each cell's value on an axis: as recorded with the cell, or the field's; None where it has neither, or where
    the field means nothing, since the cell has no discriminative loss."""

    def value(tags: dict[str, str], params: dict[str, Any]) -> Any:
        if (text := tags.get(AXIS_TAG + axis)) is not None:
            return parse_param(axis, text)
        generative = params.get("method.lambda_d") == 0 and not params.get("method.lambda_d_end")
        return None if generative and axis.startswith(DISCRIMINATIVE) else params.get(axis)

    return [value(tags, params) for tags, params in zip(cells["tags"], cells["params"], strict=True)]


def _twins(values: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """Axes whose values are those of an earlier one in every cell."""
    columns = [values[axis].map(repr).tolist() for axis in axes]
    return [axis for i, axis in enumerate(axes) if columns[i] in columns[:i]]


def _fields_that_differ(cells: pd.DataFrame) -> list[str]:
    names = sorted({name for params in cells["params"] for name in params} - {"seed"})
    return [name for name in names if len({repr(params.get(name)) for params in cells["params"]}) > 1]


# ---------------------------------------------------------------------------------------------------------- caption


def _reading(
    frame: pd.DataFrame, searched: pd.DataFrame, varied: Sequence[str], same: Sequence[str], twins: Sequence[str]
) -> str:
    def named(axes: Sequence[str]) -> str:
        return ", ".join(map(common.axis_name, axes))

    done = frame[frame["counts"]]
    at = f" at step {int(done['step'].iloc[0]):,}, their last" if len(done) else ""
    return (
        f"FID over {len(varied)} {'axis' if len(varied) == 1 else 'axes'}: {len(done)} of "
        f"{common.counted(len(searched), 'cell')} done{at}; each is one seed, so there are no intervals. "
        + (f"Not varied so far: {named(same)}. " if same else "")
        + (f"Equal to another axis throughout: {named(twins)}. " if twins else "")
        + "(a) The cells in order of their start, and the lowest FID of those done so far. (b) FID against the FLOPs "
        "of training, with the Pareto front of the cells done. (c) Importance of the axes. (d) One line a cell"
        + (", grey where it is not done." if len(done) < len(frame) else ".")
    )


def _missing(frame: pd.DataFrame, searched: pd.DataFrame) -> str:
    """What is drawn faded, or not at all."""

    def states(of: pd.Series) -> str:
        return ", ".join(f"{n} {lines.STATE_LABELS.get(str(state), state)}" for state, n in of.value_counts().items())

    finite = np.isfinite(frame[SCORE])
    sentences = []
    if len(faded := frame[~frame["counts"] & finite]):
        sentences.append(
            f"Faded, at the FID they had last, and in no line, front, importance or colour: {states(faded['state'])}."
        )
    if infinite := int((~finite).sum()):
        sentences.append(f"{common.counted(infinite, 'infinite score')} not drawn.")
    if len(unscored := searched[~searched["identity"].isin(frame["identity"])]):
        sentences.append(f"Not evaluated: {common.counted(len(unscored), 'cell')} ({states(unscored['state'])}).")
    return " ".join(sentences)


def _best(frame: pd.DataFrame, axes: Sequence[str], cells: pd.DataFrame, everything: pd.DataFrame) -> str:
    """The lowest cell, what it is worth, and what its fresh seeds gave."""
    done = frame[frame["counts"]]
    if done.empty:
        return "No cell is done yet."
    best = done.nsmallest(1, SCORE).iloc[0]
    point = ", ".join(f"{common.axis_name(a)} {_text(best[a])}" for a in axes if not pd.isna(best[a]))
    text = f"Lowest: cell {best['number']} with FID {best[SCORE]:.2f} ({'; '.join([point, best['identity']])})"
    if len(done) == 1:
        return f"{text}, the only one."

    def fields(params: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in params.items() if name != "seed"}

    params = dict(zip(cells["identity"], cells["params"], strict=True))
    same = everything["identity"].map(lambda identity: fields(params[identity]) == fields(params[best["identity"]]))
    fresh = everything[same & everything["counts"] & (everything["seed"] >= FRESH_SEED)]
    text += f", lowest of {len(done)}, picked, so itself a lucky draw"
    if fresh.empty:
        return f"{text} until fresh seeds confirm it."
    mean, low, high = common.t_interval(fresh[SCORE])
    if len(fresh) == 1:
        return f"{text}; its one fresh seed, which did not pick it, gives {mean:.2f}, without interval."
    return (
        f"{text}; its {len(fresh)} fresh seeds, which did not pick it, give {mean:.2f} "
        f"(95% t-interval {low:.2f} to {high:.2f})."
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _importance_words(frame: pd.DataFrame, importance: dict[str, float] | None, axes: Sequence[str]) -> str:
    count = int(frame["counts"].sum())
    if importance is None:
        return f"Importance needs {LEAST} cells that are done, and axes that vary among them: none is drawn."
    absent = [common.axis_name(axis) for axis in axes if axis not in importance]
    return (
        f"Importance: an axis' share in what sets the {top(count)} best cells apart from all {count} that are done "
        "(PED-ANOVA, Optuna); stopped cells are left out"
        + (f"; {', '.join(absent)}: too few cells or values" if absent else "")
        + (f". Over {count} cells it is a hint at most." if count < MANY else ".")
    )


# ------------------------------------------------------------------------------------------------------------- draw


def draw(data: SearchData) -> Figure:
    """The figure: history, Pareto front and importance side by side, and parallel coordinates below."""
    frame = data.frame[np.isfinite(data.frame[SCORE])]
    done = frame[frame["counts"]]
    # Cells are stopped at scores far above those of the others, and would press them flat.
    low, high, _ = style.score_limits((done if len(done) else frame)[SCORE], [], [])
    high = max(high, min(1.25 * high, frame[SCORE].max()))
    above = frame[frame[SCORE] > high]
    caption = data.caption
    if len(above):
        caption += (
            f" At the upper edge of (a) and (b): {common.counted(len(above), 'cell')} with FID up to "
            f"{above[SCORE].max():.3g}."
        )
    with style.context():
        figure, panels = style.panels(4, caption, size=PANEL, margin=0.6, share=False)
        for panel in panels:  # four equal ones, whose place three and a wide one take
            panel.remove()
        grid = figure.add_gridspec(2, 1)
        upper = grid[0].subgridspec(1, 3)
        history, pareto, importance = (figure.add_subplot(upper[0, i]) for i in range(3))
        below = figure.add_subplot(grid[1])
        _draw_history(history, frame, (low, high))
        _draw_pareto(pareto, frame, (low, high))
        history.set_ylabel(data.score_name)
        pareto.set_ylabel(data.score_name)
        floor = lines.draw_floor((history, pareto), data.floor)
        _draw_importance(importance, data)
        _draw_parallel(below, data, frame)
        for letter, panel in zip("abcd", (history, pareto, importance, below), strict=True):
            panel.set_title(f"({letter})", loc="left", pad=28 if panel is below else 6)
        handles = [*_handles(frame), *floor]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _by_look(frame: pd.DataFrame) -> list[tuple[style.Look, pd.DataFrame]]:
    """The cells of each method and formulation, in the order of the style."""
    names = list(style.METHOD_NAMES)
    groups = [
        (style.look(str(method), kind if isinstance(kind, str) else None), method, rows)
        for (method, kind), rows in frame.groupby(["method", "kind"], dropna=False)
    ]
    groups.sort(key=lambda group: (names.index(group[1]) if group[1] in names else len(names), group[0].label))
    return [(look, rows) for look, _, rows in groups]


def _draw_cells(panel: Axes, frame: pd.DataFrame, x: str, limits: tuple[float, float]) -> None:
    """The cells against a column: those that count filled, others faded, the lowest ringed."""
    for look, rows in _by_look(frame):
        counts = rows[rows["counts"]]
        panel.plot(counts[x], counts[SCORE], look.marker, color=look.colour, markersize=4, zorder=3)
        for state, some in rows[~rows["counts"]].groupby("state"):
            lines.draw_faded(panel, some[x], some[SCORE].clip(*limits), str(state), look.colour, zorder=2.5)
    if frame["counts"].any():
        best = frame[frame["counts"]].nsmallest(1, SCORE).iloc[0]
        panel.plot(best[x], best[SCORE], "o", markersize=10, zorder=5, **RING)
    style.score_axis(panel, *limits)
    for line in panel.lines:  # what lies beyond is drawn at the edge, whole
        line.set_clip_on(False)


def _draw_history(panel: Axes, frame: pd.DataFrame, limits: tuple[float, float]) -> None:
    so_far = frame[frame["best_so_far"].notna()]
    panel.plot(so_far["number"], so_far["best_so_far"], drawstyle="steps-post", color=BEST, linewidth=1.5, zorder=4)
    _draw_cells(panel, frame, "number", limits)
    panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    panel.set_xlabel("cell, in order of start")


def _draw_pareto(panel: Axes, frame: pd.DataFrame, limits: tuple[float, float]) -> None:
    frame = frame.assign(**{FLOPS: pd.to_numeric(frame[FLOPS])}).dropna(subset=[FLOPS])
    panel.set_xlabel("training FLOPs")
    if frame.empty:
        _say(panel, "no FLOPs recorded")
        return
    front = frame[frame["front"]].sort_values(FLOPS)
    panel.plot(front[FLOPS], front[SCORE], drawstyle="steps-post", color=BEST, linewidth=1.5, zorder=4)
    _draw_cells(panel, frame, FLOPS, limits)
    if frame[FLOPS].min() > 0 and frame[FLOPS].max() / frame[FLOPS].min() > DECADE:
        panel.set_xscale("log")
    else:
        panel.margins(x=0.08)


def _draw_importance(panel: Axes, data: SearchData) -> None:
    panel.set_xlabel("importance")
    if data.importance is None:
        _say(panel, f"needs {LEAST} finished cells,\n{int(data.frame['counts'].sum())} so far")
        return
    names = [common.axis_name(axis) for axis in data.importance]
    panel.barh(names, list(data.importance.values()), color=LINE, height=0.65)
    panel.set_ylim(max(len(names), 6) - 0.4, -0.6)
    panel.set_xlim(0, 1)
    panel.grid(axis="y", visible=False)


def _draw_parallel(panel: Axes, data: SearchData, frame: pd.DataFrame) -> None:
    """Stopped cells below, then those that are done from high to low FID, so that the lowest lie on top."""
    if len(data.axes) < 2:
        _say(panel, "needs two axes that vary")
        return
    frame = frame.sort_values(["counts", SCORE], ascending=[True, False])
    done = frame.loc[frame["counts"], SCORE]
    low, high = (done.min(), done.max()) if len(done) else (0.0, 1.0)
    if len(done) >= 10:  # a few bad cells would leave one colour to all others
        high = done.quantile(0.9)
    norm = LogNorm(low, high) if low > 0 and high / low > DECADE else Normalize(low, high)
    looks = [
        {"color": COLOURS(norm(score)), "linewidth": 2.4 if score == low else 1.1, "zorder": 3, "alpha": 0.95}
        if counts
        else {"color": UNFINISHED, "linewidth": 0.6, "zorder": 2}
        for counts, score in zip(frame["counts"], frame[SCORE], strict=True)
    ]
    parallel.draw(panel, frame[data.axes], looks)
    if len(done):
        bar = panel.figure.colorbar(
            ScalarMappable(norm, COLOURS), ax=panel, pad=0.01, fraction=0.03, aspect=18,
            extend="max" if done.max() > high else "neither",
        )  # fmt: skip
        bar.set_label(data.score_name)
        bar.ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        bar.ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _say(panel: Axes, words: str) -> None:
    panel.text(0.5, 0.5, words, ha="center", va="center", transform=panel.transAxes, color=LINE)
    panel.set(xticks=[], yticks=[])


def _handles(frame: pd.DataFrame) -> list[Line2D]:
    looks = [look for look, _ in _by_look(frame)]
    several = len(looks) > 1
    handles = [
        Line2D([], [], linestyle="", marker=look.marker, color=look.colour, markersize=4,
               label=look.label if several else "done")
        for look in looks
    ]  # fmt: skip
    faded = frame.assign(seeds=frame["counts"].where(frame["counts"]))
    handles += lines.state_handles(faded, LINE if several else looks[0].colour)
    if frame["counts"].any():
        handles.append(Line2D([], [], color=BEST, linewidth=1.5, label="best so far; front"))
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=10, label="lowest", **RING))
    return handles


# ------------------------------------------------------------------------------------------------------------- main


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    table, cells, record = read_sweep(sweep, tracking_uri, metrics=(FLOPS,))
    data = collect(table, cells, record.axes, paper=paper)
    return common.save(draw(data), data.csv, common.output_name("search", sweep, DEFAULT_SWEEP), out)


def main() -> None:
    flags = common.parse_flags(__doc__, DEFAULT_SWEEP)
    figure(flags.sweep, flags.tracking_uri, flags.out, paper=flags.paper)


if __name__ == "__main__":
    common.run(main)
