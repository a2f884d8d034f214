"""The final scores of a sweep as rows of a table: what was done, averaged over seeds, what it cost, and why it may not
be set beside the paper's values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import common, paper, style
from sddit.config import METHOD_CONFIGS, SIZE_GRIDS, Eval, Experiment
from sddit.errors import UsageError

FLOPS = "cost/flops"
MAX_ROWS = 30
SOURCE = "ours"
METHOD_FIELDS = ("method.name", "diffusion.kind", "model.size")  # what makes a row; other fields set rows apart
SAMPLER_FIELDS = ("eval.sampler", "eval.sampler_steps", "train.ema")
# What is found once, at the last step (`eval.final`), by its column here.
DIAGNOSTICS = {"probe": "probe/accuracy_sigma_0.5", "copying": "copying/ratio", "sampling_sd": "eval/fid_seeds_std"}
RATE, DEFAULT_RATE = "lr", "x1"  # the axis of learning rates, and its value for the method's own
PICKED = "This learning rate was picked at its last step, on the seeds that are shown, which flatters it."

Row = dict[str, Any]  # of the csv file: see `tables.TableData`; and "identities", of the cells it rests on


class BestRate(NamedTuple):
    """A learning rate that was picked, from so many."""

    rate: str
    among: int


def best_rate(scores: Mapping[str, Mapping[Any, float]]) -> BestRate | None:
    """The rate of the lowest mean score, of those with the default's seeds; None where the default has no score.

    `scores` is rate → seed → final score of one system. Who picks must say so: the same seeds picked and are shown.
    """
    default = scores.get(DEFAULT_RATE)
    if not default:
        return None
    fair = {rate: list(by_seed.values()) for rate, by_seed in scores.items() if by_seed.keys() == default.keys()}
    return BestRate(min(fair, key=lambda rate: (np.mean(fair[rate]), rate != DEFAULT_RATE)), len(fair))


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


def our_rows(final: pd.DataFrame, cells: pd.DataFrame, scores: tuple[str, ...]) -> list[Row]:
    """One row per (method, kind, size), apart where other fields or the last step differ; means over seeds.

    `scores` are metrics under `eval/`, or names of `DIAGNOSTICS`. Of the axis `lr` the default is shown, and beside it
    the rate that is best by the first score, where it is another.
    """
    facts = {cell["identity"]: cell for cell in cells.to_dict("records")}
    ends = []
    for values in final.to_dict("records"):
        cell = facts[values["identity"]]
        ends.append(Final(_with_defaults(cell["params"]), cell["tags"], values))

    varied = {key: _set_apart(members) for key, members in _grouped(ends, lambda end: end.key)}

    def settings(end: Final) -> str:
        return ", ".join(
            f"{name.rpartition('.')[2]} {end.fields.get(name)}" for name in varied[end.key] if name != RATE
        )

    rows: list[Row] = []
    for (_, apart, _), members in _grouped(ends, lambda end: (end.key, settings(end), end.values["step"])):
        rows += _rows_of_rates(members, apart, scores)
    if len(rows) > MAX_ROWS:
        names = sorted({name for apart in varied.values() for name in apart})
        raise UsageError(
            f"The cells differ in more than method, formulation, size and seed: {', '.join(names)}, which makes "
            f"{len(rows)} rows, and at most {MAX_ROWS} can be shown. "
            "For a sweep of many fields use: python analysis/plot_search.py --sweep NAME"
        )
    return _relative_to_dit(sorted(rows, key=_in_order))


def _set_apart(members: list[Final]) -> list[str]:
    """Axes and fields in which these cells differ, but for the seed, and for fields that follow from a named axis."""
    names = sorted({name for end in members for name in end.fields} - {"seed", *METHOD_FIELDS})
    varied = [name for name in names if len({repr(end.fields.get(name)) for end in members}) > 1]
    named = [name for name in varied if "." not in name]

    def follows(field: str) -> bool:  # one value for each point of the named axes
        if "." not in field or any(f"axis.{field}" in end.tags for end in members):
            return False
        pairs = {(*(repr(end.fields.get(name)) for name in [*named, field]),) for end in members}
        return len(pairs) == len({pair[:-1] for pair in pairs})

    return [name for name in varied if not follows(name)]


def _rows_of_rates(members: list[Final], settings: str, scores: tuple[str, ...]) -> list[Row]:
    """The row of cells that differ in seed and learning rate: the default's, and the best rate's."""
    rates = dict(_grouped(members, lambda end: end.fields.get(RATE)))
    if list(rates) == [None]:
        return [_our_row(members, settings, scores)]
    if DEFAULT_RATE not in rates:
        return []
    rows = [_our_row(rates[DEFAULT_RATE], settings, scores)]
    score = f"eval/{scores[0]}"
    by_seed = {
        rate: {end.values["seed"]: end.values[score] for end in ends if pd.notna(end.values.get(score))}
        for rate, ends in rates.items()
    }
    best = best_rate(by_seed)
    if best and best.rate != DEFAULT_RATE:
        named = ", ".join([*([settings] if settings else []), f"{RATE} {best.rate}, best of {best.among}"])
        rows.append(_our_row(rates[best.rate], named, scores) | {"notes": PICKED})
    return rows


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
    other_kind = method in METHOD_CONFIGS and kind and kind != published_kind(method)
    steps, batch, count = values["step"], fields["train.batch_size"], _training_images(fields, tags)
    row = {
        "source": SOURCE,
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
        "not_comparable": not_comparable(fields, tags),
        "notes": "",
        "identities": [end.values["identity"] for end in members],
    }
    for score in scores:
        row |= _score(score, [end.values.get(DIAGNOSTICS.get(score, f"eval/{score}")) for end in members])
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
        if row["method"] == "dit" and (row["size"] not in base or row["kind"] == published_kind("dit")):
            base[row["size"]] = cost
    costs = zip(rows, per_image, strict=True)
    return [row | {"relative_cost": cost / base.get(row["size"], np.nan)} for row, cost in costs]


def published_kind(method: str) -> str:
    return str(METHOD_CONFIGS[method].published_kind)  # type: ignore[attr-defined]


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


def not_comparable(fields: dict[str, Any], tags: dict[str, str]) -> str:
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
    """How many images the scores are against."""
    count = tags.get("sddit.reference_images")
    return int(count) if count else None


def _training_images(fields: dict[str, Any], tags: dict[str, str]) -> float | None:
    count = _reference_images(tags)
    return count * (1 - fields.get("data.hold_out", 0)) if count else None
