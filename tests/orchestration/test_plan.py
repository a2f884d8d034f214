"""Cells, twins and bases: what a sweep consists of, and what a command may not change."""

import pandas as pd
import pytest

from sddit import presets
from sddit.errors import UsageError
from sddit.orchestration import plan
from sddit.results import CELL_COLUMNS

BASE = presets.digits()
AXIS = "method.mask_ratio"
EMPTY = pd.DataFrame(columns=CELL_COLUMNS)


def recorded(cell, state, step, **metrics):
    params = {"seed": cell.experiment.seed, **cell.values}
    row = dict.fromkeys(CELL_COLUMNS) | {"identity": cell.identity, "run_id": "r", "state": state, "step": step}
    return row | {"steps": 600, "params": params, "metrics": metrics, "tags": {}}


def test_a_grid_is_the_product_with_the_seeds():
    cells = plan.grid(BASE, {AXIS: [0, 0.5], "method.lambda_d": [0.1, 1]}, seeds=2)
    assert len(cells) == 8 == len({c.identity for c in cells})
    assert [c.experiment.seed for c in cells] == [0] * 4 + [1] * 4
    assert cells[1].label == "mask_ratio=0,lambda_d=1"
    more = plan.grid(BASE, {AXIS: [0, 0.5], "method.lambda_d": [0.1, 1]}, seeds=3)
    assert [c.identity for c in more[:8]] == [c.identity for c in cells], "more seeds only add"


def test_ratios_that_keep_the_same_tokens_are_one_cell():
    with pytest.raises(UsageError, match=r"mask_ratio=0.2 and mask_ratio=0.25 are one cell.*12 of 16 tokens"):
        plan.grid(BASE, {AXIS: [0, 0.2, 0.25]}, seeds=1)
    with pytest.raises(UsageError, match="are one cell"):
        plan.grid(BASE, {AXIS: [0.5, 0.5]}, seeds=1)


def test_bad_axis_values_are_found_at_once():
    with pytest.raises(UsageError, match=r"mask_ratio is 1.5, but must be in \[0, 1\)"):
        plan.grid(BASE, {AXIS: [0, 1.5]}, seeds=1)


def test_states():
    cells = plan.grid(BASE, {AXIS: [0, 0.2, 0.3, 0.5, 0.65]}, seeds=1)
    table = pd.DataFrame(
        [
            recorded(cells[0], "done", 600, **{"eval/fid": 20.0}),
            recorded(cells[1], "running", 200),
            recorded(cells[2], "failed", 0),
            recorded(cells[3], "pruned", 200, **{"eval/fid": 90.0}),
        ]
    )
    planned = plan.plan(cells, table)
    assert [p.state for p in planned] == ["done", "interrupted", "failed", "pruned", "new"]
    assert planned[0].fid == 20.0 and planned[1].step == 200
    longer = plan.grid(BASE.replace({"train.steps": 900}), {AXIS: [0]}, seeds=1)
    assert plan.plan(longer, table)[0].state == "extend"
    shorter = plan.grid(BASE.replace({"train.steps": 400}), {AXIS: [0]}, seeds=1)
    assert plan.plan(shorter, table)[0].state == "done"
    assert [p.state for p in plan.plan(cells, EMPTY)] == ["new"] * 5


def test_a_name_stands_for_one_base():
    fields = plan.base_fields(BASE, [AXIS], "d" * 64)
    assert AXIS not in fields and "seed" not in fields and "train.steps" not in fields
    plan.refuse_other_base("x", fields, dict(fields), {}, [])
    other = plan.base_fields(BASE.replace({"train.lr": 1e-3, AXIS: 0.6}), [AXIS], "d" * 64)
    with pytest.raises(UsageError) as error:
        plan.refuse_other_base("x", fields, other, {}, ["x", "x-2"])
    assert "train.lr: 0.007 → 0.001" in str(error.value) and "--name x-3" in str(error.value)
    assert "mask_ratio" not in str(error.value)


def test_a_field_added_to_the_project_later_does_not_change_a_base():
    fields = plan.base_fields(BASE, [AXIS], "d" * 64)
    before = {k: v for k, v in fields.items() if k != "method.stop_gradient"}
    plan.refuse_other_base("x", before, fields, {"method.stop_gradient": False}, [])
    with pytest.raises(UsageError, match="stop_gradient: True → False"):
        plan.refuse_other_base("x", before, fields, {"method.stop_gradient": True}, [])
