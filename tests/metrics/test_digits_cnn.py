import json

import numpy as np
import pytest
import torch

from sddit.data import open_manifest
from sddit.data.shards import Shards
from sddit.errors import UsageError
from sddit.metrics import digits_cnn
from sddit.metrics.features import file_digest, get_extractor
from sddit.metrics.statistics import Moments, frechet_distance

CARD = json.loads(digits_cnn.CARD.read_text())


@pytest.fixture(scope="module")
def digits():
    images, labels = Shards(open_manifest("digits")).read(np.arange(1797))
    return torch.from_numpy(images), torch.from_numpy(labels)


def _fid(one: torch.Tensor, other: torch.Tensor) -> float:
    extractor, moments = get_extractor("digits-cnn"), []
    for images in (one, other):
        moments.append(Moments())
        moments[-1].update(extractor(images))
    a, b = moments
    return frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


def test_the_card_describes_the_weights_that_ship(digits):
    images, labels = digits
    assert file_digest(digits_cnn.WEIGHTS) == CARD["weights_sha256"]
    assert open_manifest("digits").digest == CARD["data"]
    assert digits_cnn.WEIGHTS.stat().st_size < 200_000
    net = digits_cnn.DigitsCNN("digits-cnn", ["64"])
    _, test = digits_cnn.split(labels.numpy(), CARD["seed"])
    assert digits_cnn.accuracy(net, images[test], labels[test]) == CARD["test_accuracy"] >= 0.99


def test_split_is_stratified_and_disjoint(digits):
    labels = digits[1].numpy()
    train, test = digits_cnn.split(labels, seed=0)
    assert (len(train), len(test)) == (1437, 360)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    share = np.bincount(labels[test]) / np.bincount(labels)
    assert abs(share - 360 / 1797).max() < 1 / 174  # within an image of each class


def test_training_is_a_function_of_its_arguments(digits):
    images, labels = digits
    before = torch.random.get_rng_state()
    nets = [digits_cnn.train(images[:256], labels[:256], seed=3, epochs=2) for _ in range(2)]
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_learns(digits):
    images, labels = digits
    net = digits_cnn.train(images, labels, seed=3, epochs=3)
    assert digits_cnn.accuracy(net, images, labels) > 0.9


def test_features_and_logits_belong_together(digits):
    images = digits[0][:10]
    net = digits_cnn.DigitsCNN("digits-cnn", ["logits", "64"])
    logits, features = net(images)
    assert features.shape == (10, 64)
    assert torch.equal(logits, net.classify(images))
    assert torch.equal(logits, net.logits(features))


def test_no_feature_is_dead(digits):
    """A unit that never moves would be a dimension in which the FID sees nothing."""
    [features] = digits_cnn.DigitsCNN("digits-cnn", ["64"])(digits[0])
    assert (features.std(dim=0) > 0.05).all()


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 32, 32)])
def test_other_images_are_refused(shape):
    with pytest.raises(UsageError, match=r"digits-cnn sees uint8 images \(b, 1, 8, 8\)"):
        digits_cnn.DigitsCNN("digits-cnn", ["64"])(torch.zeros(shape, dtype=torch.uint8))


def test_fid_orders_real_noisy_and_noise(digits):
    images = digits[0]
    rng = np.random.default_rng(0)
    order = torch.from_numpy(rng.permutation(1797))
    halves = _fid(images[order[:898]], images[order[898:]])
    jitter = rng.normal(0, 40, images.shape)
    noisy = _fid(torch.from_numpy(np.clip(images.numpy() + jitter, 0, 255).astype(np.uint8)), images)
    noise = _fid(torch.from_numpy(rng.integers(0, 256, (1024, 1, 8, 8), dtype=np.uint8)), images)
    one_class_less = _fid(images[digits[1] != 0], images)
    assert halves < 10 < noisy < 50 < 300 < noise
    assert halves < one_class_less < noise
