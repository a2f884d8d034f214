"""Which cells a sweep has, and what the record says of each: what is done, what goes on, what is new. Knows no ray."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sddit import cost, presets
from sddit.config import FRESH_SEED, METHOD_CONFIGS, Experiment, flatten
from sddit.data import DATASETS, open_manifest
from sddit.data.manifest import Manifest
from sddit.errors import UsageError, did_you_mean
from sddit.metrics.reference import content_digest

if TYPE_CHECKING:  # a second to import, and Ray starts before it is needed
    import pandas as pd

Settings = dict[str, Any]  # dotted field → value
Point = dict[str, Any]  # axis → value; where Optuna draws fields of its own choice, what it drew, by name


@dataclass(frozen=True)
class Times:
    """A setting that is a multiple of what the cell would have otherwise, such as half its method's learning rate."""

    factor: float

    def __call__(self, value: Any) -> Any:
        return type(value)(value * self.factor)


@dataclass(frozen=True)
class Space:
    """The cells that a sweep can have.

    Args:
        preset, method: the base experiment, but for `method.name` among the settings of an axis.
        changes: fields set for every cell whose method has them.
        axes: dotted field → its values, or a word of one's own → named settings; as declared, whichever of them a
            command asks for.
        ties: field → the axis whose value it takes as well.
        suggest: settings of an Optuna trial, define by run; instead of `axes`.
        fields: the fields that `suggest` may set.
    """

    preset: str
    method: str
    changes: Mapping[str, Any]
    axes: Mapping[str, list[Any] | Mapping[str, Settings]]
    ties: Mapping[str, str] = field(default_factory=dict)
    suggest: Callable[[Any], Settings] | None = None
    fields: Collection[str] = ()

    def settings(self, point: Point) -> Settings:
        """The fields that a point sets.

        Raises:
            UsageError: it names a setting that the axis does not have.
        """
        if self.suggest:
            import optuna

            if set(point) <= set(self.fields):  # a cell of a grid, or of an earlier range
                return dict(point)
            return self.suggest(optuna.trial.FixedTrial(point))
        settings: Settings = {}
        for axis, value in point.items():
            named = self.axes.get(axis)
            if not isinstance(named, Mapping):
                settings[axis] = value
            elif value in named:
                settings |= named[value]
            else:
                raise UsageError(f"{axis} has no setting {value!r}. {did_you_mean(str(value), named)}")
        return settings | {name: point[axis] for name, axis in self.ties.items()}

    def cell(self, point: Point, seed: int) -> Cell:
        """The experiment of a point and a seed.

        Raises:
            UsageError: a value is not allowed, or the data are not there.
        """
        settings = self.settings(point)
        experiment = _with_absolute_paths(self.experiment(settings | {"seed": seed}))
        fields = flatten(experiment.model_dump())
        values = {k: fields.get(k, v) for k, v in (settings if self.suggest else point).items()}
        manifest = open_manifest(experiment.data.path)
        identity = experiment.identity(content_digest(experiment, manifest))
        return Cell(values, point if self.suggest else values, experiment, identity, manifest)

    def experiment(self, settings: Mapping[str, Any]) -> Experiment:
        """The base under `settings`. Raises UsageError where a value is not allowed."""
        settings = dict(settings)
        plain = presets.preset(self.preset)(method=settings.pop("method.name", self.method))
        known = flatten(plain.model_dump())
        # What only other methods of the sweep have says nothing about this one.
        changes = {k: v for k, v in self.changes.items() if k in known or k not in self._fields_of_methods}
        for name, value in settings.items():
            if isinstance(value, Times) and name in known:
                settings[name] = value(changes.get(name, known[name]))
        return plain.replace({**changes, **settings})

    def base(self) -> Experiment:
        """The first of the named settings of each axis: what all cells share beside their methods."""
        firsts = [next(iter(axis.values())) for axis in self.axes.values() if isinstance(axis, Mapping)]
        return self.experiment({name: value for settings in firsts for name, value in settings.items()})

    @cached_property
    def methods(self) -> list[str]:
        """Those of the declared cells."""
        named = [s for axis in self.axes.values() if isinstance(axis, Mapping) for s in axis.values()]
        return list(dict.fromkeys(settings.get("method.name", self.method) for settings in named)) or [self.method]

    @cached_property
    def _fields_of_methods(self) -> set[str]:
        return {f"method.{name}" for method in self.methods for name in METHOD_CONFIGS[method].model_fields}


