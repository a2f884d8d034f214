"""`sddit export`: what comes back is bit for bit what went out, and diffusers loads it."""

import json
import sys

import official
import pytest
import torch
from official import CLASSES, LATENTS, S2
from safetensors.torch import load_file
from steps import scramble_

import sddit
from sddit import cli, presets
from sddit.api import export_weights, import_weights
from sddit.config import Experiment
from sddit.errors import CheckpointError, UsageError
from sddit.models import build_network
from sddit.training.store import SAMPLING, TRAINING, CheckpointStore, read_checkpoint


def checkpoint(tmp_path, experiment, shape, num_classes=CLASSES):
    """One as training leaves it, with random weights. Returns its folder."""
    network = build_network(experiment, shape, num_classes)
    scramble_(network, 0.05)
    values = {"experiment": experiment.model_dump(mode="json"), "shape": shape, "num_classes": num_classes}
    groups = {SAMPLING: network.state_dict(), TRAINING: {"step": torch.tensor(5)}}
    return CheckpointStore(tmp_path / "cell").save(5, groups, values)


def dit(tmp_path, size="S/2", shape=LATENTS, **changes):
    experiment = presets.imagenet256(size, "dit").replace({"model.grid": "tiny", **changes})
    return checkpoint(tmp_path, experiment, shape)


def same(first, second):
    """Two checkpoints' sampling weights."""
    a, b = (read_checkpoint(c).load(SAMPLING) for c in (first, second))
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


EXPERIMENTS = {
    "dit": presets.digits(method="dit"),
    "dit edm": presets.digits(method="dit").replace({"diffusion.kind": "edm"}),
    "maskdit": presets.digits(method="maskdit"),
    "mdt": presets.digits("L/2", method="mdt"),
    "mdt v2": presets.digits("L/2", method="mdt").replace({"method.version": "v2", "method.decoder_layers": 2}),
    "sddit": presets.digits(),
    "sddit last blocks": presets.digits("L/2").replace({"method.decoder": "last_blocks"}),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_safetensors_and_back(tmp_path, name):
    before = checkpoint(tmp_path, EXPERIMENTS[name], (1, 8, 8))
    assert export_weights(before, tmp_path / "e") == "safetensors"
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["config.json", "model.safetensors"]
    assert import_weights(tmp_path / "e", "sddit", tmp_path / "i") == EXPERIMENTS[name]
    assert same(before, tmp_path / "i")
    values = [read_checkpoint(c).values for c in (before, tmp_path / "i")]
    assert all(values[0][k] == values[1][k] for k in values[0])


@pytest.mark.parametrize("size", ["S/2", "B/4", "L/1"])
def test_diffusers_and_back(tmp_path, size):
    before = dit(tmp_path, size, **{"diffusion.timesteps": 500, "diffusion.beta_end": 0.03})
    assert export_weights(before, tmp_path / "e") == "diffusers"
    experiment = import_weights(tmp_path / "e", "diffusers", tmp_path / "i")
    assert same(before, tmp_path / "i")
    values = [read_checkpoint(c).values for c in (before, tmp_path / "i")]
    assert values[0]["shape"] == values[1]["shape"] and values[0]["num_classes"] == values[1]["num_classes"]
    trained = Experiment.parse(values[0]["experiment"])
    assert (experiment.model, experiment.diffusion) == (trained.model, trained.diffusion)


def test_what_was_imported_goes_out_as_it_came(tmp_path):
    state = official.weights("dit", **S2)
    torch.save(state, tmp_path / "w.pt")
    import_weights(tmp_path / "w.pt", "dit", tmp_path / "i")
    export_weights(tmp_path / "i", tmp_path / "e")
    theirs = load_file(tmp_path / "e" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = official.as_diffusers(state, S2["depth"])
    assert theirs.keys() == expected.keys() and all(torch.equal(theirs[k], expected[k]) for k in theirs)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A VAE of four latent channels that halves the sides."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **blocks).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("inside", [True, False])
@torch.no_grad()
def test_diffusers_loads_the_pipeline(tmp_path, vae, inside, capsys, monkeypatch):
    from diffusers import AutoencoderKL, DiTPipeline

    before = dit(tmp_path)
    flags = ["--vae", str(vae)] if inside else []
    monkeypatch.setattr(sys, "argv", ["sddit", "export", str(before), "--out", str(tmp_path / "e"), *flags])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    readme = (tmp_path / "e" / "README.md").read_text()
    assert ("It has no VAE" in said) == ("The folder has no VAE" in readme) == (not inside)
    assert f"which in this model is {CLASSES}. So it cannot guide" in readme

    extra = {} if inside else {"vae": AutoencoderKL.from_pretrained(vae)}
    pipe = DiTPipeline.from_pretrained(tmp_path / "e", **extra)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)

    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(2, *LATENTS), torch.tensor([3, 900]), torch.tensor([4, CLASSES])
    expected = sddit.load_network(before)(x, t.float(), y)
    torch.testing.assert_close(pipe.transformer(x, t, y).sample, expected, atol=1e-5, rtol=1e-5)


def test_refused(tmp_path, vae):
    latents = dit(tmp_path)
    digits = checkpoint(tmp_path / "d", presets.digits(), (1, 8, 8))
    pixels = checkpoint(tmp_path / "p", presets.digits(method="dit"), (1, 8, 8))
    (tmp_path / "here").mkdir()
    for source, out, options, message in [
        (latents, "here", {}, "here exists, and nothing is overwritten"),
        (digits, "e", {"form": "diffusers"}, "unlike sddit. Use --format safetensors"),
        (digits, "e", {"vae": str(vae)}, "--vae is for a diffusers pipeline alone"),
        (pixels, "e", {"form": "diffusers", "vae": str(vae)}, "latents of 4 channels, but the model makes 1"),
        (latents, "e", {"vae": str(tmp_path / "here")}, "here is not a diffusers AutoencoderKL"),
        (latents, "e", {"vae": str(tmp_path / "nowhere")}, "There is no folder .*nowhere"),
        (checkpoint(tmp_path / "q", presets.digits(method="dit").replace({"diffusion.kind": "edm"}), (4, 8, 8)),
         "e", {"form": "diffusers"}, "noise process 'iddpm', and this is 'edm'"),
        (dit(tmp_path / "o", shape=(4, 8, 16)), "e", {"form": "diffusers"}, "square latents alone, .* 8×16"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            export_weights(source, tmp_path / out, **options)
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        export_weights(tmp_path / "none", tmp_path / "e")
    assert not (tmp_path / "e").exists() and not list((tmp_path / "here").iterdir())


def test_an_export_that_was_changed_is_refused(tmp_path):
    before = checkpoint(tmp_path, presets.digits(), (1, 8, 8))
    export_weights(before, tmp_path / "e")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    for change, message in [
        ({"shape": [1, 8]}, "not what `sddit export` writes"),
        ({"experiment": {"method": {"name": "dit"}}}, "does not hold exactly the tensors"),
        ({"num_classes": 11}, r"class_embed\.table is \(10, 64\), not \(11, 64\)"),
    ]:
        (tmp_path / "e" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            import_weights(tmp_path / "e", "sddit", tmp_path / "i")
    (tmp_path / "e" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        import_weights(tmp_path / "e", "sddit", tmp_path / "i")
    assert not (tmp_path / "i").exists()
