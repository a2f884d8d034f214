"""From images to scores."""

import json
import os
from itertools import pairwise
from pathlib import Path

import adm
import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sddit.data import open_manifest
from sddit.data.shards import Shards, write_shards
from sddit.errors import DataError, UsageError
from sddit.metrics import digits_cnn, reference
from sddit.metrics.features import get_extractor
from sddit.metrics.fidelity import Tally, evaluate_images, score
from sddit.metrics.images import Images, open_images
from sddit.metrics.protocol import METRICS
from sddit.metrics.reference import of_manifest

DIGITS = Shards(open_manifest("digits")).read(np.arange(1797))[0]  # (1797, 1, 8, 8)
ALL = tuple(METRICS)
EXTRACTOR = get_extractor("digits-cnn", metrics=ALL)


@pytest.fixture(scope="module")
def real():
    return of_manifest(open_manifest("digits")).load(EXTRACTOR, ALL)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _layers(images) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in EXTRACTOR.layers(torch.from_numpy(images)).items()}


def _seen(images, shares=1, batch=64, metrics=ALL) -> Tally:
    """What `shares` workers have seen of the images, merged."""
    ends = [len(images) * i // shares for i in range(shares + 1)]
    tallies = []
    for lo, hi in pairwise(ends):
        tallies.append(Tally(EXTRACTOR, metrics))
        for start in range(lo, hi, batch):
            tallies[-1].update(torch.from_numpy(images[start : min(start + batch, hi)]), start)
    for other in tallies[1:]:
        tallies[0].merge(other.to_arrays())
    return tallies[0]


# -------------------------------------------------------------------------------------------------- against formulas


def test_every_score_by_an_independent_formula(real):
    noise = np.random.default_rng(0).integers(0, 90, (700, 1, 8, 8))
    images = np.clip(DIGITS[:700].astype(int) + noise, 0, 255).astype(np.uint8)
    found, samples, all_real = score(_seen(images), real), _layers(images), _layers(DIGITS)
    assert list(found) == list(ALL)
    assert found["fid"] == pytest.approx(adm.frechet(samples["features"], all_real["features"]), rel=1e-6)
    assert found["sfid"] == pytest.approx(adm.frechet(samples["spatial"], all_real["spatial"]), rel=1e-6)
    assert found["is"] == pytest.approx(adm.inception_score(samples["logits"]), rel=1e-6)
    both = adm.precision_and_recall(samples["features"], all_real["features"])
    assert (found["precision"], found["recall"]) == both and 0.05 < both[0] < 0.95 and 0.05 < both[1] < 0.95
    # 700 of 700 samples against 700 of 1,797 images, a hundred times
    assert found["kid"] == pytest.approx(adm.kernel_distance(samples["features"], all_real["features"]), rel=0.05)


def test_equal_to_torch_fidelity_from_images_to_score(real):
    class Registered(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)
            self.forward = digits_cnn.DigitsCNN(name, features_list).forward

        get_provided_features_list = staticmethod(digits_cnn.DigitsCNN.get_provided_features_list)
        get_default_feature_layer_for_metric = staticmethod(digits_cnn.DigitsCNN.get_default_feature_layer_for_metric)

    torch_fidelity.register_feature_extractor("sddit-digits-cnn", Registered)

    class Folder(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(self.images[i])

    theirs = torch_fidelity.calculate_metrics(
        input1=Folder(DIGITS[:500]),
        input2=Folder(DIGITS),
        fid=True,
        isc=True,
        prc=True,
        kid=True,
        isc_splits=1,
        kid_subset_size=500,
        samples_shuffle=False,
        feature_extractor="sddit-digits-cnn",
        cuda=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )
    ours = score(_seen(DIGITS[:500]), real)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)  # its means are float32
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(4, 90), shares=st.integers(1, 4), batch=st.integers(1, 50))
def test_any_shares_and_batches_score_alike(real, n, shares, batch):
    metrics = tuple(metric for metric in ALL if metric != "kid")  # seconds each; it sees what precision sees
    expected = score(_seen(DIGITS[:n], metrics=metrics), real)
    found = score(_seen(DIGITS[:n], shares, batch, metrics), real)
    for metric in metrics:  # features of other batches differ by their rounding
        assert found[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-4), metric


def test_memory_grows_with_the_samples_only_for_those_that_need_features():
    def size(metrics, n):
        return sum(array.nbytes for array in _seen(DIGITS[:n], metrics=metrics).to_arrays().values())

    assert size(("fid", "sfid", "is"), 100) == size(("fid", "sfid", "is"), 1000)
    for metric in ("precision", "recall", "kid"):
        assert size((metric,), 1000) == 1000 * 4 * EXTRACTOR.dim