def _with_absolute_paths(experiment: Experiment) -> Experiment:
    """For workers, which run in folders of their own. What is no path here (a name, a URI) stays as it is."""
    fields = flatten(experiment.model_dump())
    found = {
        name: str(Path(fields[name]).expanduser().absolute())
        for name in ("data.path", "data.test_path", "data.vae", "eval.reference")
        if fields[name] and fields[name] not in DATASETS and Path(fields[name]).expanduser().exists()
    }
    return experiment.replace(found)


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep."""

    values: dict[str, Any]  # axis → value, for people
    point: Point  # what the study and the record call it
    experiment: Experiment
    identity: str
    manifest: Manifest = field(repr=False)

    @property
    def label(self) -> str:
        """Axis values in short, e.g. 'mask_ratio=0.2'."""
        return label_of(self.values)

    @property
    def run_label(self) -> str:
        """The values alone, for MLflow's run names, which its UI cuts after some 20 characters."""
        return "-".join(_short(value) for value in self.values.values())

    @property
    def tags(self) -> dict[str, str]:
        """Its point and what else a figure cannot know, as tags of its run."""
        from sddit.results import AXIS_TAG

        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.point.items()}
        flops = cost.sampling_flops_per_image(self.experiment, self.manifest.shape)
        return {f"{AXIS_TAG}{k}": v for k, v in text.items()} | {"sddit.sampling_flops": f"{flops:.6g}"}


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
    """What the record knows of a cell that has been run: its point, and FID at each evaluated step."""

    point: Point
    state: str  # done, pruned, running, failed
    fid: dict[int, float]
    flops: float = 0.0  # of its whole training
    identity: str = ""


def grid(space: Space, axes: Mapping[str, Iterable[Any]], seeds: Iterable[int]) -> tuple[list[Cell], dict[str, str]]:
    """All values of `axes` times seeds, seeds outermost, so that a first picture of every value comes early; and, by
    their labels, the combinations that cannot be, with the reason.

    Raises:
        UsageError: a value of an axis is possible with no value of the others, or two plain values are one cell.
    """
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    excluded: dict[str, str] = {}
    errors: dict[int, UsageError] = {}
    seen: dict[str, Cell] = {}
    kept = []
    for i, point in enumerate(points):
        try:
            cell = space.cell(point, seed=0)
        except UsageError as error:
            errors[i] = error
            excluded[label_of(point)] = str(error).splitlines()[0]
            continue
        if (twin := seen.setdefault(twin_key(cell), cell)) is not cell:
            differ = [axis for axis in axes if twin.point[axis] != cell.point[axis]]
            if not any(isinstance(space.axes[axis], Mapping) for axis in differ):
                raise UsageError(
                    f"{twin.label} and {cell.label} are one cell{_why(twin, cell)}. Leave one of them out."
                )
            excluded[cell.label] = f"the same as {twin.label}{_why(twin, cell)}"
            continue
        kept.append(point)
    for axis, values in axes.items():
        for value in values:
            with_value = [i for i, point in enumerate(points) if point[axis] is value]
            if all(i in errors for i in with_value):
                raise errors[with_value[0]]
    return [space.cell(point, seed) for seed in seeds for point in kept], excluded


def _why(one: Cell, other: Cell) -> str:
    if one.identity == other.identity:
        return ""
    shape = other.manifest.shape
    kept, of = cost.visible_tokens(other.experiment, shape), cost.num_tokens(other.experiment, shape)
    return f", since both keep {kept} of {of} tokens"


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


