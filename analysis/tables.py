"""What Tables 1 and 2 share: our final scores from the record beside the paper's, as markdown, LaTeX and csv."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import common, markup, paper, style
from analysis.plot_mask_ratio import STATE_WORDS
from sddit.config import METHOD_CONFIGS, SIZE_GRIDS, Eval, Experiment
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results, sweep_names

SCORES = {"fid": "FID ↓", "sfid": "sFID ↓", "is": "IS ↑", "precision": "Prec. ↑", "recall": "Rec. ↑"}
FLOPS = "cost/flops"
MAX_ROWS = 30  # of ours
OURS, PUBLISHED = "ours", "paper"
COLUMNS = [
    "source", "model", "method", "size", "kind", "settings", "steps", "batch", "images", "epochs", "flops",
    "relative_cost", "protocol", "sampler", "seeds",
]  # fmt: skip
COUNTS = ("steps", "batch", "images", "seeds")
REALS = ("epochs", "flops", "relative_cost")
METHOD_FIELDS = ("method.name", "diffusion.kind", "model.size")  # what makes a row; other fields set rows apart
SAMPLER_FIELDS = ("eval.sampler", "eval.sampler_steps", "train.ema")

Row = dict[str, Any]  # of the csv file


@dataclass(frozen=True)
class Table:
    """A table of the paper, and the sweep that answers it."""

    name: str  # of the files
    title: str
    sweep: str
    published: tuple[paper.Published, ...]
    scores: tuple[str, ...]  # keys of SCORES
    remarks: tuple[str, ...] = ()  # on the published values


@dataclass(frozen=True)
class TableData:
    """What is shown. `frame` has one row per line of the table, and is the csv file.

    Its columns: source ('ours' or 'paper'), model, method, size, kind, settings (what sets the row apart from others
    of its model), steps, batch, images, epochs, flops, relative_cost (training FLOPs of one image, those of DiT of the
    same size being 1), protocol, sampler, seeds; each score's mean with SCORE_low and SCORE_high (95 % t-interval) and
    SCORE_seeds; not_comparable and notes (texts; empty where there is nothing to say).
    """

    table: Table
    frame: pd.DataFrame
    remarks: list[str]
    lead: str = ""  # what must be read first


# ---------------------------------------------------------------------------------------------------------- collect


def read(table: Table, sweep: str, tracking_uri: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Results and cells of the sweep; None where it is the table's own and was never run.

    Raises:
        UsageError: no sweep has this name, and it is not the table's own.
        TrackingError: the record cannot be reached, or does not exist.
    """
    if sweep == table.sweep and sweep not in sweep_names(tracking_uri):
        return None
    return load_results(sweep, tracking_uri, metrics=[FLOPS]), load_cells(sweep, tracking_uri)


def collect(
    table: Table, results: pd.DataFrame | None, cells: pd.DataFrame | None, *, with_paper: bool = True
) -> TableData:
    """What is shown: our rows, then the paper's, and how to read them.

    Args:
        table: which one.
        results: as from `sddit.results.load_results`; None where the sweep was never run.
        cells: as from `sddit.results.load_cells`.
        with_paper: published values as well; without them there must be something of ours.

    Raises:
        UsageError: the cells differ in protocol, or in so much that no table can show it.
        SdditError: there is nothing to show.
    """
    rows: list[Row] = []
    remarks: list[str] = []
    if results is None or cells is None:
        nothing = f"Nothing of ours yet: no sweep {table.sweep!r} is recorded. Make it with: {_command(table)}"
    else:
        final = final_scores(results, cells, table.scores)
        nothing = (
            f"Nothing of ours yet: {common.counted(len(cells), 'cell')} recorded, none done with a score. Run the "
            f"sweep again to resume it, e.g. {_command(table)}"
        )
        if len(final):
            nothing = ""
            rows = _our_rows(final, cells, table.scores)
            remarks += _our_remarks(final, cells, rows, table.scores)
    if nothing and not with_paper:
        raise SdditError(nothing)
    if with_paper:
        rows += [_published_row(row, table.scores) for row in table.published]
        remarks += [paper.SOURCE, *table.remarks]
    remarks.append(
        "Steps are not compute-matched. FLOPs: of the whole training, two per multiply-add, a pass with gradient "
        "counted three times. × DiT: FLOPs of one training image, those of DiT of the same size being 1."
    )
    return TableData(table, _frame(rows, table.scores), remarks, lead=nothing)


