"""`build_network`: sizes from the experiment, weights from its seed."""

import pytest
import torch

from sddit import presets
from sddit.errors import UsageError
from sddit.models import build_network
from sddit.models.dit import DiT
from sddit.models.sddit import SDDiT


@pytest.mark.parametrize(
    ("method", "kind", "count"),
    # DiT under EDM has four output channels: half the last Linear of the eight in §1.4 less.
    [("sddit", SDDiT, 68_116_752), ("dit", DiT, 32_865_056 - 16 * 385)],
)
def test_network_of_a_method(method: str, kind: type, count: int) -> None:
    with torch.device("meta"):
        network = build_network(presets.imagenet256("S/2", method=method), (4, 32, 32), 1000)
    assert type(network) is kind
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count


def test_decoder_is_configurable() -> None:
    network = build_network(presets.digits(), (1, 8, 8), 10)
    assert isinstance(network, SDDiT)
    assert len(network.decoder_blocks) == 2 and network.decoder_pos_embed.shape == (16, 64)


def test_weights_follow_the_seed() -> None:
    first, same, other = (
        build_network(presets.digits(method="dit").replace({"seed": s}), (1, 8, 8), 10).state_dict() for s in (0, 0, 1)
    )
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["blocks.0.mlp.hidden.weight"], other["blocks.0.mlp.hidden.weight"])


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (1, 9, 8), r"patches of 2×2, which do not divide images of 9×8"),
        ({"model.decoder_heads": 5}, (1, 8, 8), r"decoder_width 64 must be a multiple of 4 and of .*decoder_heads 5"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(presets.digits().replace(changes), shape, 10)
