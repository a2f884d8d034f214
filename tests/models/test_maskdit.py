"""MaskDiT's network: what its decoder sees, and when its mask token counts (methods.md §3.1, §12.2, §12.3)."""

import pytest
import torch
from steps import scramble_

from sddit.models import masking
from sddit.models.layers import keyed_init_
from sddit.models.maskdit import MaskDiT

NOISE, Y = torch.tensor([-0.3, 0.8]), torch.tensor([3, 10])
X = torch.linspace(-1, 1, 128).sin().view(2, 1, 8, 8)


def tiny(scrambled: bool = True, mask_token: bool = True) -> MaskDiT:
    network = MaskDiT((1, 8, 8), 10, 2, 32, 4, 2, decoder_depth=2, decoder_width=16, decoder_heads=2,
                      mask_token=mask_token)  # fmt: skip
    keyed_init_(network, 0)
    if scrambled:
        scramble_(network, 0.2)
    return network


def some_mask(keep: int = 8) -> masking.Mask:
    return masking.random_mask(torch.rand(2, 16, generator=torch.Generator().manual_seed(1)), keep)


def test_zero_at_first_for_every_mask() -> None:
    network = tiny(scrambled=False)
    assert not network(X, NOISE, Y).any() and not network(X, NOISE, Y, some_mask()).any()


def test_removed_tokens_change_nothing() -> None:
    network, mask = tiny(), some_mask()
    removed = mask.removed.view(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(network(X, NOISE, Y, mask), network(X + removed, NOISE, Y, mask))
    assert not torch.equal(network(X, NOISE, Y, mask), network(X + 1 - removed, NOISE, Y, mask))


@pytest.mark.parametrize("training", [True, False])
def test_mask_token_counts_under_a_mask_alone(training: bool) -> None:
    network = tiny().train(training)
    full, masked = network(X, NOISE, Y), network(X, NOISE, Y, some_mask())
    with torch.no_grad():
        network.mask_token.normal_()
    assert torch.equal(network(X, NOISE, Y), full)
    assert not torch.equal(network(X, NOISE, Y, some_mask()), masked)


def test_without_a_mask_token_there_are_zeros() -> None:
    with_token, without = tiny(), tiny(mask_token=False)
    with torch.no_grad():
        with_token.mask_token.zero_()
    assert without.mask_token is None
    assert torch.equal(with_token(X, NOISE, Y, some_mask()), without(X, NOISE, Y, some_mask()))


def test_mask_that_removes_nothing() -> None:
    network = tiny()
    torch.testing.assert_close(network(X, NOISE, Y, some_mask(16)), network(X, NOISE, Y), rtol=1e-5, atol=1e-5)
