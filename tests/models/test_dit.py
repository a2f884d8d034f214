"""DiT: the published parameter counts, and what its structure implies (methods.md §1.4, §12.2, §12.3)."""

import pytest
import torch
from steps import scramble_

from sddit.config import SIZE_GRIDS
from sddit.models.dit import DiT
from sddit.models.layers import keyed_init_

COUNTS = {  # total, trainable; eight output channels
    "S/2": (32_963_360, 32_865_056), "S/4": (32_945_024, 32_920_448), "S/8": (33_148_160, 33_142_016),
    "B/2": (130_512_416, 130_315_808), "B/4": (130_475_648, 130_426_496), "B/8": (130_881_536, 130_869_248),
    "L/2": (458_102_816, 457_840_672), "L/4": (458_053_760, 457_988_224), "L/8": (458_594_816, 458_578_432),
    "XL/2": (675_129_632, 674_834_720), "XL/4": (675_074_432, 675_000_704), "XL/8": (675_683_072, 675_664_640),
}  # fmt: skip


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size: str) -> None:
    letter, patch = size.split("/")
    with torch.device("meta"):
        network = DiT((4, 32, 32), 1000, *SIZE_GRIDS["paper"][letter], int(patch), out_channels=8)
    parameters = list(network.parameters())
    assert (sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)) == COUNTS[size]


def tiny(**changes: int) -> DiT:
    return DiT((3, 8, 12), 10, **{"depth": 2, "width": 32, "heads": 4, "patch": 2} | changes)


@pytest.mark.parametrize("out_channels", [3, 6])
def test_output_is_zero_at_first(out_channels: int) -> None:
    network = tiny(out_channels=out_channels)
    keyed_init_(network, 0)
    output = network(torch.randn(4, 3, 8, 12), torch.tensor([0.0, -1.5, 1.0, 999.0]), torch.tensor([0, 3, 9, 10]))
    assert output.shape == (4, out_channels, 8, 12)
    assert not output.any()


def test_output_depends_on_image_noise_and_label() -> None:
    network = tiny()
    scramble_(network)
    x, noise, y = torch.randn(2, 3, 8, 12), torch.zeros(2), torch.tensor([1, 2])
    output = network(x, noise, y)
    for changed in (network(x + 0.1, noise, y), network(x, noise + 0.1, y), network(x, noise, y + 1)):
        assert (changed - output).abs().max() > 1e-3


def test_permuted_tokens_give_permuted_outputs_without_positions() -> None:
    network = tiny(depth=3)
    scramble_(network)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    tokens, c = torch.randn(2, 24, 32), torch.randn(2, 32)
    torch.testing.assert_close(network.encode(tokens[:, order], c), network.encode(tokens, c)[:, order])