def _frame(rows: list[Row], scores: tuple[str, ...]) -> pd.DataFrame:
    """The rows in typed columns, so that a count stays whole in the csv file where others lack it."""
    of_scores = [f"{score}{part}" for score in scores for part in ("", "_low", "_high", "_seeds")]
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *of_scores, "not_comparable", "notes"])
    numbers = [*COUNTS, *REALS, *of_scores]
    return frame.astype({name: "Int64" if name in COUNTS or name.endswith("_seeds") else "float64" for name in numbers})


def final_scores(results: pd.DataFrame, cells: pd.DataFrame, scores: Iterable[str]) -> pd.DataFrame:
    """The last evaluation of each cell that is done, whatever was better before; never of a stopped or failed one.

    Raises:
        UsageError: they were scored under several protocols.
    """
    columns = [f"eval/{score}" for score in scores if f"eval/{score}" in results]
    done = results[(results["state"] == "done") & results["identity"].isin(cells["identity"])]
    if done.empty or not columns:
        return done[:0]
    last = done.loc[done.groupby("identity")["step"].idxmax()]
    reached = last["identity"].map(cells.set_index("identity")["step"])
    last = last[last[columns].notna().any(axis=1) & (last["step"] >= reached)]
    common.check_protocol(last)
    return last


class Final(NamedTuple):
    """The end of a cell."""

    fields: dict[str, Any]
    tags: dict[str, str]
    values: dict[Hashable, Any]  # of its last evaluation: step, metrics

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(self.fields.get(name, "")) for name in METHOD_FIELDS)


def _our_rows(final: pd.DataFrame, cells: pd.DataFrame, scores: tuple[str, ...]) -> list[Row]:
    """One row per (method, kind, size), apart where other fields or the last step differ; means over seeds."""
    facts = {cell["identity"]: cell for cell in cells.to_dict("records")}
    ends = []
    for values in final.to_dict("records"):
        cell = facts[values["identity"]]
        ends.append(Final(_with_defaults(cell["params"]), cell["tags"], values))

    varied: dict[tuple[str, ...], list[str]] = {}
    for key, members in _grouped(ends, lambda end: end.key):
        names = sorted({name for end in members for name in end.fields} - {"seed", *METHOD_FIELDS})
        varied[key] = [name for name in names if len({repr(end.fields.get(name)) for end in members}) > 1]

    def settings(end: Final) -> str:
        return ", ".join(f"{name.rpartition('.')[2]} {end.fields.get(name)}" for name in varied[end.key])

    groups = _grouped(ends, lambda end: (end.key, settings(end), end.values["step"]))
    if len(groups) > MAX_ROWS:
        names = sorted({name for apart in varied.values() for name in apart})
        raise UsageError(
            f"The cells differ in more than method, formulation, size and seed: {', '.join(names)}, which makes "
            f"{len(groups)} rows, and at most {MAX_ROWS} can be shown. "
            "For a sweep of many fields use: python analysis/plot_search.py --sweep NAME"
        )
    rows = [_our_row(members, apart, scores) for (_, apart, _), members in groups]
    return _relative_to_dit(sorted(rows, key=_in_order))


def _grouped(ends: list[Final], key: Callable[[Final], Any]) -> list[tuple[Any, list[Final]]]:
    groups: dict[Any, list[Final]] = {}
    for end in ends:
        groups.setdefault(key(end), []).append(end)
    return list(groups.items())


