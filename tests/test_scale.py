"""docs/scale.md says what benchmarks/scale.py computes, and that rests on the real networks."""

import re

import pytest
import torch

from benchmarks import scale
from sddit.methods import build_method

FIGURE = re.compile(r"\d[\d.,]* ?(?:%|µs|ms|[kMGT]B|G?FLOP|[TP]FLOP)\b")


def test_the_page_holds_what_is_computed():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.filled(page) == page, "run python -m benchmarks.scale --write"


def test_figures_stand_in_blocks_only():
    """So that none is left behind when an assumption changes."""
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- end -->", "", scale.PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert FIGURE.findall(prose) == []


@pytest.mark.parametrize("name", scale.METHODS)
def test_gradients_of_the_real_networks(name):
    with torch.device("meta"):
        method = build_method(scale.experiment(name), scale.LATENT, scale.CLASSES)
    gradient = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    assert gradient == scale.gradient_bytes(name) == scale.MEASURED["counted"][name]["gradient_bytes"]


def test_a_step_on_more_gpus():
    few, mid, many = (scale.step("sddit", gpus) for gpus in scale.SCALES)
    assert few.compute == pytest.approx(8 * mid.compute) == pytest.approx(32 * many.compute)
    assert few.update == mid.update == many.update
    assert few.all_reduce < mid.all_reduce < many.all_reduce
    for each in (few, mid, many):
        assert 0 < each.exposed <= each.all_reduce
        assert each.total == pytest.approx(each.passes + each.update + each.exposed)


def test_ring():
    """Two GPUs send half each way; many send almost all of it twice."""
    assert scale.ring(8e9, 2, 1e9) == pytest.approx(8e9 / scale.HW.nvlink)
    assert scale.ring(8e9, 2**20, 1e9) == pytest.approx(16, rel=1e-5)
