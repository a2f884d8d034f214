"""An experiment on latents from end to end: trained, resumed, sampled, decoded, scored against pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from latents import CLASSES, SHAPE, write_both, write_vae

import sddit
from sddit import presets
from sddit.data.sampler import as_network_sees
from sddit.data.shards import Shards
from sddit.data.vae import Vae
from sddit.errors import UsageError
from sddit.metrics import reference
from sddit.metrics.check import check_evaluation
from sddit.metrics.protocol import Protocol
from sddit.metrics.reference import content_digest

EXTRACTOR = "efficientnet-lite0"
TINY = {
    "data.hold_out": 0.25,
    "train.steps": 4,
    "train.batch_size": 8,
    "eval.every": 2,
    "eval.samples": 24,
    "eval.nfe": 3,
    "eval.grid": 4,
    "eval.extractor": EXTRACTOR,
    "eval.final": ("probe", "copying", "denoising"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    vae = write_vae(folder / "vae")
    pixels, latents = write_both(folder, vae)
    places = {"data.path": str(latents.folder), "eval.reference": str(pixels.folder)}
    experiment = presets.digits(method="sddit").replace({**TINY, **places, "method.collapse_after": 0})
    return folder, vae, pixels, latents, experiment


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{folder}/mlflow.db"
    first = sddit.train(world[-1].replace({"train.steps": 2}), tracking_uri=uri, storage=folder)
    return first, sddit.train(world[-1], tracking_uri=uri, storage=folder), uri


def test_it_trains_resumes_and_records_how_it_was_scored(world, trained):
    _, _, pixels, latents, _ = world
    first, second, uri = trained
    assert (first.step, second.step) == (2, 4) and first.identity == second.identity
    table = sddit.load_results("train", uri)
    assert list(table["step"]) == [2, 4] and np.isfinite(table["eval/fid"]).all()
    expected = Protocol.from_experiment(
        world[-1],
        pixels.digest,
        sddit_extractor_digest(),
        decoder=latents.vae.digest,
        reference_images=pixels.count,
    )
    assert set(table["protocol"]) == {expected.digest}
    assert np.isfinite(second.metrics["copying/ratio"]) and "probe/accuracy_sigma_0.1" in second.metrics


def sddit_extractor_digest():
    from sddit.metrics.features import extractor_digest

    return extractor_digest(EXTRACTOR)


def test_samples_are_decoded_images(world, trained):
    checkpoint = trained[1].checkpoint
    images = sddit.sample(checkpoint, list(range(CLASSES)) * 2)
    assert images.shape == (8, *SHAPE[1:], 3) and images.dtype == np.uint8 and images.std() > 0
    scores = sddit.evaluate(checkpoint, str(world[2].folder), EXTRACTOR)
    assert scores["fid"] == pytest.approx(trained[1].metrics["eval/fid"], rel=1e-4), "the loop's own score"


def test_an_autoencoder_that_has_moved_is_named_and_another_is_refused(world, trained, tmp_path):
    _, vae, *_ = world
    checkpoint = trained[1].checkpoint
    images = sddit.sample(checkpoint, [0, 1])
    moved = tmp_path / "moved"
    shutil.move(vae, moved)
    try:
        with pytest.raises(UsageError, match=r"Say where it is with data\.vae"):
            sddit.sample(checkpoint, [0, 1])
        assert np.array_equal(sddit.sample(checkpoint, [0, 1], vae=str(moved)), images)
        with pytest.raises(UsageError, match="another autoencoder"):
            sddit.sample(checkpoint, [0, 1], vae=str(write_vae(tmp_path / "other", seed=5)))
    finally:
        shutil.move(moved, vae)


def test_reconstructions_look_like_the_images(world):
    """With random weights nothing does; what is tested is that decoding the stored mean is the autoencoder's own."""
    _, vae, pixels, latents, _ = world
    ours = Vae(str(vae))
    stored, _ = Shards(latents).read(np.arange(4))
    images, _ = Shards(pixels).read(np.arange(4))
    x = torch.from_numpy(images).float() / 127.5 - 1
    expected = ours.model.decode(ours.model.encode(x).latent_dist.mean).sample
    assert torch.allclose(ours.decode(torch.from_numpy(as_network_sees(stored, latents.vae))), expected, atol=2e-2)


def test_identity_is_of_contents_not_of_places(world, tmp_path):
    _, _, pixels, latents, experiment = world
    here = experiment.identity(content_digest(experiment, latents))
    copy = shutil.copytree(pixels.folder, tmp_path / "elsewhere")
    moved = experiment.replace({"eval.reference": str(copy), "data.vae": "anywhere"})
    assert moved.identity(content_digest(moved, latents)) == here
    other = experiment.replace({"eval.reference": "digits"})
    assert other.identity(content_digest(other, latents)) != here


def test_a_plan_reads_the_images_of_a_reference_once(world, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures.npz"
    images = Shards(world[2]).read(np.arange(20))[0].transpose(0, 2, 3, 1)
    np.savez(pictures, images)
    read = []
    digest_of = reference._digest_of
    monkeypatch.setattr(reference, "_digest_of", lambda images: read.append(1) or digest_of(images))
    experiment = world[-1].replace({"eval.reference": str(pictures)})
    digests = {content_digest(experiment.replace({"seed": seed}), world[3]) for seed in range(3)}
    assert len(digests) == len(read) == 1
    np.savez(pictures, images[:10])
    assert content_digest(experiment, world[3]) not in digests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.reference": None}, r"holds latents, .* Set eval\.reference"),
        ({"eval.reference": "digits"}, r"16×16 with 3 channels, but the reference is 8×8"),
        ({"eval.extractor": "digits-cnn"}, r"digits-cnn sees 8×8 grey images"),
        ({"data.vae": "nowhere/at-all/x"}, r"There is no folder nowhere/at-all/x"),
    ],
)
def test_what_cannot_be_scored_is_said_before_training(world, changes, message):
    with pytest.raises(UsageError, match=message):
        check_evaluation(world[-1].replace(changes), world[3])


def test_a_checkpoint_of_latents_without_autoencoder_asks_for_it(trained, world, tmp_path):
    folder = shutil.copytree(trained[1].checkpoint, tmp_path / "step-00000004")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["values"].pop("vae")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"makes latents \(4, 8, 8\) .*--vae"):
        sddit.sample(folder, [0])
    assert sddit.sample(folder, [0], vae=str(world[1])).shape == (1, 16, 16, 3)
