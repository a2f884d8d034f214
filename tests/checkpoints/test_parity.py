"""Imported networks compute what their authors' do: on the files' own tensors, from the formulas, and by diffusers."""

import official
import pytest
import torch
from official import CLASSES, L2, LATENTS, S2, S4, Mask, Reference

import sddit
from sddit.api import import_weights
from sddit.diffusion.guidance import guided, power_cosine
from sddit.models import masking

T, Y = torch.tensor([0, 250, 999]), torch.tensor([1, 7, CLASSES])
X = torch.randn(3, *LATENTS, generator=torch.Generator().manual_seed(2))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

CASES = [
    ("dit", S2, 0),
    ("dit", S4, 0),
    ("maskdit", S2, 1),
    ("maskdit", S4, 2),
    ("maskdit without token", S2, 1),
    ("mdt1", S2, 1),
    ("mdt1", L2, 2),
    ("mdt1", S4, 1),
    ("mdt2", L2, 2),
    ("mdt2", L2, 1),
    ("mdt2", L2 | {"patch": 4}, 2),
]


def level(project):
    """What the time embedder sees: steps, or ln(σ)/4."""
    return torch.tensor([-1.55, 0.1, 1.09]) if project == "maskdit" else T


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]['width']}-{case[1]['patch']}-{case[2]}")
def pair(request, tmp_path):
    """(project, reference, our network) with the same weights."""
    name, size, decoder = request.param
    project, _, without = name.partition(" ")
    state = official.weights(project, **size, decoder=decoder, mask_token=not without)
    torch.save(state, tmp_path / "theirs.pt")
    options = {"decoder_layers": decoder} if project == "mdt1" else {}
    import_weights(tmp_path / "theirs.pt", project.rstrip("12"), tmp_path / "ours", **options)
    reference = Reference(project, state, size["heads"], size["patch"], decoder)
    return project, reference, sddit.load_network(tmp_path / "ours")


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_all_tokens(pair, training):
    project, reference, network = pair
    expected = reference(X, level(project), Y)
    assert expected.std() > 0.1
    torch.testing.assert_close(network.train(training)(X, level(project).float(), Y), expected, **CLOSE)


@torch.no_grad()
def test_visible_tokens(pair):
    project, reference, network = pair
    if project == "dit":
        return
    n = (LATENTS[1] // reference.patch) ** 2
    mask = Mask(3, n, n // 2)
    expected = reference(X, level(project), Y, mask)
    ours = network.train()(X, level(project).float(), Y, masking.Mask(mask.keep, mask.restore, mask.removed))
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert not torch.allclose(expected, reference(X, level(project), Y), atol=1e-2)


@torch.no_grad()
def test_guidance(pair):
    """On three channels by a constant (DiT), on all four (MaskDiT), on three by a power-cosine of t (MDT)."""
    project, reference, network = pair
    y, null, t = torch.tensor([1, 7, 3]), torch.full((3,), CLASSES), 400
    levels = torch.full((3,), 0.3) if project == "maskdit" else torch.full((3,), t)
    c, u = reference(X, levels, y), reference(X, levels, null)
    scale = {"dit": 1.5, "maskdit": 1.5}.get(
        project, 1 + 2.8 * 0.5 * (1 - torch.cos(torch.tensor(torch.pi * (1 - t / 1000) ** 4)))
    )
    channels = 4 if project == "maskdit" else 3
    expected = torch.cat([(u + scale * (c - u))[:, :channels], c[:, channels:]], 1)

    rule = (lambda step: power_cosine(step, 1000, 3.8, 4.0)) if project.startswith("mdt") else (lambda _: 1.5)
    ours = guided(lambda x, noise, labels: network(x, noise.float(), labels), y, CLASSES, rule, channels)
    torch.testing.assert_close(ours(X, 0.3 if project == "maskdit" else t), expected, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def transformer_class():
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return DiTTransformer2DModel


@pytest.fixture(params=[S2, S4], ids=["S/2", "S/4"])
def with_diffusers(request, tmp_path, transformer_class):
    """(their network, ours from its folder, ours from the file of DiT) with the same weights."""
    size = request.param
    state = official.weights("dit", **size)
    theirs = transformer_class(
        num_attention_heads=size["heads"],
        attention_head_dim=size["width"] // size["heads"],
        out_channels=8,
        num_layers=size["depth"],
        sample_size=LATENTS[1],
        patch_size=size["patch"],
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    theirs.load_state_dict(official.as_diffusers(state, size["depth"]))
    theirs.save_pretrained(tmp_path / "transformer")
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's frequencies
    torch.save(state, tmp_path / "theirs.pt")
    import_weights(tmp_path / "transformer", "diffusers", tmp_path / "a")
    import_weights(tmp_path / "theirs.pt", "dit", tmp_path / "b")
    return theirs, sddit.load_network(tmp_path / "a"), sddit.load_network(tmp_path / "b")


@torch.no_grad()
def test_diffusers_computes_the_same(with_diffusers):
    theirs, from_diffusers, from_dit = with_diffusers
    expected = theirs.eval()(X, timestep=T, class_labels=Y).sample
    torch.testing.assert_close(from_diffusers(X, T.float(), Y), expected, **CLOSE)
    torch.testing.assert_close(from_dit(X, T.float(), Y), expected, **CLOSE)


def test_diffusers_trains_the_same(with_diffusers):
    """Gradients too. In training its embedders drop labels by themselves, each block anew: here all or none."""
    theirs, ours, _ = with_diffusers
    embedders = [block.norm1.emb.class_embedder for block in theirs.train().transformer_blocks]
    for dropped, labels in ((0.0, Y), (1.0, torch.full_like(Y, CLASSES))):
        for embedder in embedders:
            embedder.dropout_prob = dropped
        inputs = [X.clone().requires_grad_() for _ in range(2)]
        expected = theirs(inputs[0], timestep=T, class_labels=Y).sample
        output = ours.train()(inputs[1], T.float(), labels)
        torch.testing.assert_close(output, expected, **CLOSE)
        expected.square().mean().backward()
        output.square().mean().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **CLOSE)


@torch.no_grad()
def test_what_diffusers_does_otherwise(with_diffusers):
    """Its frequencies, as they come: the export says so (should this fail, diffusers has changed: mend the README)."""
    theirs, ours, _ = with_diffusers
    for block in theirs.eval().transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    far = (theirs(X, timestep=T, class_labels=Y).sample - ours(X, T.float(), Y)).abs().amax(dim=(1, 2, 3))
    assert far[0] < 1e-5 and far[1:].min() > 1e-3  # all agree at t = 0


@torch.no_grad()
def test_guidance_of_the_pipeline(with_diffusers):
    """DiTPipeline guides all four channels, not three: eval.guidance_channels 'all' is its rule."""
    theirs, ours, _ = with_diffusers
    y, null = torch.tensor([1, 7, 3]), torch.full((3,), CLASSES)
    both = theirs.eval()(torch.cat([X, X]), timestep=torch.full((6,), 400), class_labels=torch.cat([y, null])).sample
    eps, rest = both[:, :4], both[:, 4:]
    c, u = eps.chunk(2)
    expected = torch.cat([u + 4.0 * (c - u), rest[:3]], 1)
    ev = guided(lambda x, noise, labels: ours(x, noise.float(), labels), y, CLASSES, lambda _: 4.0, 4)
    torch.testing.assert_close(ev(X, 400), expected, **CLOSE)
