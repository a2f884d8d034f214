import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from sddit.data import open_manifest
from sddit.data.shards import Shards, write_shards
from sddit.errors import DataError, UsageError
from sddit.metrics import digits_cnn, fidelity
from sddit.metrics.features import get_extractor
from sddit.metrics.fidelity import evaluate_images, reference_moments, score
from sddit.metrics.statistics import Moments, frechet_distance

DIGITS = Shards(open_manifest("digits")).read(np.arange(1797))[0]  # (1797, 1, 8, 8)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _moments(images: np.ndarray) -> Moments:
    moments = Moments()
    moments.update(get_extractor("digits-cnn")(torch.from_numpy(images)))
    return moments


def test_equal_to_torch_fidelity_from_images_to_score():
    torch_fidelity.register_feature_extractor("sddit-digits-cnn", digits_cnn.DigitsCNN)

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(self.images[i])

    theirs = torch_fidelity.calculate_metrics(
        input1=Images(DIGITS[:500]),
        input2=Images(DIGITS),
        fid=True,
        feature_extractor="sddit-digits-cnn",
        cuda=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )["frechet_inception_distance"]
    ours = score(_moments(DIGITS[:500]), _moments(DIGITS))["eval/fid"]
    assert ours == pytest.approx(theirs, rel=1e-4)  # its means are float32


def test_reference_moments_are_those_of_all_images_and_kept(cache, monkeypatch):
    manifest, extractor = open_manifest("digits"), get_extractor("digits-cnn")
    first = reference_moments(manifest, extractor)
    assert first.count == 1797
    np.testing.assert_allclose(first.covariance(), _moments(DIGITS).covariance(), rtol=1e-5, atol=1e-5)
    (file,) = (cache / "reference").iterdir()
    assert file.suffix == ".npz"
    monkeypatch.setattr(fidelity, "_moments", None)  # computing again would fail
    assert np.array_equal(reference_moments(manifest, extractor).to_array(), first.to_array())


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_torn_reference_moments_are_computed_again(cache, keep):
    manifest, extractor = open_manifest("digits"), get_extractor("digits-cnn")
    first = reference_moments(manifest, extractor)
    (file,) = (cache / "reference").iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    assert np.array_equal(reference_moments(manifest, extractor).to_array(), first.to_array())
    assert len(os.listdir(cache / "reference")) == 1


def test_a_cache_that_cannot_be_written_costs_time_only(cache, caplog):
    manifest, extractor = open_manifest("digits"), get_extractor("digits-cnn")
    (cache / "reference").write_text("in the way")
    assert reference_moments(manifest, extractor).count == 1797
    assert "were not kept" in caplog.text


def test_moments_of_other_data_are_kept_apart(cache, tmp_path):
    extractor = get_extractor("digits-cnn")
    labels = np.zeros(300, dtype=np.int64)
    manifest = write_shards(DIGITS[:300], labels, tmp_path / "set", name="digits", num_classes=1)
    assert reference_moments(open_manifest("digits"), extractor).count == 1797
    assert reference_moments(manifest, extractor).count == 300


def test_evaluate_digits_against_digits():
    result = evaluate_images(DIGITS)
    assert result["fid"] == pytest.approx(0, abs=1e-3)
    assert result["protocol"] == "FID on digits-cnn features, 1,797 samples against 1,797 images"
    assert len(result["protocol_digest"]) == 12
    json.dumps(result)


def test_both_orders_of_the_axes_score_alike():
    first, last = evaluate_images(DIGITS[:600]), evaluate_images(DIGITS[:600].transpose(0, 2, 3, 1))
    assert first == last
    assert first["fid"] == pytest.approx(score(_moments(DIGITS[:600]), _moments(DIGITS))["eval/fid"], rel=1e-6)


def test_every_form_of_a_reference_scores_alike(tmp_path):
    images = DIGITS[:40]
    np.savez(tmp_path / "images.npz", images.transpose(0, 2, 3, 1))
    write_shards(images, np.zeros(40, dtype=np.int64), tmp_path / "set", name="some", num_classes=1)
    (tmp_path / "files").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / "files" / f"{i:03d}.png")
    results = [
        evaluate_images(DIGITS[100:200], str(tmp_path / form), "digits-cnn") for form in ("images.npz", "set", "files")
    ]
    assert len({result["fid"] for result in results}) == 1
    assert results[0]["protocol_digest"] == results[2]["protocol_digest"]  # the same images


def test_statistics_as_a_reference(tmp_path, monkeypatch):
    """ADM's reference files: `mu` and `sigma` of Inception features win over the few images beside them."""
    extractor = get_extractor("digits-cnn")
    samples, real = _moments(DIGITS[:300]), _moments(DIGITS[300:])
    path = tmp_path / "reference.npz"
    np.savez(path, DIGITS[:50].transpose(0, 2, 3, 1), mu=real.mean.astype(np.float32), sigma=real.covariance())

    extractor.name = "inception-v3-compat"  # as if: the rule goes by the name, and its weights do not ship
    read = fidelity._read_reference(path, extractor, (1, 8, 8))
    distance = frechet_distance(samples.mean, samples.covariance(), read.mean, read.covariance)
    assert distance == pytest.approx(score(samples, real)["eval/fid"], rel=1e-4)

    with_images = evaluate_images(DIGITS[:300], str(path), "digits-cnn")
    assert "against 50 images" in with_images["protocol"]

    np.savez(path, mu=real.mean, sigma=real.covariance())
    with pytest.raises(UsageError, match="has statistics of Inception features and no images, so it cannot serve"):
        evaluate_images(DIGITS[:300], str(path), "digits-cnn")


def test_one_image_is_too_few():
    with pytest.raises(UsageError, match="at least 2 images; there are 1"):
        evaluate_images(DIGITS[:1])


def test_images_of_another_size(tmp_path):
    larger = np.zeros((4, 16, 16, 1), dtype=np.uint8)
    with pytest.raises(UsageError, match="digits-cnn sees 8×8 grey images"):
        evaluate_images(larger)
    np.savez(tmp_path / "images.npz", larger)
    with pytest.raises(UsageError, match=r"The images are 8×8 with 1 channels, but the reference is 16×16"):
        evaluate_images(DIGITS[:4], str(tmp_path / "images.npz"), "digits-cnn")


def test_the_default_extractor_of_other_data_is_inception(cache, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((4, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match=r"eval.extractor is 'inception-v3-compat', but its weights are not in"):
        evaluate_images(np.zeros((4, 16, 16, 3), dtype=np.uint8), str(tmp_path / "images.npz"))


def test_a_reference_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="No data set at"):
        evaluate_images(DIGITS, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="No images at"):
        evaluate_images(DIGITS, str(tmp_path), "digits-cnn")