def _our_row(members: list[Final], settings: str, scores: tuple[str, ...]) -> Row:
    """The row of cells that differ in their seeds alone."""
    fields, tags, values = members[0]
    method, kind, size = members[0].key
    name = style.METHOD_NAMES.get(method, method) + ("v2" if fields.get("method.version") == "v2" else "")
    other_kind = method in METHOD_CONFIGS and kind and kind != _published_kind(method)
    steps, batch, count = values["step"], fields["train.batch_size"], _training_images(fields, tags)
    row = {
        "source": OURS,
        "model": f"{name}-{size}" + (f" ({kind.upper()})" if other_kind else ""),
        "method": method,
        "size": size,
        "kind": kind,
        "settings": settings,
        "steps": steps,
        "batch": batch,
        "images": steps * batch,
        "epochs": steps * batch / count if count else None,
        "flops": values.get(FLOPS),
        "protocol": _protocol(fields),
        "sampler": "{}, {} steps, {}".format(*(fields.get(name, "unknown") for name in SAMPLER_FIELDS)),
        "seeds": len(members),
        "not_comparable": _not_comparable(fields, tags),
        "notes": "",
    }
    for score in scores:
        row |= _score(score, [end.values.get(f"eval/{score}") for end in members])
    return row


def _with_defaults(params: dict[str, Any]) -> dict[str, Any]:
    """All fields of a cell. One that was added to the project after the cell had its default there."""
    method, kind = params.get("method.name"), params.get("diffusion.kind")
    if method not in METHOD_CONFIGS:
        return params
    plain: dict[str, Any] = {"method": {"name": method}} | ({"diffusion": {"kind": kind}} if kind else {})
    return Experiment.parse(plain).digest_fields() | params


def _score(name: str, values: list[float | None]) -> dict[str, float]:
    """Mean and interval of a score under its column names; over infinite values there is no interval."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    mean, low, high = np.nan, np.nan, np.nan
    if known:
        mean, low, high = common.t_interval(known) if np.isfinite(known).all() else (np.inf, np.nan, np.nan)
    return {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_seeds": len(known)}


def _relative_to_dit(rows: list[Row]) -> list[Row]:
    """With relative_cost, against the sweep's own DiT of that size: the record has FLOPs, not the images' shape."""
    per_image = [np.nan if row["flops"] is None else row["flops"] / row["images"] for row in rows]
    base: dict[str, float] = {}
    for row, cost in zip(rows, per_image, strict=True):
        if row["method"] == "dit" and (row["size"] not in base or row["kind"] == _published_kind("dit")):
            base[row["size"]] = cost
    costs = zip(rows, per_image, strict=True)
    return [row | {"relative_cost": cost / base.get(row["size"], np.nan)} for row, cost in costs]


def _published_kind(method: str) -> str:
    return str(METHOD_CONFIGS[method].published_kind)  # type: ignore[attr-defined]


def _published_row(row: paper.Published, scores: tuple[str, ...]) -> Row:
    return {
        "source": PUBLISHED,
        "model": row.model,
        "method": row.method,
        "size": row.size,
        "kind": _published_kind(row.method) if row.method else None,
        "settings": "",
        "steps": row.steps,
        "batch": row.batch,
        "images": row.images,
        "epochs": row.epochs,
        "flops": row.flops,
        "relative_cost": row.relative_cost,
        "protocol": paper.PROTOCOL,
        "not_comparable": row.not_comparable,
        "notes": "\n".join(row.notes),
        **{score: row.scores[score] for score in scores},
    }


def _in_order(row: Row) -> tuple[Any, ...]:
    """Sort key: sizes from small to large, then methods as the style lists them, as in the paper."""

    def rank(name: str, known: Iterable[str]) -> tuple[int, str]:
        order = list(known)
        return (order.index(name) if name in order else len(order)), name

    letter, _, patch = row["size"].partition("/")
    place = (rank(letter, SIZE_GRIDS["paper"]), patch, rank(row["method"], style.METHOD_NAMES))
    return *place, row["model"], row["settings"], row["steps"]


# ---------------------------------------------------------------------------------------------------- comparability


def _protocol(fields: dict[str, Any]) -> str:
    guidance = fields.get("eval.guidance", 1)
    guided = f", guided {guidance:g}" if guidance != 1 else ""
    return f"{fields.get('eval.extractor', 'unknown')}, N={int(fields.get('eval.samples', 0)):,}{guided}"


def _not_comparable(fields: dict[str, Any], tags: dict[str, str]) -> str:
    """Why a score of ours cannot be set beside the paper's; empty when it can."""
    published = Eval()  # its defaults are the paper's protocol
    reasons = []
    if (extractor := fields.get("eval.extractor")) != published.extractor:
        reasons.append(f"other features ({extractor})")
    if (samples := fields.get("eval.samples", 0)) != published.samples:
        reasons.append(f"{int(samples):,} samples instead of {published.samples:,}")
    if (count := _reference_images(tags)) != paper.IMAGES:
        images = f"{count:,} images" if count else "number of images not recorded"
        reasons.append(f"other data ({tags.get('sddit.data', 'unknown')}, {images})")
    if fields.get("model.grid", "paper") != "paper":
        reasons.append(f"sizes of the {fields['model.grid']} grid")
    if fields.get("eval.guidance", 1) != published.guidance:
        reasons.append("guided")
    if (weights := fields.get("eval.weights", published.weights)) != published.weights:
        reasons.append(f"{weights} weights")
    if (labels := fields.get("eval.labels", published.labels)) != published.labels:
        reasons.append(f"{labels} labels")
    return f"Not comparable with the paper's values: {', '.join(reasons)}." if reasons else ""


