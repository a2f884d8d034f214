"""Which cells a sweep has, and what the record says of each: what is done, what goes on, what is new. Knows no ray."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sddit import cost
from sddit.config import Experiment, flatten
from sddit.data import content_digest, open_manifest
from sddit.data.manifest import Manifest
from sddit.errors import UsageError


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep."""

    values: dict[str, Any]  # axis → value
    experiment: Experiment
    identity: str
    manifest: Manifest = field(repr=False)

    @property
    def label(self) -> str:
        """Axis values in short, e.g. 'mask_ratio=0.2'."""
        return ",".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in self.values.items())

    @property
    def run_label(self) -> str:
        """The values alone, for MLflow's run names, which its UI cuts after some 20 characters."""
        return "-".join(_short(value) for value in self.values.values())


@dataclass
class Planned:
    """A cell with what is known of it. `state`: new, interrupted, extend, done, pruned, failed."""

    cell: Cell
    state: str = "new"
    step: int = 0
    run_id: str | None = None
    fid: float | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What the record knows of a cell that has been run: its axis values, and FID at each evaluated step."""

    values: dict[str, Any]
    state: str  # 'done' or 'pruned'
    fid: dict[int, float]


def make_cell(base: Experiment, values: Mapping[str, Any], seed: int) -> Cell:
    """The experiment of these axis values and seed.

    Raises:
        UsageError: a value is not allowed, or the data are not there.
    """
    experiment = base.replace({**values, "seed": seed})
    manifest = open_manifest(experiment.data.path)
    fields = flatten(experiment.model_dump())
    identity = experiment.identity(content_digest(manifest, experiment.data.test_path))
    return Cell({k: fields[k] for k in values}, experiment, identity, manifest)


def grid(base: Experiment, axes: Mapping[str, list[Any]], seeds: int) -> list[Cell]:
    """All axis values times seeds 0 … seeds - 1, seeds outermost, so that a first picture of every value comes early.

    Raises:
        UsageError: two cells would be the same.
    """
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    cells = [make_cell(base, values, seed) for seed in range(seeds) for values in points]
    refuse_twins(cells)
    return cells


def refuse_twins(cells: Iterable[Cell]) -> None:
    """Refuses two cells that compute the same, such as mask ratios that keep the same number of tokens."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        key = twin_key(cell)
        if key in seen and seen[key].experiment.seed == cell.experiment.seed:
            other = seen[key]
            why = ""
            if other.identity != cell.identity:
                shape = cell.manifest.shape
                kept, of = cost.visible_tokens(cell.experiment, shape), cost.num_tokens(cell.experiment, shape)
                why = f", since both keep {kept} of {of} tokens"
            raise UsageError(f"{other.label} and {cell.label} are one cell{why}. Leave one of them out.")
        seen[key] = cell


def twin_key(cell: Cell) -> str:
    """What a cell computes: its fields, with the mask ratio replaced by the number of tokens that it keeps."""
    fields = cell.experiment.digest_fields() | {"data.digest": cell.manifest.digest}
    if "method.mask_ratio" in fields:
        fields["method.mask_ratio"] = cost.visible_tokens(cell.experiment, cell.manifest.shape)
    return json.dumps(fields, sort_keys=True)


def plan(cells: Iterable[Cell], recorded: pd.DataFrame) -> list[Planned]:
    """Each cell with its state in the record (`sddit.results.load_cells`)."""
    by_identity = {row["identity"]: row for row in recorded.to_dict("records")}
    planned = []
    for cell in cells:
        row = by_identity.get(cell.identity)
        if row is None:
            planned.append(Planned(cell))
            continue
        state = {"running": "interrupted"}.get(row["state"], row["state"])
        if state == "done" and row["step"] < cell.experiment.train.steps:
            state = "extend"
        planned.append(Planned(cell, state, row["step"], row["run_id"], row["metrics"].get("eval/fid"), row["tags"]))
    return planned


def base_fields(base: Experiment, axes: Iterable[str], data_digest: str) -> dict[str, Any]:
    """What a sweep's name stands for: all fields of the digest but axes and seed."""
    fields = base.digest_fields() | {"data.digest": data_digest}
    return {k: v for k, v in fields.items() if k not in {*axes, "seed"}}


def refuse_other_base(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], taken: Iterable[str]
) -> None:
    """Refuses a command that would give an existing sweep another base. `defaults` are those of fields that the
    project did not have when the sweep began.

    Raises:
        UsageError: with the fields that differ and a free name.
    """
    old = {k: before.get(k, defaults.get(k)) for k in now}
    changed = {k: (old[k], v) for k, v in now.items() if old[k] != v}
    if changed:
        lines = [f"  {k}: {_short(was)} → {_short(new)}" for k, (was, new) in sorted(changed.items())]
        taken = set(taken)
        free = next(f"{name}-{i}" for i in itertools.count(2) if f"{name}-{i}" not in taken)
        raise UsageError(
            "\n".join(
                [f"Sweep {name!r} exists with another base; a name stands for one base. It would change:", *lines]
                + [f"Run it under a free name, e.g. --name {free}"]
            )
        )


def outcomes(recorded: pd.DataFrame, results: pd.DataFrame, axes: Iterable[str]) -> list[Outcome]:
    """Finished and stopped cells for the study, with FID at each evaluated step."""
    axes = list(axes)
    known = []
    for row in recorded[recorded["state"].isin(["done", "pruned"])].to_dict("records"):
        points = results[results["identity"] == row["identity"]]
        fid = {int(s): float(v) for s, v in zip(points["step"], points["eval/fid"], strict=True) if v == v}
        known.append(Outcome({a: row["params"][a] for a in axes}, row["state"], fid))
    return known


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
