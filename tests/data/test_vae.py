"""Latents: how they are made, stored, drawn and decoded, and what is refused."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from latents import SHAPE, pictures, write_both, write_vae

from sddit import seeding
from sddit.data import open_manifest
from sddit.data.sampler import BatchSampler
from sddit.data.shards import Shards
from sddit.data.vae import PART, Vae, check_vae, decoder_of, encoded, find_vae, read_vae
from sddit.errors import DataError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def vae(folder):
    return write_vae(folder / "vae", scaling_factor=0.7, shift_factor=0.1)


@pytest.fixture(scope="module")
def both(folder, vae):
    return write_both(folder, vae)


def test_encoding_is_the_posterior_of_diffusers_in_fixed_parts(vae):
    images, _ = pictures(PART + 5)
    ours = Vae(str(vae))
    moments = ours.encode(images)
    assert moments.shape == (PART + 5, 8, 8, 8) and moments.dtype == np.float16
    posterior = ours.model.encode(torch.from_numpy(images[:PART]).float() / 127.5 - 1).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], dim=1).half().numpy()
    assert np.array_equal(moments[:PART], expected)
    assert np.array_equal(ours.encode(images[:PART]), expected), "what comes after a part does not change it"


def test_decoding_undoes_the_scale(vae):
    ours = Vae(str(vae))
    z = torch.randn(3, 4, 8, 8)
    expected = ours.model.decode(z).sample
    assert torch.allclose(ours.decode((z - 0.1) * 0.7), expected, atol=1e-5)
    assert ours.decode(torch.empty(0, 4, 8, 8)).shape == (0, *SHAPE)


def test_a_batch_is_drawn_from_the_posterior_of_the_image_or_of_the_mirrored_image(vae, tmp_path):
    pixels, latents = write_both(tmp_path, vae, mirrored=True)
    assert latents.stored_shape == (16, 8, 8)
    sampler = BatchSampler(Shards(latents), seed=3, batch_size=12, flip=True)
    x0, y = sampler.batch(5, 0, 12)
    images, labels = Shards(pixels).read(sampler.indices(5, 0, 12))
    mirrored = seeding.uniform(3, "flip", 5, 0, 12) < 0.5
    assert 0 < mirrored.sum() < 12
    images[mirrored] = images[mirrored][..., ::-1]
    mean, std = np.split(Vae(str(vae)).encode(images).astype(np.float64), 2, axis=1)
    noise = seeding.normal(3, "posterior", 5, 0, 12, (4, 8, 8))
    assert np.allclose(x0, (mean + std * noise - 0.1) * 0.7, atol=1e-5) and np.array_equal(y, labels)
    assert x0.dtype == np.float32 and std.min() > 0
    parts = [sampler.batch(5, lo, lo + 4)[0] for lo in (0, 4, 8)]
    assert np.array_equal(np.concatenate(parts), x0), "any worker makes any slice"
    assert not np.array_equal(sampler.batch(6, 0, 12)[0], x0)
    straight, _ = BatchSampler(Shards(latents), seed=3, batch_size=12).batch(5, 0, 12)
    assert np.array_equal(straight[~mirrored], x0[~mirrored]) and not np.allclose(straight[mirrored], x0[mirrored])


def test_a_latent_is_never_mirrored_itself(both):
    with pytest.raises(UsageError, match=r"mirrored latent is not .*--mirrored .*data\.flip to false"):
        BatchSampler(Shards(both[1]), seed=0, batch_size=4, flip=True)


def test_the_manifest_knows_its_autoencoder(both, vae, tmp_path):
    pixels, latents = both
    assert (pixels.kind, latents.kind, latents.dtype) == ("pixels", "latents", "float16")
    assert latents.shape == (4, 8, 8) and latents.stored_shape == (8, 8, 8) and latents.image_shape == SHAPE
    assert "vae" not in json.loads((pixels.folder / "manifest.json").read_text())
    read = open_manifest(latents.folder)
    assert read == latents
    read.verify()

    def rewritten(**changes):
        copy = tmp_path / re.sub(r"\W", "", str(changes))
        shutil.copytree(latents.folder, copy)
        values = json.loads((copy / "manifest.json").read_text())
        values["vae"] |= changes
        (copy / "manifest.json").write_text(json.dumps(values))
        return copy

    assert open_manifest(rewritten(name="elsewhere")).digest == latents.digest
    for change in ({"digest": "0" * 64}, {"scaling_factor": 0.5}, {"shift_factor": 0.0}):
        with pytest.raises(DataError, match="contradicts itself"):
            open_manifest(rewritten(**change))


def test_what_an_autoencoder_must_be(vae, both, tmp_path, monkeypatch):
    info = both[1].vae
    check_vae(info, None)
    moved = shutil.copytree(vae, tmp_path / "moved")
    check_vae(info, str(moved))
    other = write_vae(tmp_path / "other", seed=1, scaling_factor=0.7, shift_factor=0.1)
    with pytest.raises(UsageError, match=r"another autoencoder than .*data\.vae, or prepare"):
        check_vae(info, str(other))
    rescaled = write_vae(tmp_path / "rescaled", scaling_factor=0.5, shift_factor=0.1)
    with pytest.raises(UsageError, match="another autoencoder"):
        check_vae(info, str(rescaled))
    gone = info.model_copy(update={"name": str(tmp_path / "gone")})
    with pytest.raises(UsageError, match=r"made with the autoencoder .*no folder .*data\.vae"):
        check_vae(gone, None)
    (moved / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no diffusion_pytorch_model\.safetensors"):
        Vae(str(moved))
    (other / "config.json").write_text('{"_class_name": "VQModel", "scaling_factor": 1.0}')
    with pytest.raises(UsageError, match="holds a VQModel"):
        Vae(str(other))
    with pytest.raises(UsageError, match=r"sides divisible by 2, but these are 3 × 15 × 16"):
        encoded(str(vae), (3, 15, 16))


def test_weights_are_digested_once_until_they_change(tmp_path, monkeypatch):
    folder = write_vae(tmp_path / "vae")
    digested = []
    digest_of = hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda *args: digested.append(1) or digest_of(*args))
    before = read_vae(str(folder))[1]
    assert read_vae(str(folder))[1] == before and len(digested) == 1
    write_vae(folder, seed=1)
    assert read_vae(str(folder))[1] != before and len(digested) == 2


def test_a_name_on_the_hub_says_how_to_fetch_it_where_there_is_no_internet(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UsageError, match=r"(?s)stabilityai/sd-vae-ft-ema .*hf download stabilityai/sd-vae-ft-ema .*give its path"
    ):
        find_vae("stabilityai/sd-vae-ft-ema")


def test_pixels_need_no_decoder():
    x = torch.randn(2, 3, 4, 4)
    assert decoder_of(None, None, "cpu")(x) is x