def _reference_images(tags: dict[str, str]) -> int | None:
    """How many images the scores are against, from the protocol in words (`Protocol.describe`)."""
    found = re.search(r"against ([\d,]+) images", tags.get("sddit.protocol.text", ""))
    return int(found[1].replace(",", "")) if found else None


def _training_images(fields: dict[str, Any], tags: dict[str, str]) -> float | None:
    count = _reference_images(tags)
    return count * (1 - fields.get("data.hold_out", 0)) if count else None


# ------------------------------------------------------------------------------------------------------------ words


def _command(table: Table) -> str:
    return f"python sweeps/{table.sweep}.py"


def _our_remarks(final: pd.DataFrame, cells: pd.DataFrame, rows: list[Row], scores: tuple[str, ...]) -> list[str]:
    """What the rows of ours are, under which protocol, and what is not in them."""
    seeds = sorted({row["seeds"] for row in rows})
    if seeds == [1]:
        spread = "n=1: one seed, so no interval and no evidence of a difference"
    else:
        spread = "mean ± half width of the 95% t-interval over n seeds"
        if seeds[0] == 1:
            spread += "; n=1 has no interval and is no evidence of a difference"
    of = f" of {len(cells)}" if len(cells) > len(final) else ""
    first = f"Ours: the last step of {len(final)}{of} cells, never the best; {spread}. "
    remarks = [first + common.provenance(final, cells[cells["identity"].isin(final["identity"])])]
    remarks.append(
        f"Ours are trained under the formulation of their authors unless another is named. {_samplers(rows)}"
    )
    rest = cells[~cells["identity"].isin(final["identity"])]
    if len(rest):
        words = {**STATE_WORDS, "done": "done but without a score at its last step"}
        counts = ", ".join(f"{n} {words.get(str(state), state)}" for state, n in rest["state"].value_counts().items())
        remarks.append(f"Not shown: {common.counted(len(rest), 'cell')} ({counts}).")
    if len(lengths := sorted({row["steps"] for row in rows})) > 1:
        remarks.append(
            f"Our rows differ in length, from {lengths[0]:,} to {lengths[-1]:,} steps: compare those of equal steps."
        )
    if any(np.isnan(row["relative_cost"]) for row in rows):
        remarks.append("× DiT needs a DiT of the same size in the sweep; where it is missing there is none.")
    if unscored := [score for score in scores if not any(row[f"{score}_seeds"] for row in rows)]:
        remarks.append(f"Not scored in this sweep: {', '.join(unscored)}. The field eval.metrics asks for them.")
    return remarks


