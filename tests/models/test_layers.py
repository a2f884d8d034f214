"""Oracles of methods.md §1.3 and §12.3 for the parts of the networks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sddit.models import layers
from sddit.models.dit import DiT
from sddit.models.sddit import SDDiT

SHAPE, TINY = (1, 8, 8), {"depth": 2, "width": 32, "heads": 4, "patch": 2}


@pytest.mark.parametrize("width", [384, 512, 1152])
def test_positional_code(width: int) -> None:
    code = layers.sincos_2d(width, 16, 16)
    assert code.shape == (256, width) and code.dtype == torch.float32
    assert code[0].sum().item() == width / 2  # position 0: sines 0, cosines 1
    assert code[1, 0].item() == pytest.approx(math.sin(1), abs=1e-6)  # one column to the right ...
    assert code[1, width // 4].item() == pytest.approx(math.cos(1), abs=1e-6)
    assert code[16, 0].item() == 0  # ... and one row down, which the second half tells
    assert code[16, width // 2].item() == pytest.approx(math.sin(1), abs=1e-6)
    assert code.double().square().sum().item() == pytest.approx(256 * width / 2, rel=1e-6)


def test_positional_code_of_an_oblong_image() -> None:
    code = layers.sincos_2d(8, 2, 3)
    assert code.shape == (6, 8)
    torch.testing.assert_close(code[1, :4], code[4, :4])  # same column
    torch.testing.assert_close(code[3, 4:], code[5, 4:])  # same row


@given(st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_patches_and_back(b: int, patch: int, rows: int, columns: int, c: int) -> None:
    shape = (c, rows * patch, columns * patch)
    x = torch.arange(b * math.prod(shape), dtype=torch.float32).view(b, *shape)
    tokens = layers.patchify(x, patch)
    assert tokens.shape == (b, rows * columns, patch * patch * c)
    assert torch.equal(layers.unpatchify(tokens, patch, shape), x)


def test_patch_vectors_are_row_column_channel() -> None:
    x = torch.arange(3 * 4 * 4, dtype=torch.float32).view(1, 3, 4, 4)
    vector = layers.patchify(x, 2)[0, 1].view(2, 2, 3)  # the second patch of the first row
    assert vector[1, 0, 2] == x[0, 2, 1, 2]


def test_patch_embedding_is_the_published_convolution() -> None:
    network = DiT((3, 8, 8), 10, **TINY)
    layers.keyed_init_(network, 0)
    x = torch.randn(2, 3, 8, 8)
    weight = network.patch_embed.weight.view(32, 2, 2, 3).permute(0, 3, 1, 2)
    tokens = F.conv2d(x, weight, network.patch_embed.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(network.embed(x), tokens + network.pos_embed)


def test_time_embedding_puts_cosines_first() -> None:
    embed = layers.TimestepEmbedder(256)
    with torch.no_grad():
        for linear in (embed.hidden, embed.out):
            linear.weight.copy_(torch.eye(256))
        inputs = torch.tensor([0.0, 1.0, -1.553652, 999.0])
        seen = []
        embed.hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        embed(inputs)
    angles = inputs.double()[:, None] * 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(seen[0].double(), torch.cat([angles.cos(), angles.sin()], 1), atol=1e-4, rtol=0)


def test_null_class() -> None:
    y = torch.tensor([0, 9, 10])
    for null_row, count in ((True, 11 * 16), (False, 10 * 16)):
        embed = layers.ClassEmbedder(10, 16, null_row=null_row)
        layers.keyed_init_(embed, 0)
        assert embed.table.numel() == count
        assert torch.equal(embed(y)[:2], embed.table[[0, 9]])
        assert bool(embed(y)[2].any()) == null_row
        embed(y).sum().backward()
        assert embed.table.grad is not None


def test_a_block_is_what_the_formula_says() -> None:
    block = layers.Block(8, 2, 6)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    x, c = torch.randn(3, 5, 8), torch.randn(3, 6)
    s1, k1, g1, s2, k2, g2 = block.modulation(c).unsqueeze(1).split(8, 2)

    def norm(t: torch.Tensor) -> torch.Tensor:
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    h = norm(x) * (1 + k1) + s1
    q, k, v = (t.view(3, 5, 2, 4).transpose(1, 2) for t in block.attention.qkv(h).split(8, 2))
    a = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
    expected = x + g1 * block.attention.out(a.transpose(1, 2).reshape(3, 5, 8))
    h = block.mlp.hidden(norm(expected) * (1 + k2) + s2)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    expected = expected + g2 * block.mlp.out(h)
    torch.testing.assert_close(block(x, c), expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- initial weights


def initial(network: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    layers.keyed_init_(network, seed)
    return {k: v.clone() for k, v in network.state_dict().items()}


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    before = torch.random.get_rng_state()
    dit, again, other = (initial(DiT(SHAPE, 10, **TINY), seed) for seed in (0, 0, 1))
    sddit = initial(SDDiT(SHAPE, 10, **TINY, decoder_depth=1, decoder_width=16, decoder_heads=2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(dit[k], again[k]) for k in dit)
    drawn = [k for k, v in dit.items() if v.any() and k != "pos_embed"]
    assert drawn and not any(torch.equal(dit[k], other[k]) for k in drawn)
    # The encoder of SD-DiT starts where DiT does, but for the class table, which has another law.
    shared = dit.keys() & sddit.keys() - {"class_embed.table"}
    assert {k for k in dit if k.startswith(("blocks.", "patch_embed.", "time_embed."))} <= shared
    assert all(torch.equal(dit[k], sddit[k]) for k in shared if not k.startswith("final."))


def test_initial_weights_follow_their_laws() -> None:
    network = DiT((4, 32, 32), 1000, depth=1, width=384, heads=6, patch=2)
    code = network.pos_embed.clone()
    state = initial(network)
    assert torch.equal(state["pos_embed"], code) and not network.pos_embed.requires_grad
    for name, value in state.items():
        if name.endswith(".bias") or "modulation" in name or name.startswith("final."):
            assert not value.any(), name
        elif name.startswith(("time_embed", "class_embed")):
            assert value.std().item() == pytest.approx(0.02, rel=0.02), name
        elif name != "pos_embed":
            bound = math.sqrt(6 / sum(value.shape))
            assert bound * 0.99 < value.abs().max().item() <= bound, name
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name


def test_every_trainable_parameter_has_a_law() -> None:
    network = SDDiT(SHAPE, 10, **TINY)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(np.nan) if p.requires_grad else None
    layers.keyed_init_(network, 0)
    assert all(torch.isfinite(p).all() for p in network.parameters())
