"""What Tables 1 and 2 share: our final scores from the record beside the paper's, as markdown, LaTeX and csv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import common, finals, markup, paper
from sddit.config import FRESH_SEED
from sddit.errors import SdditError
from sddit.results import STATE_WORDS, read_sweep, sweep_names

SCORES = {"fid": "FID ↓", "sfid": "sFID ↓", "is": "IS ↑", "precision": "Prec. ↑", "recall": "Rec. ↑"}
DIAGNOSTICS = {"probe": "probe ↑", "copying": "copying", "sampling_sd": "FID sd"}  # by name in `finals`
COLUMNS = [
    "source", "model", "method", "size", "kind", "settings", "steps", "batch", "images", "epochs", "flops",
    "relative_cost", "protocol", "sampler", "seeds",
]  # fmt: skip
MEANINGS = {
    "probe": (
        "Probe: accuracy on held-out images of a linear classifier on the encoder's features, seen with noise of "
        "standard deviation 0.5."
    ),
    "copying": (
        "Copying: median distance of samples to their nearest training image over that of held-out images; far below 1 "
        "where samples are copies."
    ),
    "sampling_sd": "FID sd: sampling noise, the standard deviation of one checkpoint's FID over evaluation seeds.",
}
COUNTS = ("steps", "batch", "images", "seeds")
REALS = ("epochs", "flops", "relative_cost")


@dataclass(frozen=True)
class Table:
    """A table of the paper, and the sweep that answers it."""

    name: str  # of the files
    title: str
    sweep: str
    published: tuple[paper.Published, ...]
    scores: tuple[str, ...]  # keys of SCORES
    diagnostics: tuple[str, ...] = ()  # keys of DIAGNOSTICS, shown where they are recorded
    remarks: tuple[str, ...] = ()  # on the published values

    @property
    def measured(self) -> tuple[str, ...]:
        return (*self.scores, *self.diagnostics)


@dataclass(frozen=True)
class TableData:
    """What is shown. `frame` has one row per line of the table, and is the csv file.

    Its columns: source ('ours' or 'paper'), model, method, size, kind, settings (what sets the row apart from others
    of its model), steps, batch, images, epochs, flops, relative_cost (training FLOPs of one image, those of DiT of the
    same size being 1), protocol, sampler, seeds; each score's mean with SCORE_low and SCORE_high (95 % t-interval) and
    SCORE_seeds, so for diagnostics; not_comparable and notes (texts; empty where there is nothing to say).
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
    metrics = [finals.FLOPS, *(finals.DIAGNOSTICS[name] for name in table.diagnostics)]
    return read_sweep(sweep, tracking_uri, metrics=metrics)[:2]


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
    rows: list[finals.Row] = []
    remarks: list[str] = []
    if results is None or cells is None:
        nothing = f"Nothing of ours yet: no sweep {table.sweep!r} is recorded. Make it with: {_command(table)}"
    else:
        final = finals.final_scores(common.without_fresh_seeds(results), cells, table.scores)
        nothing = (
            f"Nothing of ours yet: {common.counted(len(cells), 'cell')} recorded, none done with a score"
            f"{' at the default learning rate' if len(final) else ''}. Run the sweep again to resume it, e.g. "
            f"{_command(table)}"
        )
        rows = finals.our_rows(final, cells, table.measured)
        if rows:
            nothing = ""
            shown = final["identity"].isin({identity for row in rows for identity in row["identities"]})
            remarks += _our_remarks(final[shown], final[~shown], cells, rows, table)
    if nothing and not with_paper:
        raise SdditError(nothing)
    if with_paper:
        rows += [_published_row(row, table.scores) for row in table.published]
        remarks += [paper.SOURCE, *table.remarks]
    remarks.append(
        "Steps are not compute-matched. FLOPs: of the whole training, two per multiply-add, a pass with gradient "
        "counted three times. × DiT: FLOPs of one training image, those of DiT of the same size being 1."
    )
    return TableData(table, _frame(rows, table.measured), remarks, lead=nothing)


def _frame(rows: list[finals.Row], scores: tuple[str, ...]) -> pd.DataFrame:
    """The rows in typed columns, so that a count stays whole in the csv file where others lack it."""
    of_scores = [f"{score}{part}" for score in scores for part in ("", "_low", "_high", "_seeds")]
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *of_scores, "not_comparable", "notes"])
    numbers = [*COUNTS, *REALS, *of_scores]
    return frame.astype({name: "Int64" if name in COUNTS or name.endswith("_seeds") else "float64" for name in numbers})