# ------------------------------------------------------------------------------------------------------ evaluate_images


def test_evaluate_digits_against_digits():
    result = evaluate_images(DIGITS)
    assert result["fid"] == pytest.approx(0, abs=1e-3)
    assert result["protocol"] == "FID on digits-cnn features, 1,797 samples against 1,797 images"
    assert len(result["protocol_digest"]) == 12
    json.dumps(result)


def test_what_was_recorded_before_other_metrics_came():
    """FID alone is computed as ever, and its protocol is the same one."""
    result = evaluate_images(DIGITS[:600])
    assert result["fid"] == pytest.approx(9.945931111831214, rel=1e-6)
    assert result["protocol_digest"] == "cb22b41eb5f0"


def test_any_metrics_in_the_order_asked(real):
    result = evaluate_images(DIGITS[:300], metrics=["recall", "fid", "is"])
    assert list(result) == ["recall", "fid", "is", "protocol", "protocol_digest"]
    assert result["fid"] == pytest.approx(evaluate_images(DIGITS[:300])["fid"], rel=1e-9)
    assert result["protocol"].startswith("recall, FID, IS on digits-cnn features, 300 samples")
    assert result["protocol_digest"] == evaluate_images(DIGITS[:300])["protocol_digest"], "FIDs may be compared"


def test_both_orders_of_the_axes_score_alike():
    assert evaluate_images(DIGITS[:600]) == evaluate_images(DIGITS[:600].transpose(0, 2, 3, 1))


def test_every_form_of_samples_and_reference_scores_alike(tmp_path):
    images, samples = DIGITS[:40], DIGITS[100:200]
    np.savez(tmp_path / "images.npz", images.transpose(0, 2, 3, 1))
    np.savez_compressed(tmp_path / "samples.npz", samples)
    write_shards(images, np.zeros(40, dtype=np.int64), tmp_path / "set", name="some", num_classes=1)
    (tmp_path / "files").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / "files" / f"{i:03d}.png")
    metrics = ("fid", "sfid", "is", "precision", "recall")
    results = [
        evaluate_images(given, str(tmp_path / form), "digits-cnn", metrics)
        for form in ("images.npz", "set", "files")
        for given in (samples, open_images(tmp_path / "samples.npz"))
    ]
    assert all(result == results[0] for result in results if result["protocol_digest"] == results[0]["protocol_digest"])
    for metric in metrics:
        assert len({result[metric] for result in results}) == 1
    assert results[0]["protocol_digest"] == results[4]["protocol_digest"]  # the same images


def test_images_are_not_held_in_memory():
    """Ten times the digits, of which a batch exists at a time."""

    def batches(size):
        for _ in range(10):
            yield from (DIGITS[lo : lo + size] for lo in range(0, len(DIGITS), size))

    result = evaluate_images(Images("many", 17_970, (1, 8, 8), batches), metrics=("fid", "is"))
    assert "17,970 samples" in result["protocol"]
    assert result["is"] == pytest.approx(adm.inception_score(np.tile(_layers(DIGITS)["logits"], (10, 1))), rel=1e-5)


def test_statistics_as_a_reference(tmp_path):
    """ADM's files have images for other extractors, too."""
    layers = _layers(DIGITS[300:])["features"]
    path = tmp_path / "reference.npz"
    np.savez(path, DIGITS[:50].transpose(0, 2, 3, 1), mu=layers.mean(0), sigma=np.cov(layers, rowvar=False))
    assert "against 50 images" in evaluate_images(DIGITS[:300], str(path), "digits-cnn")["protocol"]
    np.savez(path, mu=layers.mean(0), sigma=np.cov(layers, rowvar=False))
    with pytest.raises(UsageError, match="has statistics of Inception features and no images, so it cannot serve"):
        evaluate_images(DIGITS[:300], str(path), "digits-cnn")


