"""The declared sweeps: which cells each has on digits, what is left out, and that what it draws exists."""

import importlib
from pathlib import Path

import pytest

from sddit.errors import UsageError
from sddit.orchestration.sweep import Flags, resolve

ROOT = Path(__file__).parents[2]
CELLS = {"mask_ratio": 6, "convergence": 15, "teacher_sigma": 5, "temperatures": 9, "model_size": 8, "components": 29}


def declared(name):
    return importlib.import_module(f"sweeps.{name}").sweep


def cells_of(name, *assignments, **flags):
    return resolve(declared(name), Flags(set=assignments, **flags))


def test_every_file_is_a_sweep_of_the_table():
    names = {path.stem for path in (ROOT / "sweeps").glob("[a-z]*.py")}
    assert names == {*CELLS, "search"} and all(declared(name).name == name for name in names)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    job = cells_of(name)
    assert len(job.cells) == CELLS[name] == len({c.identity for c in job.cells})
    assert list(job.excluded) == (["component=Sinkhorn-Knopp"] if name == "components" else []), "digits has it already"
    assert len(cells_of(name, seeds=3).cells) == 3 * CELLS[name]
    base = next(c for c in job.cells if c.experiment.method.name == "sddit" and c.experiment.model.size == "S/2")
    assert base.experiment.train.steps == 600


@pytest.mark.parametrize("name", [*CELLS, "search"])
def test_figures_exist_and_the_docstring_says_what_it_costs(name):
    for module in declared(name).figures:
        assert callable(importlib.import_module(module).figure)
    text = importlib.import_module(f"sweeps.{name}").__doc__
    assert f"python sweeps/{name}.py" in text and "Cost on digits:" in text and "Found there" in text


def test_axes_by_name():
    job = cells_of("convergence", 'system=["SD-DiT","DiT (EDM)"]', 'lr="x2"')
    assert [c.label for c in job.cells] == ["system=SD-DiT,lr=x2", "system=DiT (EDM),lr=x2"]
    with pytest.raises(UsageError, match="Did you mean 'SD-DiT'"):
        cells_of("convergence", 'system="SDDiT"')
    with pytest.raises(UsageError, match=r"compares methods itself.*'system="):
        cells_of("convergence", "method.name=mdt")


def test_a_search_has_no_grid_and_no_fixed_axis():
    job = resolve(declared("search"), Flags(search="tpe", trials=4))
    assert job.searches and not job.cells and len(job.first) == 3
    with pytest.raises(UsageError, match="has no grid"):
        resolve(declared("search"), Flags())
    with pytest.raises(UsageError, match="chooses it itself"):
        resolve(declared("search"), Flags(search="tpe", trials=4, set=("method.mask_ratio=0.3",)))


def test_methods_keep_what_only_they_have():
    job = cells_of("convergence", "method.mask_ratio=0.4", "train.batch_size=32")
    ratios = {c.values["system"]: getattr(c.experiment.method, "mask_ratio", None) for c in job.cells}
    assert ratios == {"DiT": None, "DiT (EDM)": None, "MaskDiT": 0.4, "MDT": 0.4, "SD-DiT": 0.4}
    assert {c.experiment.train.batch_size for c in job.cells} == {32}