def _published_row(row: paper.Published, scores: tuple[str, ...]) -> finals.Row:
    return {
        "source": "paper",
        "model": row.model,
        "method": row.method,
        "size": row.size,
        "kind": finals.published_kind(row.method) if row.method else None,
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


# ------------------------------------------------------------------------------------------------------------ words


def _command(table: Table) -> str:
    return f"python sweeps/{table.sweep}.py"


def _our_remarks(
    final: pd.DataFrame, other_rates: pd.DataFrame, cells: pd.DataFrame, rows: list[finals.Row], table: Table
) -> list[str]:
    """What the rows of ours are, under which protocol, and what is not in them.

    `final`: the last evaluations that are shown; `other_rates`: those at learning rates that are not.
    """
    fresh = len(cells) - len(cells := common.without_fresh_seeds(cells))
    seeds = sorted({row["seeds"] for row in rows})
    if seeds == [1]:
        spread = "n=1: one seed, so no interval and no evidence of a difference"
    else:
        spread = "mean ± half width of the 95% t-interval over n seeds"
        if seeds[0] == 1:
            spread += "; n=1 has no interval and is no evidence of a difference"
    of = f" of {len(cells)}" if len(cells) > len(final) else ""
    first = f"Ours: the last step of {len(final)}{of} cells, never the best; {spread}. "
    shown = cells[cells["identity"].isin(final["identity"])]
    remarks = [first + common.provenance(final, shown)]
    remarks.append(
        f"Ours are trained under the formulation of their authors unless another is named. {_samplers(rows)}"
    )
    if floor := common.noise_floor(shown):
        remarks.append(str(floor))
    rest = cells[~cells["identity"].isin({*final["identity"], *other_rates["identity"]})]
    if len(other_rates):
        remarks.append(
            f"Not shown: {common.counted(len(other_rates), 'cell')} at learning rates that are neither a system's "
            "default nor its best."
        )
    if fresh:
        remarks.append(f"Not shown: {common.counted(fresh, 'cell')} of fresh seeds ({FRESH_SEED} and on).")
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
    if unscored := [score for score in table.scores if not any(row[f"{score}_seeds"] for row in rows)]:
        remarks.append(f"Not scored in this sweep: {', '.join(unscored)}. The field eval.metrics asks for them.")
    return remarks + [
        text
        for name, text in MEANINGS.items()
        if name in table.diagnostics and any(row[f"{name}_seeds"] for row in rows)
    ]


def _samplers(rows: list[finals.Row]) -> str:
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
    frame, scores = data.frame, data.table.scores
    diagnostics = [name for name in data.table.diagnostics if frame[name].notna().any()]
    reasons = list(dict.fromkeys(text for text in frame["not_comparable"] if text))
    notes = list(dict.fromkeys(text for texts in frame["notes"] for text in texts.split("\n") if text))
    marks = {text: "†" * (i + 1) for i, text in enumerate(reasons)}
    marks |= {text: chr(ord("a") + i) for i, text in enumerate(notes)}
    head = [
        "source", "model", "steps", "batch", "images (M)", "epochs", "FLOPs", "× DiT", "protocol", "seeds",
        *(SCORES[name] for name in scores), *(DIAGNOSTICS[name] for name in diagnostics), "notes",
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
                *(_scored(row, name, dagger) for name in scores),
                *(_scored(row, name, "") for name in diagnostics),
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


def _scored(row: finals.Row, score: str, dagger: str) -> str:
    """'8.10 ± 0.25†', and over how many seeds where these are fewer than the row's."""
    if _missing(row[score]):
        return markup.NONE
    form = ".3f" if score == "probe" else ".2f"
    half = row[f"{score}_high"] - row[score]
    spread = f" ± {half:{form}}" if np.isfinite(half) else ""
    seeds = row[f"{score}_seeds"]
    fewer = f" (n={seeds:.0f})" if row["source"] == finals.SOURCE and seeds != row["seeds"] else ""
    return f"{row[score]:{form}}{spread}{fewer}{dagger}"


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
