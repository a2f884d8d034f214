"""MDT's network: what its masked pass sees and says (methods.md §12.3), and its relative positions."""

import pytest
import torch
from steps import scramble_

from sddit.models import masking
from sddit.models.layers import RelativePositionBias, keyed_init_
from sddit.models.mdt import MDT

NOISE, Y = torch.tensor([10.0, 700.0]), torch.tensor([3, 10])
X = torch.linspace(-1, 1, 128).sin().view(2, 1, 8, 8)
versions = pytest.mark.parametrize("version", ["v1", "v2"])


def tiny(version: str = "v1") -> MDT:
    network = MDT((1, 8, 8), 10, 5, 32, 4, 2, decoder_layers=1, version=version)  # type: ignore[arg-type]
    keyed_init_(network, 0)
    scramble_(network, 0.2)
    return network.train()


def some_mask(keep: int) -> masking.Mask:
    return masking.random_mask(torch.rand(2, 16, generator=torch.Generator().manual_seed(1)), keep)


def changed(module: torch.nn.Module | torch.nn.Parameter) -> None:
    with torch.no_grad():
        for p in module.parameters() if isinstance(module, torch.nn.Module) else [module]:
            p.normal_()


@versions
def test_masked_pass_with_nothing_masked_is_the_full_pass(version: str) -> None:
    """In a random order, too: the encoder is permutation-equivariant with its gathered bias."""
    network = tiny(version)
    torch.testing.assert_close(network(X, NOISE, Y, some_mask(16)), network(X, NOISE, Y), rtol=1e-5, atol=1e-5)


@versions
def test_full_pass_knows_no_side_block_and_no_mask_token(version: str) -> None:
    network = tiny(version)
    full, masked = network(X, NOISE, Y), network(X, NOISE, Y, some_mask(11))
    changed(network.side_block)
    changed(network.mask_token)
    assert torch.equal(network(X, NOISE, Y), full)
    assert not torch.equal(network(X, NOISE, Y, some_mask(11)), masked)


@versions
def test_removed_tokens_leak_through_the_shortcut_of_v2_alone(version: str) -> None:
    network, mask = tiny(version), some_mask(11)
    removed = mask.removed.view(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    other = X + removed * torch.randn(X.shape, generator=torch.Generator().manual_seed(2))
    c = network.condition(NOISE, Y)
    encoded = [network.encode(network.embed(x), c, mask.ids_keep) for x in (X, other)]
    assert torch.equal(*encoded)
    same = torch.equal(network(X, NOISE, Y, mask), network(other, NOISE, Y, mask))
    assert same == (version == "v1")


def test_side_block_speaks_where_tokens_were_removed() -> None:
    """With a decoder that mixes nothing, outputs at visible places do not depend on it."""
    network, mask = tiny(), some_mask(11)
    network.decoder_blocks = torch.nn.ModuleList()
    before = network(X, NOISE, Y, mask)
    changed(network.side_block)
    moved = (network(X, NOISE, Y, mask) != before).any(dim=1).view(2, 4, 2, 4, 2).any(dim=4).any(dim=2).view(2, 16)
    assert torch.equal(moved, mask.removed.bool())


def test_relative_positions() -> None:
    """A bias belongs to the offset (rows, columns) between two tokens, and three rows of the table to none."""
    bias = RelativePositionBias((4, 4), 2)
    assert bias.table.shape == (7 * 7 + 3, 2)
    assert RelativePositionBias((16, 16), 6).table.shape == (964, 6)
    with torch.no_grad():
        bias.table.copy_(torch.arange(52.0)[:, None].expand(-1, 2))
    full = bias()
    by_offset: dict[tuple[int, int], set[float]] = {}
    for i in range(16):
        for j in range(16):
            offset = (i // 4 - j // 4, i % 4 - j % 4)
            by_offset.setdefault(offset, set()).add(full[0, 0, i, j].item())
    assert all(len(v) == 1 for v in by_offset.values())
    assert {next(iter(v)) for v in by_offset.values()} == set(range(49))
    ids = torch.tensor([[5, 0, 9], [3, 2, 1]])
    part = bias(ids)
    for b in range(2):
        assert torch.equal(part[b], full[0][:, ids[b]][:, :, ids[b]])


def test_v2_loses_a_block_of_an_odd_encoder() -> None:
    """(12 - 5) // 2 = 3: eleven blocks, as published (methods.md §5)."""
    with torch.device("meta"):
        network = MDT((4, 32, 32), 1000, 12, 384, 6, 2, decoder_layers=5, version="v2")
    assert len(network.blocks) + len(network.decoder_blocks) == 11
    assert [block.skip is not None for block in network.blocks] == [False] * 3 + [True] * 3