def _samplers(rows: list[Row]) -> str:
    """They belong to the method, not to the protocol, so they may differ from row to row."""
    models: dict[str, dict[str, None]] = {}
    for row in rows:
        models.setdefault(row["sampler"], {})[row["model"]] = None
    return (
        "Sampler and weight average: " + "; ".join(f"{what} ({', '.join(who)})" for what, who in models.items()) + "."
    )


# ------------------------------------------------------------------------------------------------------------- make


def as_text(data: TableData) -> markup.Text:
    """The table in words and digits."""
    frame = data.frame
    reasons = list(dict.fromkeys(text for text in frame["not_comparable"] if text))
    notes = list(dict.fromkeys(text for texts in frame["notes"] for text in texts.split("\n") if text))
    marks = {text: "†" * (i + 1) for i, text in enumerate(reasons)}
    marks |= {text: chr(ord("a") + i) for i, text in enumerate(notes)}
    head = [
        "source", "model", "steps", "batch", "images (M)", "epochs", "FLOPs", "× DiT", "protocol", "seeds",
        *(SCORES[score] for score in data.table.scores), "notes",
    ]  # fmt: skip
    rows = []
    for values in frame.to_dict("records"):
        row = {str(name): value for name, value in values.items()}
        dagger = marks.get(row["not_comparable"], "")
        rows.append(
            [
                row["source"],
                ", ".join(filter(None, (row["model"], row["settings"]))),
                _number(row["steps"], ",.0f"),
                _number(row["batch"], ".0f"),
                _number(row["images"], ".4g", 1e-6),
                _number(row["epochs"], ".4g"),
                _number(row["flops"], ".2e").replace("e+", "e"),
                _number(row["relative_cost"], ".2f"),
                row["protocol"],
                markup.NONE if _missing(row["seeds"]) else f"n={row['seeds']:.0f}",
                *(_scored(row, score, dagger) for score in data.table.scores),
                " ".join(marks[text] for text in row["notes"].split("\n") if text),
            ]
        )
    listed = [f"{mark}: {text}" for text, mark in marks.items()]
    return markup.Text(data.table.title, data.lead, head, rows, [*listed, *data.remarks])


def _number(value: Any, form: str, factor: float = 1) -> str:
    """Formatted, or a dash where there is none."""
    return markup.NONE if _missing(value) else f"{value * factor:{form}}"


def _missing(value: Any) -> bool:
    return bool(pd.isna(value))


def _scored(row: Row, score: str, dagger: str) -> str:
    """'8.10 ± 0.25†', and over how many seeds where these are fewer than the row's."""
    if _missing(row[score]):
        return markup.NONE
    half = row[f"{score}_high"] - row[score]
    spread = f" ± {half:.2f}" if np.isfinite(half) else ""
    seeds = row[f"{score}_seeds"]
    fewer = f" (n={seeds:.0f})" if row["source"] == OURS and seeds != row["seeds"] else ""
    return f"{row[score]:.2f}{spread}{fewer}{dagger}"


def make(
    table: Table, sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, with_paper: bool = True
) -> list[Path]:
    """Prints the table, writes it to `out` as .md, .tex and .csv and gives the paths.

    Raises as `read` and `collect` do.
    """
    results, cells = read(table, sweep, tracking_uri) or (None, None)
    data = collect(table, results, cells, with_paper=with_paper)
    text = as_text(data)
    print(markup.plain(text), end="\n\n")

    def rendered(render: Callable[[markup.Text], str]) -> Callable[[Path], object]:
        return lambda path: path.write_text(render(text), encoding="utf-8")

    writers = {
        "md": rendered(markup.markdown),
        "tex": rendered(markup.latex),
        "csv": lambda path: data.frame.to_csv(path, index=False),
    }
    return common.write(writers, common.output_name(table.name, sweep, table.sweep), out)


def main(table: Table, description: str | None) -> None:
    """The script of a table."""
    flags = common.parse_flags(description, table.sweep, paper=True)
    make(table, flags.sweep, flags.tracking_uri, flags.out, with_paper=flags.paper)