def base_fields(space: Space, data_digest: str) -> dict[str, Any]:
    """What a sweep's name stands for: all fields of the digest but those of plain axes and the seed.

    Of a sweep over several methods those of each, by 'method: field', where they are not the field's default: the tag
    that keeps them holds 8000 characters.
    """
    free = {"seed", *space.ties, *space.fields, *(k for k, v in space.axes.items() if not isinstance(v, Mapping))}
    base: dict[str, Any] = {"data.digest": data_digest}
    for method in space.methods:
        try:
            experiment = space.experiment({"method.name": method})
        except UsageError as error:  # its cells are excluded
            base[f"{method}: impossible"] = str(error).splitlines()[0][:150]
            continue
        fields = {k: v for k, v in experiment.digest_fields().items() if k not in free}
        if len(space.methods) > 1:
            plain = default_fields(space)
            fields = {k: v for name, v in fields.items() if plain.get(k := f"{method}: {name}") != v}
        base |= fields
    return base


def default_fields(space: Space) -> dict[str, Any]:
    """What a field of a base is where it is not recorded."""
    fields = {m: Experiment(method=METHOD_CONFIGS[m]()).digest_fields() for m in space.methods}  # type: ignore[arg-type]
    if len(space.methods) == 1:
        return fields[space.methods[0]]
    return {f"{method}: {name}": v for method, known in fields.items() for name, v in known.items()}


def refuse_other_base(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], taken: Iterable[str]
) -> None:
    """Refuses a command that would give an existing sweep another base. `defaults` are those of fields that one of
    the two does not have: the project did not have them when the sweep began, or they are as usual.

    Raises:
        UsageError: with the fields that differ and a free name.
    """
    keys = {*now, *(k for k in before if k in defaults)}
    pairs = {k: tuple(fields.get(k, defaults.get(k)) for fields in (before, now)) for k in keys}
    changed = {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
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


def point_of(row: Mapping[Any, Any], axes: Iterable[str]) -> Point:
    """A recorded cell's point (a row of `sddit.results.load_cells`); from its params where it has no such tags."""
    from sddit.results import AXIS_TAG, parse_param

    tags = {k.removeprefix(AXIS_TAG): v for k, v in row["tags"].items() if k.startswith(AXIS_TAG)}
    if tags:
        return {k: parse_param(k, v) for k, v in tags.items()}
    return {axis: row["params"][axis] for axis in axes if axis in row["params"]}


def outcomes(recorded: pd.DataFrame, results: pd.DataFrame, axes: Iterable[str]) -> list[Outcome]:
    """What the study and the stopping rule learn from: the recorded cells with FID at each evaluated step."""
    axes = list(axes)
    known = []
    for row in recorded.to_dict("records"):
        points = results[results["identity"] == row["identity"]]
        fid = {int(s): float(v) for s, v in zip(points["step"], points["eval/fid"], strict=True) if v == v}
        flops = row["metrics"].get("cost/flops", 0.0)
        known.append(Outcome(point_of(row, axes), row["state"], fid, flops, row["identity"]))
    return known


def device_hours(row: Mapping[Any, Any]) -> float:
    """What a recorded cell (a row of `sddit.results.load_cells`) has used, up to its last evaluation or soft stop."""
    return max(row["metrics"].get("cost/device_hours", 0.0), float(row["tags"].get("sddit.device_hours", 0)))


def best_point(planned: Iterable[Planned], missing: int) -> Point:
    """The point with the lowest mean FID at the last step over its seeds, when no cell is `missing` any more.

    Raises:
        UsageError: the sweep is not finished, so that nothing can be picked yet.
    """
    if missing:
        raise UsageError(
            f"--confirm picks the best of a finished sweep, but {missing} cells are missing. Run it without first."
        )
    scores: dict[str, list[float]] = {}
    points: dict[str, Point] = {}
    for p in planned:
        if p.state == "done" and p.fid is not None and p.cell.experiment.seed < FRESH_SEED:
            scores.setdefault(p.cell.label, []).append(p.fid)
            points[p.cell.label] = p.cell.point
    if not scores:
        raise UsageError("--confirm picks the best of a finished sweep, but no cell is done. Run it without first.")
    return points[min(scores, key=lambda label: sum(scores[label]) / len(scores[label]))]


def label_of(values: Mapping[str, Any]) -> str:
    """Axis values in short, e.g. 'mask_ratio=0.2,size=S/2'."""
    return ",".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