# ----------------------------------------------------------------------------------------------------- before any work


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be computed."""
    monkeypatch.setattr(reference, "_compute", None)
    monkeypatch.setattr(Tally, "update", None)


def test_too_few_images(no_work):
    with pytest.raises(UsageError, match="FID needs at least 2 images; there are 1"):
        evaluate_images(DIGITS[:1])
    with pytest.raises(UsageError, match="recall needs at least 4 images; there are 3"):
        evaluate_images(DIGITS[:3], metrics=("fid", "recall"))


def test_images_of_another_size(tmp_path, no_work):
    larger = np.zeros((4, 16, 16, 1), dtype=np.uint8)
    with pytest.raises(UsageError, match="digits-cnn sees 8×8 grey images"):
        evaluate_images(larger)
    np.savez(tmp_path / "images.npz", larger)
    with pytest.raises(UsageError, match=r"The images are 8×8 with 1 channels, but the reference is 16×16"):
        evaluate_images(DIGITS[:4], str(tmp_path / "images.npz"), "digits-cnn")


def test_metrics_that_the_extractor_or_the_reference_cannot_serve(tmp_path, no_work):
    with pytest.raises(UsageError, match="Unknown metric 'fdi'"):
        evaluate_images(DIGITS, metrics=("fdi",))
    with pytest.raises(UsageError, match="sFID cannot be computed with vgg16"):
        evaluate_images(DIGITS, extractor="vgg16", metrics=("sfid",))
    np.savez(tmp_path / "images.npz", DIGITS[:3].transpose(0, 2, 3, 1))
    with pytest.raises(UsageError, match="precision needs at least 4 images; there are 3 reference images"):
        evaluate_images(DIGITS, str(tmp_path / "images.npz"), "digits-cnn", ("precision",))


def test_the_default_extractor_of_other_data_is_inception(cache, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((4, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match=r"eval.extractor is 'inception-v3-compat', but its weights are not in"):
        evaluate_images(np.zeros((4, 16, 16, 3), dtype=np.uint8), str(tmp_path / "images.npz"))


def test_a_reference_that_is_not_there(tmp_path, no_work):
    with pytest.raises(DataError, match="No data set at"):
        evaluate_images(DIGITS, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="No images at"):
        evaluate_images(DIGITS, str(tmp_path), "digits-cnn")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"cannot be read as an .npz"):
        evaluate_images(DIGITS, str(tmp_path / "torn.npz"), "digits-cnn")


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.skipif(
    "SDDIT_TEST_CIFAR10" not in os.environ, reason="SDDIT_TEST_CIFAR10 names no folder with CIFAR-10's parquet files"
)
def test_real_images_by_a_real_network(tmp_path):
    """CIFAR-10's test images against its training images, in ImageNet features that come as a Python package."""
    import io

    import pyarrow.parquet

    folder, counts = Path(os.environ["SDDIT_TEST_CIFAR10"]), {"test": 1000, "train": 2000}
    for part, count in counts.items():
        table = pyarrow.parquet.read_table(folder / f"{part}.parquet", columns=["image"])["image"][:count].to_pylist()
        images = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table])
        np.savez(tmp_path / f"{part}.npz", images)
    name, metrics = "efficientnet-lite0", ("fid", "is", "precision", "recall", "kid")
    real = evaluate_images(open_images(tmp_path / "test.npz"), str(tmp_path / "train.npz"), name, metrics)
    extractor = get_extractor(name, metrics=metrics)
    layers = {}
    for part in counts:
        batches = [
            extractor.layers(torch.from_numpy(b.copy())) for b in open_images(tmp_path / f"{part}.npz").batches(256)
        ]
        layers[part] = {key: torch.cat([batch[key] for batch in batches]).numpy() for key in batches[0]}
    samples, against = layers["test"]["features"], layers["train"]["features"]
    assert real["is"] == pytest.approx(adm.inception_score(layers["test"]["logits"]), rel=1e-6)
    assert real["fid"] == pytest.approx(adm.frechet(samples, against), rel=1e-3)  # fewer samples than features
    squared = torch.cdist(torch.from_numpy(samples).double(), torch.from_numpy(against).double())
    within = torch.cdist(*[torch.from_numpy(against).double()] * 2).sort(dim=1).values[:, 3]
    assert real["precision"] == pytest.approx(float((squared <= within).any(dim=1).double().mean()), abs=1e-3)
    assert real["precision"] > 0.7 and real["recall"] > 0.5 and abs(real["kid"]) < 0.01

    blurred = np.concatenate(list(open_images(tmp_path / "test.npz").batches(1000)))
    blurred = np.stack([np.asarray(Image.fromarray(i.transpose(1, 2, 0)).reduce(4).resize((32, 32))) for i in blurred])
    worse = evaluate_images(blurred, str(tmp_path / "train.npz"), name, metrics)
    assert worse["fid"] > 1.5 * real["fid"] and worse["kid"] > 1 and worse["recall"] < 0.5 * real["recall"]
