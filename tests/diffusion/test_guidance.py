"""Classifier-free guidance: oracles of methods.md §12.6, and what a step costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sddit.config import Experiment
from sddit.diffusion import build_process, guidance

X = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(5)
NULL = 10


class Network:
    """F = x · (1 + y) on `outputs` times the channels of x, and what it was called with."""

    def __init__(self, outputs: int = 1) -> None:
        self.outputs, self.calls = outputs, []

    def __call__(self, x: Tensor, level: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(level) == len(y)
        self.calls.append((len(x), level.dtype, set(level.tolist())))
        return x.repeat(1, self.outputs, 1, 1) * (1 + y)[:, None, None, None]


@pytest.mark.parametrize("outputs", [1, 2], ids=["D", "F"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("scale", "size"), [(1.0, 5), (0.0, 10), (0.4, 10), (1.5, 10), (4.0, 10)])
def test_guided_channels_are_blended_and_the_others_conditional(
    outputs: int, channels: int, scale: float, size: int
) -> None:
    network = Network(outputs)
    level = 7 if outputs == 2 else 0.1
    result = guidance.guided(network, Y, NULL, lambda _: scale, channels)(X, level)
    assert network.calls == [(size, torch.int64 if outputs == 2 else torch.float64, {level})], "one call"
    c, u = Network(outputs)(X, Y, Y), Network(outputs)(X, Y, torch.full_like(Y, NULL))
    torch.testing.assert_close(result[:, :channels], (u + scale * (c - u))[:, :channels])
    assert torch.equal(result[:, channels:], c[:, channels:]), "v, and channels without guidance"
    if scale in (0, 1):
        assert torch.equal(result[:, :channels], (c if scale else u)[:, :channels])


def test_the_scale_is_asked_for_at_each_level() -> None:
    network = Network(2)
    evaluate = guidance.guided(network, Y, NULL, {999: 1.0, 0: 2.0}.__getitem__, 3)
    evaluate(X, 999), evaluate(X, 0)
    assert [size for size, *_ in network.calls] == [5, 10]


def test_guiding_d_is_guiding_f() -> None:
    """On all channels, as MaskDiT writes it: D = c_skip x + c_out F."""
    f = Network()
    guided_f = guidance.guided(f, Y, NULL, lambda _: 1.5, 4)(X, 0.3)
    guided_d = guidance.guided(lambda x, s, y: 0.7 * x + 0.2 * f(x, s, y), Y, NULL, lambda _: 1.5, 4)(X, 0.3)
    torch.testing.assert_close(guided_d, 0.7 * X + 0.2 * guided_f)


@pytest.mark.parametrize(
    ("t", "scale"), [(0, 3.8), (100, 3.059374), (250, 1.636545), (500, 1.026901), (750, 1.000105), (999, 1.0)]
)
def test_power_cosine(t: int, scale: float) -> None:
    assert guidance.power_cosine(t, 1000, 3.8, 4.0) == pytest.approx(scale, abs=5e-7)
    rule = guidance.scale_rule(Experiment.parse({"method": {"name": "mdt"}, "eval": {"guidance": 3.8}}))
    assert rule(t) == pytest.approx(scale, abs=5e-7), "MDT's own rule"


@given(st.integers(0, 999), st.floats(0, 10), st.floats(0.01, 8))
def test_power_cosine_lies_between_none_and_the_largest(t: int, largest: float, power: float) -> None:
    tiny = 1e-12  # rounding
    assert min(1, largest) - tiny <= guidance.power_cosine(t, 1000, largest, power) <= max(1, largest) + tiny
    assert guidance.power_cosine(t, 1000, 1.0, power) == 1
    assert guidance.power_cosine(0, 1000, largest, power) == pytest.approx(largest, abs=1e-12)


def test_a_small_power_is_nearly_constant() -> None:
    assert min(guidance.power_cosine(t, 1000, 4.0, 0.01) for t in range(950)) > 3.9


@pytest.mark.parametrize(("method", "rule"), [("dit", 1.5), ("maskdit", 1.5), ("sddit", 1.5)])
def test_others_guide_alike_at_all_levels(method: str, rule: float) -> None:
    experiment = Experiment.parse({"method": {"name": method}, "eval": {"guidance": rule}})
    levels = (999, 500, 0) if experiment.diffusion.kind == "iddpm" else (80.0, 1.0, 0.002)
    assert {guidance.scale_rule(experiment)(level) for level in levels} == {rule}


@pytest.mark.parametrize("kind", ["edm", "iddpm"])
@given(st.floats(-5, 4), st.floats(0.1, 5))
def test_guided_only_where_sigma_is_in_the_interval(kind: str, middle: float, width: float) -> None:
    low, high = math.exp(middle - width), math.exp(middle + width)
    experiment = Experiment.parse(
        {
            "method": {"name": "dit"},
            "diffusion": {"kind": kind},
            "eval": {"guidance": 2.0, "guidance_interval": (low, high)},
        }
    )
    rule, process = guidance.scale_rule(experiment), build_process(experiment.diffusion)
    levels = [0, 10, 500, 999] if kind == "iddpm" else [0.002, 0.5, 5.0, 80.0]
    for level in levels:
        sigma = float(process.sigma(torch.tensor(level)))
        if math.isclose(sigma, low, rel_tol=1e-6) or math.isclose(sigma, high, rel_tol=1e-6):
            continue
        assert rule(level) == (2.0 if low < sigma <= high else 1.0)
    if kind == "edm":
        assert rule(low) == 1.0 and rule(high) == 2.0, "the lower end is outside, the upper inside"


def test_rules_combine() -> None:
    eval_ = {"guidance": 3.8, "guidance_interval": (0.0, 0.5)}
    rule = guidance.scale_rule(Experiment.parse({"method": {"name": "mdt"}, "eval": eval_}))
    assert rule(100) == pytest.approx(3.059374, abs=5e-7) and rule(250) == 1.0
