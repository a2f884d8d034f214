"""Settings of a recorded sweep: all seeds of one configuration, found by axis values or by identity."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sddit.errors import SdditError, UsageError, did_you_mean
from sddit.results import AXIS_TAG, parse_param, read_sweep

MIN_PREFIX = 4  # digits of an identity
LISTED = 20  # settings in a message


@dataclass(frozen=True)
class Setting:
    """All cells of one configuration; `fields` has it by dotted name, without the seed."""

    sweep: str
    label: str  # `axis=value,axis=value`
    fields: dict[str, Any]
    cells: pd.DataFrame  # as from `load_cells`
    results: pd.DataFrame  # as from `load_results`

    @property
    def done(self) -> pd.DataFrame:
        return self.cells[self.cells["state"] == "done"]

    def at(self, metric: str, step: int | None = None) -> pd.DataFrame:
        """The finished cells' rows with this metric, at this step or at all."""
        table = self.results
        if metric not in table:
            return table[:0]
        found = table[(table["state"] == "done") & table[metric].notna()]
        return found if step is None else found[found["step"] == step]

    def scores(self, metric: str, step: int) -> dict[int, float]:
        """Seed → finite score of a finished cell."""
        rows = self.at(metric, step)
        rows = rows[np.isfinite(rows[metric])]
        return {int(seed): float(value) for seed, value in zip(rows["seed"], rows[metric], strict=True)}


class Sweep:
    """The settings of a recorded sweep, found by axis values or by identity."""

    def __init__(self, name: str, tracking_uri: str | None, metric: str) -> None:
        self.name = name
        self.results, self.cells, record = read_sweep(name, tracking_uri, metrics=(metric,))
        self.axes = record.axes
        if self.cells.empty:
            raise SdditError(f"The sweep {name!r} has no cells yet. Run it first.")
        # By the names of axes, some of which are no fields, and of fields.
        self.values = [
            {k.removeprefix(AXIS_TAG): parse_param(k, v) for k, v in tags.items() if k.startswith(AXIS_TAG)}
            | _fields(params)
            for tags, params in zip(self.cells["tags"], self.cells["params"], strict=True)
        ]
        if not self.axes:
            names = {name for values in self.values for name in values}
            self.axes = sorted(n for n in names if len({repr(v.get(n)) for v in self.values}) > 1)
        # What the cells of one setting share.
        self.keys = [json.dumps(_fields(params), sort_keys=True) for params in self.cells["params"]]

    def setting(self, text: str) -> Setting:
        """The setting that `text` names: `axis=value,axis=value`, or an identity's first digits, at least four.

        Raises:
            UsageError: none or several are meant, with the settings there are.
        """
        rows = self._by_values(text) if "=" in text else self._by_identity(text)
        keys = list(dict.fromkeys(self.keys[i] for i in rows))
        if not keys:
            raise UsageError(f"No setting {text!r} in the sweep {self.name!r}. {self._listed(self.keys)}")
        if len(keys) > 1:
            raise UsageError(
                f"{text!r} stands for {len(keys)} settings of the sweep {self.name!r}. {self._listed(keys)}"
            )
        rows = [i for i, key in enumerate(self.keys) if key == keys[0]]
        cells = self.cells.iloc[rows]
        results = self.results[self.results["identity"].isin(cells["identity"])]
        return Setting(self.name, self._label(rows[0]), _fields(cells["params"].iloc[0]), cells, results)

    def _by_values(self, text: str) -> list[int]:
        asked = {}
        for part in re.split(r",(?=[^,=]+=)", text):
            name, _, value = part.partition("=")
            asked[self._name(name.strip())] = value.strip()
        return [
            i
            for i, values in enumerate(self.values)
            if all(_same(value, values.get(name)) for name, value in asked.items())
        ]

    def _by_identity(self, text: str) -> list[int]:
        if len(text) < MIN_PREFIX:
            raise UsageError(
                f"{text!r} is neither axis=value nor at least {MIN_PREFIX} digits of an identity. "
                f"{self._listed(self.keys)}"
            )
        return [i for i, identity in enumerate(self.cells["identity"]) if identity.startswith(text)]

    def _name(self, name: str) -> str:
        """The axis or else the field of that full or short name."""
        fields = sorted({field for values in self.values for field in values})
        for known in (self.axes, fields):
            found = [full for full in known if name in (full, short(full))]
            if len(found) == 1:
                return found[0]
            if found:
                raise UsageError(f"{name!r} can be {' or '.join(found)}: write one of them out.")
        raise UsageError(
            f"The sweep {self.name!r} has no axis or field {name!r}. {did_you_mean(name, map(self._short, self.axes))}"
        )

    def _short(self, axis: str) -> str:
        return axis if [short(other) for other in self.axes].count(short(axis)) > 1 else short(axis)

    def _label(self, row: int) -> str:
        values = self.values[row]
        return ",".join(f"{self._short(a)}={shown(values[a])}" for a in self.axes if a in values) or "(no axes)"

    def _listed(self, keys: Iterable[str]) -> str:
        first = sorted((self._label(i), i) for i in {self.keys.index(key) for key in keys})
        labels = [f"  {label}  ({self.cells['identity'].iloc[i]})" for label, i in first]
        more = [f"  and {len(labels) - LISTED} more"] if len(labels) > LISTED else []
        return "\n".join(
            ["Name one of these, or the identity of one of its cells (e.g. that in brackets):", *labels[:LISTED], *more]
        )


def short(field: str) -> str:
    """
    >>> short("method.mask_ratio"), short("method.name"), short("system")
    ('mask_ratio', 'method', 'system')
    """
    section, _, name = field.rpartition(".")
    return section if name == "name" and section else name


def _fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an experiment but for its seed: those with a dot."""
    return {name: value for name, value in params.items() if "." in name}


def shown(value: Any) -> str:
    """A value as labels and tables have it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _same(asked: str, value: Any) -> bool:
    """Whether a word on the command line means this value, written out or as labels show it."""
    return parse_param("", asked) == value or asked.casefold() == shown(value).casefold()
