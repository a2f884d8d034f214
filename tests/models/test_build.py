"""`build_network`: sizes from the experiment, weights from its seed."""

import pytest
import torch

from sddit import cost, presets
from sddit.errors import UsageError
from sddit.models import build_network
from sddit.models.sddit import SDDiT

# methods.md §1.4 and §6.3: (method, size) → total, trainable; of MDT v2 with its decoder layers.
COUNTS: dict[tuple[str, str], tuple[int, int]] = {
    ("dit", "S/2"): (32_963_360, 32_865_056), ("dit", "S/4"): (32_945_024, 32_920_448),
    ("dit", "S/8"): (33_148_160, 33_142_016), ("dit", "B/2"): (130_512_416, 130_315_808),
    ("dit", "B/4"): (130_475_648, 130_426_496), ("dit", "B/8"): (130_881_536, 130_869_248),
    ("dit", "L/2"): (458_102_816, 457_840_672), ("dit", "L/4"): (458_053_760, 457_988_224),
    ("dit", "L/8"): (458_594_816, 458_578_432), ("dit", "XL/2"): (675_129_632, 674_834_720),
    ("dit", "XL/4"): (675_074_432, 675_000_704), ("dit", "XL/8"): (675_683_072, 675_664_640),
    ("maskdit", "S/2"): (68_346_256, 68_116_880), ("maskdit", "B/2"): (175_909_648, 175_581_968),
    ("maskdit", "L/2"): (510_176_272, 509_783_056), ("maskdit", "XL/2"): (730_541_200, 730_115_216),
    ("maskdit", "H/2"): (1_010_002_192, 1_009_543_440), ("maskdit", "S/4"): (68_217_280, 68_159_936),
    ("maskdit", "B/4"): (175_725_376, 175_643_456), ("maskdit", "XL/4"): (730_301_632, 730_195_136),
    ("maskdit", "S/8"): (68_346_496, 68_332_160), ("maskdit", "B/8"): (175_909_888, 175_889_408),
    **{("mdt", size): (count, count) for size, count in {
        "S/2": 35_797_208, "B/2": 141_488_528, "L/2": 477_641_312, "XL/2": 699_778_144, "S/4": 35_647_736,
        "B/4": 141_189_488, "XL/4": 699_160_256, "S/8": 35_818_712, "B/8": 141_531_056, "XL/8": 699_631_936,
        "L/4": 477_101_248, "L/8": 477_522_752}.items()},
    **{("mdt v2", size): (count, count) for size, count in {
        "S/2 6": 38_454_872, "S/2 4": 38_159_576, "B/2 4": 150_931_856, "B/2 6": 152_112_272, "L/2 4": 507_015_776,
        "XL/2 4": 742_263_904}.items()},
    ("sddit", "S/2"): (68_346_128, 68_116_752), ("sddit", "XL/2"): (730_541_840, 730_115_856),
}  # fmt: skip


@pytest.mark.parametrize(("method", "size"), COUNTS)
def test_parameter_counts(method: str, size: str) -> None:
    total, trainable = COUNTS[method, size]
    method, _, version = method.partition(" ")
    size, _, decoder_layers = size.partition(" ")
    experiment = presets.imagenet256(size, method)
    if version:
        experiment = experiment.replace({"method.version": version, "method.decoder_layers": int(decoder_layers)})
    with torch.device("meta"):
        parameters = list(build_network(experiment, (4, 32, 32), 1000).parameters())
    assert sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == trainable
    assert cost.num_parameters(experiment, (4, 32, 32), 1000)[0] == trainable


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
        (
            {"method.decoder": "last_blocks", "method.last_blocks": 2},
            (1, 8, 8),
            r"method.last_blocks is 2, but size 'S/2' has 2: leave one",
        ),
    ],
)
def test_sizes_that_do_not_fit(changes: dict, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(presets.digits().replace(changes), shape, 10)


@pytest.mark.parametrize(("version", "size", "layers", "most"), [("v1", "S/2", 2, 1), ("v2", "B/2", 2, 1)])
def test_a_decoder_that_leaves_no_encoder_does_not_fit(version: str, size: str, layers: int, most: int) -> None:
    changes = {"method.decoder_layers": layers, "method.version": version}
    with pytest.raises(UsageError, match=rf"decoder_layers is {layers}, but size .* MDT {version}.*Use at most {most}"):
        build_network(presets.digits(size, method="mdt").replace(changes), (1, 8, 8), 10)
