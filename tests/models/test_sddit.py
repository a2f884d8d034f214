"""The generator of SD-DiT: counts of methods.md §6.3, zero start, and what each part can see (§12.2, §12.3)."""

import pytest
import torch
from steps import scramble_

from sddit.config import SIZE_GRIDS
from sddit.diffusion import edm
from sddit.models import masking
from sddit.models.layers import Encoder, keyed_init_
from sddit.models.sddit import SDDiT

COUNTS = {  # generator; encoder as the teacher copies it
    "S": (68_116_752, 32_557_056), "B": (175_582_224, 129_110_016), "L": (509_783_568, 455_708_672),
    "XL": (730_115_856, 672_141_312),
}  # fmt: skip
NOISE, Y = torch.tensor([-0.3, 0.8]), torch.tensor([3, 10])


@pytest.mark.parametrize("letter", COUNTS)
def test_parameter_counts(letter: str) -> None:
    with torch.device("meta"):
        network = SDDiT((4, 32, 32), 1000, *SIZE_GRIDS["paper"][letter], 2)
        encoder = Encoder((4, 32, 32), 1000, *SIZE_GRIDS["paper"][letter], 2, null_row=False, cls_std=0.02)
    trainable = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (network, encoder)]
    assert tuple(trainable) == COUNTS[letter]
    frozen = {name: p.numel() for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed": 256 * network.width, "decoder_pos_embed": 256 * 512}
    assert dict(network.named_parameters()).keys() >= dict(encoder.named_parameters()).keys()


@pytest.mark.parametrize(
    ("letter", "encoder_to_decoder", "decoder"),
    [("S", 492_800, 34_664_448), ("B", 1_574_912, 44_101_632), ("L", 2_624_000, 50_393_088),
     ("XL", 3_246_848, 53_538_816)],
)  # fmt: skip
def test_bridge_and_decoder_are_those_of_maskdit(letter: str, encoder_to_decoder: int, decoder: int) -> None:
    with torch.device("meta"):
        network = SDDiT((4, 32, 32), 1000, *SIZE_GRIDS["paper"][letter], 2)
    assert sum(p.numel() for p in network.bridge.parameters()) == encoder_to_decoder
    assert sum(p.numel() for p in network.decoder_blocks.parameters()) == decoder


def tiny(masked_slots: str = "noisy", scrambled: bool = True) -> SDDiT:
    network = SDDiT((1, 8, 8), 10, 2, 32, 4, 2, decoder_depth=2, decoder_width=16, decoder_heads=2,
                    masked_slots=masked_slots)  # type: ignore[arg-type]  # fmt: skip
    keyed_init_(network, 0)
    if scrambled:
        scramble_(network)
    return network


def run(network: SDDiT, x: torch.Tensor, ids_keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder output and F."""
    tokens, c = network.embed(x), network.condition(NOISE, Y)
    encoded = network.encode(tokens, c, ids_keep)
    return encoded, network.decode(encoded, tokens, c, ids_keep)


def some_mask(keep: int = 12) -> masking.Mask:
    return masking.random_mask(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)), keep)


@pytest.mark.parametrize("keep", [1, 8, 12, None])
@pytest.mark.parametrize("masked_slots", ["noisy", "zeros"])
def test_denoiser_is_c_skip_x_at_first(keep: int | None, masked_slots: str) -> None:
    network, x = tiny(masked_slots, scrambled=False), torch.randn(2, 1, 8, 8)
    encoded, output = run(network, x, some_mask(keep).ids_keep if keep else None)
    assert encoded.shape == (2, 1 + (keep or 16), 32)
    assert output.shape == x.shape and not output.any()
    sigma = torch.tensor([0.1, 5.0])
    skip = edm.coefficients(sigma, 0.5).skip[:, None, None, None]
    assert torch.equal(edm.denoise(network, x, sigma, Y, 0.5), skip * x)
    assert torch.equal(encoded[0, 0], encoded[1, 0])  # §12.4: [CLS] says nothing yet


def test_inference_keeps_all_tokens_and_cls() -> None:
    network, x = tiny(), torch.randn(2, 1, 8, 8)
    assert torch.equal(network(x, NOISE, Y), run(network, x, None)[1])
    # A mask that keeps everything differs in the order of the encoder's tokens alone.
    torch.testing.assert_close(run(network, x, some_mask(16).ids_keep)[1], run(network, x, None)[1])
    with torch.no_grad():
        before = network(x, NOISE, Y)
        network.cls.add_(torch.randn(32))
        assert (network(x, NOISE, Y) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("masked_slots", "leaks"), [("noisy", True), ("zeros", False)])
def test_removed_tokens_reach_the_decoder_alone(masked_slots: str, leaks: bool) -> None:
    network, x, mask = tiny(masked_slots), torch.randn(2, 1, 8, 8), some_mask()
    removed = mask.removed.view(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    (encoded, output), (encoded2, output2) = (run(network, v, mask.ids_keep) for v in (x, x + removed))
    assert torch.equal(encoded, encoded2)
    assert bool((output - output2).abs().max() > 1e-3) == leaks
    assert torch.equal(output, output2) != leaks
    changed = run(network, x + 1 - removed, mask.ids_keep)
    assert (changed[0] - encoded).abs().max() > 1e-3


def test_permuted_tokens_give_permuted_outputs_without_positions() -> None:
    network = tiny()
    with torch.no_grad():
        network.decoder_pos_embed.zero_()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    encoded, permuted = network.encode(tokens, c), network.encode(tokens[:, order], c)
    torch.testing.assert_close(permuted[:, 0], encoded[:, 0])
    torch.testing.assert_close(permuted[:, 1:], encoded[:, 1:][:, order])
    patches = [
        network.decode(e, t, c).unfold(2, 2, 2).unfold(3, 2, 2).reshape(2, 16, 4)
        for e, t in ((encoded, tokens), (permuted, tokens[:, order]))
    ]
    torch.testing.assert_close(patches[1], patches[0][:, order])
