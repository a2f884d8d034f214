"""Cells, twins and bases: what a sweep consists of, and what a command may not change."""

import json
import shutil

import pandas as pd
import pytest

from sddit import presets
from sddit.config import FRESH_SEED
from sddit.data import open_manifest
from sddit.errors import UsageError
from sddit.orchestration import plan
from sddit.orchestration.plan import Space, Times
from sddit.results import CELL_COLUMNS

AXIS = "method.mask_ratio"
EMPTY = pd.DataFrame(columns=CELL_COLUMNS)
SYSTEMS = {
    "DiT": {"method.name": "dit"},
    "DiT (EDM)": {"method.name": "dit", "diffusion.kind": "edm"},
    "SD-DiT": {"method.name": "sddit"},
}


def space(axes, **changes):
    return Space("digits", "sddit", {k.replace("__", "."): v for k, v in changes.items()}, axes)


def cells_of(axes, seeds=1, **changes):
    return plan.grid(space(axes, **changes), axes, range(seeds))[0]


def recorded(cell, state, step, **metrics):
    row = dict.fromkeys(CELL_COLUMNS) | {"identity": cell.identity, "run_id": "r", "state": state, "step": step}
    params = {"seed": cell.experiment.seed, **cell.values}
    return row | {"steps": 600, "params": params, "metrics": metrics, "tags": {}, "seed": cell.experiment.seed}


def test_a_grid_is_the_product_with_the_seeds():
    axes = {AXIS: [0, 0.5], "method.lambda_d": [0.1, 1]}
    cells = cells_of(axes, seeds=2)
    assert len(cells) == 8 == len({c.identity for c in cells})
    assert [c.experiment.seed for c in cells] == [0] * 4 + [1] * 4
    assert cells[1].label == "mask_ratio=0,lambda_d=1"
    assert [c.identity for c in cells_of(axes, seeds=3)[:8]] == [c.identity for c in cells], "more seeds only add"


def test_named_settings_span_methods():
    cells = cells_of({"system": SYSTEMS, "lr": {"x1": {}, "x2": {"train.lr": Times(2)}}})
    assert [c.label for c in cells[:3]] == ["system=DiT,lr=x1", "system=DiT,lr=x2", "system=DiT (EDM),lr=x1"]
    assert [c.experiment.method.name for c in cells] == ["dit"] * 4 + ["sddit"] * 2
    assert [c.experiment.diffusion.kind for c in cells] == ["iddpm"] * 2 + ["edm"] * 4
    alone = presets.digits(method="sddit")
    assert cells[4].identity == alone.identity(cells[4].manifest.digest), "a cell of a sweep is that experiment"
    assert cells[5].experiment.train.lr == 2 * alone.train.lr
    assert cells[0].tags["axis.system"] == "DiT" and cells[0].tags["axis.lr"] == "x1"
    assert float(cells[4].tags["sddit.sampling_flops"]) > float(cells[2].tags["sddit.sampling_flops"]) > 0


def test_a_change_applies_to_the_methods_that_have_the_field():
    dit, _, sddit = cells_of({"system": SYSTEMS}, method__mask_ratio=0.5, train__batch_size=32)
    assert sddit.experiment.method.mask_ratio == 0.5
    assert dit.experiment.train.batch_size == sddit.experiment.train.batch_size == 32
    with pytest.raises(UsageError, match=r"Unknown field 'method\.mask_rate'"):
        cells_of({"system": SYSTEMS}, method__mask_rate=0.5)


