"""Oracles of methods.md §12.7, and what the targets must be whatever the logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sddit.config import SDDiT
from sddit.methods import discrimination as disc
from sddit.models.layers import keyed_init_

PAPER_HEADS = {384: 7_606_528, 768: 8_392_960, 1024: 8_917_248, 1152: 9_179_392}


def config(**changes: object) -> SDDiT:
    return SDDiT(**({"num_prototypes": 6} | changes))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("width", PAPER_HEADS)
def test_head_parameter_counts(width: int) -> None:
    with torch.device("meta"):
        shared, separate = disc.Heads(SDDiT(), width), disc.Heads(SDDiT(head_shared=False), width)
    assert sum(p.numel() for p in shared.parameters()) == PAPER_HEADS[width]
    assert sum(p.numel() for p in separate.parameters()) == 2 * PAPER_HEADS[width]


@pytest.mark.parametrize(
    ("layers", "sizes"), [(1, [(8, 4)]), (2, [(8, 16), (16, 4)]), (3, [(8, 16), (16, 16), (16, 4)])]
)
def test_head_layers(layers: int, sizes: list[tuple[int, int]]) -> None:
    head = disc.ProjectionHead(config(head_layers=layers, head_hidden=16, head_bottleneck=4), 8)
    assert [(m.in_features, m.out_features) for m in head.mlp] == sizes


@pytest.mark.parametrize(("law", "std"), [("trunc_normal", 0.02), ("xavier", math.sqrt(2 / (384 + 2048)))])
def test_random_head(law: str, std: float) -> None:
    """§12.7: logits are cosines of std 1/16, and the cross-entropies that follow from it."""
    head = disc.ProjectionHead(SDDiT(head_init=law), 384)  # type: ignore[arg-type]
    keyed_init_(head, 0)
    assert head.mlp[0].weight.std().item() == pytest.approx(std, rel=0.01)
    assert not any(layer.bias.any() for layer in head.mlp)
    with torch.no_grad():
        z, other = head(torch.randn(2, 64, 384))
    assert z.abs().max() < 1 and z.std().item() == pytest.approx(1 / 16, rel=0.02)
    norms = torch.nn.functional.normalize(head.prototypes.weight, dim=1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(8192))
    for tau, same, entropy in ((0.04, 8.24, 7.81), (0.07, 8.65, 8.61)):
        targets = (z / tau).softmax(1)
        assert disc.cross_entropy(z / 0.1, targets).mean().item() == pytest.approx(same, abs=0.03)
        assert torch.special.entr(targets).sum(1).mean().item() == pytest.approx(entropy, abs=0.03)
        assert same + 0.3 < disc.cross_entropy(other / 0.1, targets).mean().item() < 9.3


def test_separate_heads_start_apart_and_keep_to_their_tokens() -> None:
    heads = disc.Heads(config(head_shared=False, head_hidden=16, head_bottleneck=4), 8)
    keyed_init_(heads, 0)
    assert not torch.equal(heads["cls"].prototypes.weight, heads["patch"].prototypes.weight)
    tokens = torch.randn(2, 5, 8)
    logits = heads(tokens)
    torch.testing.assert_close(logits[:, 0], heads["cls"](tokens[:, 0]))
    torch.testing.assert_close(logits[:, 1:], heads["patch"](tokens[:, 1:]))


def test_logits_are_float32_under_autocast() -> None:
    """The MLP computes as the encoder does; cosines with the prototypes keep their digits."""
    head = disc.ProjectionHead(config(head_hidden=16, head_bottleneck=4), 8)
    keyed_init_(head, 0)
    tokens, seen = torch.randn(3, 8), []
    head.mlp[-1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(tokens)
    assert seen[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    x = torch.nn.functional.normalize(seen[0].float(), dim=-1)
    assert torch.equal(logits, x @ torch.nn.functional.normalize(head.prototypes.weight, dim=-1).T)
    torch.testing.assert_close(logits, head(tokens), atol=0.02, rtol=0)
    torch.testing.assert_close(head(tokens, 0.1), head(tokens) / 0.1)


# ------------------------------------------------------------------------------------------------------ cross-entropy


@pytest.mark.parametrize(("k", "value"), [(8192, 9.0109133), (65536, 11.0903549)])
def test_equal_logits_cost_ln_k(k: int, value: float) -> None:
    z = torch.full((2, 1, k), 0.3)
    targets = disc.Targets(config(num_prototypes=k))(z[:, 0], 0.04)
    assert disc.cross_entropy(z[:, 0] / 0.1, targets).tolist() == pytest.approx([value] * 2, rel=1e-6)


def test_two_classes() -> None:
    teacher = torch.tensor([[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]])
    student = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    targets = disc.Targets(config(num_prototypes=2))(teacher, 0.1)
    assert disc.cross_entropy(student / 0.2, targets).tolist() == pytest.approx([0.6085] * 3, abs=5e-5)


def test_greatest_probability_of_one_logit() -> None:
    z = torch.zeros(1, 8192)
    z[0, 0] = 1
    one_hot = torch.nn.functional.one_hot(torch.tensor([0]), 8192).float()
    assert math.exp(-disc.cross_entropy(z / 0.1, one_hot).item()) == pytest.approx(0.7289, abs=5e-5)


@given(st.integers(0, 1000), st.floats(0.03, 0.3), st.floats(0.03, 0.3))
def test_cross_entropy_is_at_least_the_entropy(seed: int, tau_s: float, tau_t: float) -> None:
    z_s, z_t = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed)).tanh()
    targets = disc.Targets(config())(z_t, tau_t)
    entropy = torch.special.entr(targets).sum(1)
    assert (disc.cross_entropy(z_s / tau_s, targets) >= entropy - 1e-5).all()
    torch.testing.assert_close(disc.cross_entropy(z_t / tau_t, targets), entropy, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ centring


def test_centre_is_of_the_step_before() -> None:
    targets, z = disc.Targets(config(centre_momentum=0.9)), torch.randn(10, 6)
    assert torch.equal(targets(z, 0.1), (z / 0.1).softmax(1))
    assert not targets.centre.any()
    targets.update()
    torch.testing.assert_close(targets.centre, 0.1 * z.mean(0, keepdim=True))
    torch.testing.assert_close(targets(z, 0.1), ((z - 0.1 * z.mean(0)) / 0.1).softmax(1))
    targets.update()
    torch.testing.assert_close(targets.centre, 0.19 * z.mean(0, keepdim=True))
    targets.update()  # nothing new was seen
    torch.testing.assert_close(targets.centre, 0.19 * z.mean(0, keepdim=True))


def test_a_constant_in_logits_and_centre_cancels() -> None:
    targets, z, constant = disc.Targets(config()), torch.randn(10, 6), torch.randn(6)
    before = targets(z, 0.1)
    targets.centre += constant
    torch.testing.assert_close(targets(z + constant, 0.1), before)


def test_centre_of_each_position() -> None:
    targets, z = disc.Targets(config(centre_momentum=0.0), num_groups=4), torch.randn(6, 6)
    positions = torch.tensor([0, 2, 0, 3, 2, 0])
    targets(z, 0.1, positions)
    targets.update()
    torch.testing.assert_close(targets.centre[0], z[[0, 2, 5]].mean(0))
    torch.testing.assert_close(targets.centre[3], z[3])
    assert not targets.centre[1].any()  # unseen
    torch.testing.assert_close(targets(z, 0.1, positions), ((z - targets.centre[positions]) / 0.1).softmax(1))


def test_only_an_ema_centre_is_kept() -> None:
    assert list(disc.Targets(config()).state_dict()) == ["centre"]
    for centring in ("sinkhorn", "none"):
        targets = disc.Targets(config(centring=centring))
        assert not targets.state_dict()
        targets(torch.randn(4, 6), 0.1)
        targets.update()
    z = torch.randn(4, 6)
    assert torch.equal(disc.Targets(config(centring="none"))(z, 0.1), (z / 0.1).softmax(1))


def test_sinkhorn_is_the_published_iteration() -> None:
    z, k, b = torch.randn(12, 5, dtype=torch.float64), 5, 12
    q = (z / 0.3).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * k
        q /= q.sum(0, keepdim=True) * b
    torch.testing.assert_close(disc.sinkhorn(z / 0.3, 3), (q * b).T)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.floats(0.02, 1.0), st.integers(1, 3))
def test_sinkhorn_balances_prototypes(seed: int, tau: float, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = 0.3 * torch.randn(24 * groups, 6, generator=generator)
    ids = torch.arange(groups).repeat(24) if groups > 1 else None
    p = disc.sinkhorn(z / tau, 200, ids, groups)
    assert torch.isfinite(p).all()
    torch.testing.assert_close(p.sum(1), torch.ones(len(z)))
    used = disc.group_sum(disc.sinkhorn(z / max(tau, 0.2), 200, ids, groups), ids, groups)
    torch.testing.assert_close(used, torch.full_like(used, 4.0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tau", [0.04, 0.005])
def test_sinkhorn_survives_extreme_logits(tau: float) -> None:
    z = torch.rand(8, 6) * 2 - 1
    z[:, 0] = -1  # a prototype that nothing is near
    for shift in (0.0, 100.0):
        assert torch.isfinite(disc.sinkhorn((z + shift) / tau, 3)).all()


# --------------------------------------------------------------------------------------------- information, schedules


def test_information() -> None:
    k = 8
    alive, uniform, one = torch.eye(k).repeat(3, 1), torch.full((20, k), 1 / k), torch.eye(k)[[2] * 20]
    values = disc.information(alive, uniform, one)
    assert [float(v) for v in values] == pytest.approx([math.log(k), 0, 0], abs=1e-6)
    half = disc.information(torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))[0]
    assert float(half) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("step", "value"), [(0, 0.04), (10, 0.055), (20, 0.07), (99, 0.07)])
def test_ramp(step: int, value: float) -> None:
    assert disc.ramp(0.04, 0.07, step, 20) == pytest.approx(value)
    assert disc.ramp(0.04, 0.07, step, 0) == 0.07


@pytest.mark.parametrize(("step", "value"), [(0, 0.996), (50, 0.998), (100, 1.0), (500, 1.0)])
def test_cosine(step: int, value: float) -> None:
    assert disc.cosine(0.996, 1.0, step, 100) == pytest.approx(value)
    expected = 1 - (1 - 0.996) * 0.5 * (1 + math.cos(math.pi * min(step, 100) / 100))
    assert disc.cosine(0.996, 1.0, step, 100) == pytest.approx(expected)
