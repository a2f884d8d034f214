"""Which axes of a search matter, judged from the record by Optuna. Optuna is imported when it is asked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis import parallel

SCORE = "eval/fid"
LEAST = 8  # finished cells, for an importance to mean anything
TOP = 5  # cells at least whose axis values are set against the others'
NUMBER = "a number"


def importances(frame: pd.DataFrame, axes: Sequence[str]) -> dict[str, float] | None:
    """Each axis' share in what sets the best cells apart (PED-ANOVA as Optuna has it), the largest first.

    An axis that a cell does not have is a conditional one to the study; one of numbers and words is two to it. What
    fewer than `LEAST` cells have is left out; None where that is everything.
    """
    axes = [axis for axis in axes if frame[axis].map(repr).nunique() > 1]
    if len(frame) < LEAST or not axes:
        return None
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # An axis is up to two parameters: its numbers, on an even scale, and its words, one of which says "a number".
    columns: dict[str, list[Any]] = {}
    distributions: dict[str, BaseDistribution] = {}
    for axis in axes:
        known = parallel.sorted_out(frame[axis].tolist())
        numbers = [value for value in known if isinstance(value, float)]
        words = sorted({value for value in known if isinstance(value, str)})
        if len(numbers) >= LEAST:
            even = parallel.spread(numbers)
            columns[f"{axis}/number"] = [even(value) if isinstance(value, float) else None for value in known]
            distributions[f"{axis}/number"] = FloatDistribution(even(min(numbers)), even(max(numbers)))
        if words and sum(value is not None for value in known) >= LEAST:
            columns[f"{axis}/word"] = [NUMBER if isinstance(value, float) else value for value in known]
            distributions[f"{axis}/word"] = CategoricalDistribution([*words, *([NUMBER] if numbers else [])])
    if not columns:
        return None
    study = optuna.create_study()
    for i, score in enumerate(frame[SCORE]):
        params = {name: column[i] for name, column in columns.items() if column[i] is not None}
        kinds = {name: distributions[name] for name in params}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=float(score)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is marked experimental
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=top(len(frame)) / len(frame))
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    shares = {axis: 0.0 for axis in axes if any(name.rpartition("/")[0] == axis for name in columns)}
    for name, share in found.items():
        shares[name.rpartition("/")[0]] += float(share)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def top(count: int) -> int:
    """How many cells are the best ones: a quarter, but at least `TOP`, and at most half."""
    return min(count // 2, max(TOP, count // 4))