def test_places_are_absolute_for_workers_and_no_part_of_the_identity(tmp_path, monkeypatch):
    manifest = open_manifest("digits")
    shutil.copytree(manifest.folder, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    named = Space("digits", "sddit", {}, {}).cell({}, 0)
    cell = Space("digits", "sddit", {"data.path": "mine", "eval.reference": "digits"}, {}).cell({}, 0)
    assert named.experiment.data.path == "digits", "a name stays a name"
    assert (cell.experiment.data.path, cell.experiment.eval.reference) == (str(tmp_path / "mine"), "digits")
    there = Space("digits", "sddit", {"data.path": str(tmp_path / "mine"), "eval.reference": "digits"}, {}).cell({}, 0)
    assert there.identity == cell.identity


def test_a_tie_follows_its_axis():
    tied = Space(
        "digits", "sddit", {}, {"method.tau_teacher": [0.02, 0.07]}, {"method.tau_teacher_cls": "method.tau_teacher"}
    )
    methods = [c.experiment.method for c in plan.grid(tied, tied.axes, [0])[0]]
    assert [(m.tau_teacher, m.tau_teacher_cls) for m in methods] == [(0.02, 0.02), (0.07, 0.07)]


def test_ratios_that_keep_the_same_tokens_are_one_cell():
    with pytest.raises(UsageError, match=r"mask_ratio=0.2 and mask_ratio=0.25 are one cell.*12 of 16 tokens"):
        cells_of({AXIS: [0, 0.2, 0.25]})
    with pytest.raises(UsageError, match="are one cell"):
        cells_of({AXIS: [0.5, 0.5]})


def test_impossible_and_equal_settings_are_excluded_with_the_reason():
    components = {"all": {}, "same": {AXIS: 0.2}, "off": {"method.lambda_d": 0.0}}
    axes = {"component": components, "method.stop_gradient": [False, True]}
    cells, excluded = plan.grid(space(axes), axes, [0, 1])
    assert [c.label for c in cells[:3]] == [
        "component=all,stop_gradient=False", "component=all,stop_gradient=True", "component=off,stop_gradient=False"
    ]  # fmt: skip
    assert len(cells) == 6
    assert set(excluded) == {
        "component=same,stop_gradient=False", "component=same,stop_gradient=True", "component=off,stop_gradient=True"
    }  # fmt: skip
    assert excluded["component=same,stop_gradient=True"] == "the same as component=all,stop_gradient=True"
    assert "nothing would train the encoder" in excluded["component=off,stop_gradient=True"]


def test_a_value_that_is_possible_nowhere_is_an_error():
    with pytest.raises(UsageError, match=r"mask_ratio is 1.5, but must be in \[0, 1\)"):
        cells_of({AXIS: [0, 1.5]})
    with pytest.raises(UsageError, match="nothing would train the encoder"):
        cells_of({"component": {"all": {}, "none": {"method.lambda_d": 0.0, "method.stop_gradient": True}}})


def test_states():
    cells = cells_of({AXIS: [0, 0.2, 0.3, 0.5, 0.65]})
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
    assert plan.plan(cells_of({AXIS: [0]}, train__steps=900), table)[0].state == "extend"
    assert plan.plan(cells_of({AXIS: [0]}, train__steps=400), table)[0].state == "done"
    assert [p.state for p in plan.plan(cells, EMPTY)] == ["new"] * 5


def test_the_best_point_is_that_of_the_mean_and_of_a_finished_sweep():
    cells = cells_of({AXIS: [0, 0.5]}, seeds=2)
    fids = [20.0, 22.0, 30.0, 10.0, 5.0]
    fresh = space({AXIS: [0]}).cell({AXIS: 0}, FRESH_SEED)
    rows = [recorded(c, "done", 600, **{"eval/fid": f}) for c, f in zip([*cells, fresh], fids, strict=True)]
    planned = plan.plan([*cells, fresh], pd.DataFrame(rows))
    assert plan.best_point(planned, missing=0) == {AXIS: 0.5}, "16 against 25: fresh seeds are out"
    with pytest.raises(UsageError, match="3 cells are missing"):
        plan.best_point(planned, missing=3)


def base_of(axes, **changes):
    return plan.base_fields(space(axes, **changes), "d" * 64)


def refusal(before, now, defaults, taken=()):
    with pytest.raises(UsageError) as error:
        plan.refuse_other_base("x", before, now, defaults, taken)
    return str(error.value)


def test_a_name_stands_for_one_base():
    fields = base_of({AXIS: [0, 0.2]})
    assert AXIS not in fields and "seed" not in fields and "train.steps" not in fields
    plan.refuse_other_base("x", fields, dict(fields), {}, [])
    said = refusal(fields, base_of({AXIS: [0.6]}, train__lr=1e-3), {}, ["x", "x-2"])
    assert "train.lr: 0.007 → 0.001" in said and "--name x-3" in said and "mask_ratio" not in said


MIXED = {"system": SYSTEMS, "lr": {"x1": {}, "x2": {"train.lr": Times(2)}}}
REBASED = [
    ({"train__lr": 0.001}, "sddit: train.lr"),  # though an axis multiplies it
    ({"diffusion__kind": "iddpm"}, "sddit: diffusion.kind"),
    ({"method__mask_ratio": 0.5}, "sddit: method.mask_ratio"),
    ({"method__teacher_momentum": 0.9999}, "sddit: method.teacher_momentum"),
    ({"method__lambda_d": 0.1}, None),  # the preset's own value
    ({"method__collapse_after": 9, "train__steps": 9, "train__compile": True}, None),  # never change a result
]


@pytest.mark.parametrize(("changes", "field"), REBASED)
def test_a_base_of_several_methods(changes, field):
    before, now, defaults = base_of(MIXED), base_of(MIXED, **changes), plan.default_fields(space(MIXED))
    assert len(json.dumps(before)) < 8000, "it fits a tag"
    for old, new in ((before, now), (now, before)):
        if field is None:
            plan.refuse_other_base("x", old, new, defaults, [])
        else:
            assert field in refusal(old, new, defaults)


def test_some_of_the_named_settings_by_name():
    mixed = space(MIXED)
    cells, _ = plan.grid(mixed, {"system": ["SD-DiT"], "lr": ["x2"]}, [0])
    assert [c.label for c in cells] == ["system=SD-DiT,lr=x2"]
    assert mixed.cell({"system": "DiT", "lr": "x1"}, 0).experiment.method.name == "dit", "recorded ones are known"
    with pytest.raises(UsageError, match=r"system has no setting 'SDDiT'\. Did you mean"):
        mixed.cell({"system": "SDDiT", "lr": "x1"}, 0)


def test_a_field_added_to_the_project_later_does_not_change_a_base():
    fields = base_of({AXIS: [0, 0.2]})
    before = {k: v for k, v in fields.items() if k != "method.stop_gradient"}
    plan.refuse_other_base("x", before, fields, {"method.stop_gradient": False}, [])
    assert "stop_gradient: True → False" in refusal(before, fields, {"method.stop_gradient": True})


def test_a_recorded_point_is_what_its_tags_say():
    tags = {
        "axis.system": "DiT (EDM)",
        "axis.model.size": "S/2",
        "axis.method.mask_ratio": "0.3",
        "sddit.state": "done",
    }
    point = {"system": "DiT (EDM)", "model.size": "S/2", AXIS: 0.3}
    assert plan.point_of({"tags": tags, "params": {}}, ["system"]) == point
    assert plan.point_of({"tags": {}, "params": {AXIS: 0.3, "seed": 1}}, [AXIS, "system"]) == {AXIS: 0.3}
