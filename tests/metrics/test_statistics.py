import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from sddit.errors import UsageError
from sddit.metrics.statistics import Moments, frechet_distance


def _moments(features) -> Moments:
    moments = Moments()
    moments.update(features)
    return moments


def _fid(one, other) -> float:
    a, b = _moments(one), _moments(other)
    return frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


def _features(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)).astype(np.float32)


@given(
    cuts=st.lists(st.integers(0, 50), max_size=6),
    workers=st.integers(1, 4),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    seed=st.integers(0, 100),
)
def test_any_batches_and_any_merge_give_numpys_covariance(cuts, workers, offset, seed):
    features = np.random.default_rng(seed).standard_normal((50, 5)) + offset
    batches = np.split(features, sorted(cuts))
    parts = [Moments(5) for _ in range(workers)]
    for i, batch in enumerate(batches):
        parts[i % workers].update(batch)
    total = Moments()
    for part in parts:
        total.merge(Moments.from_array(part.to_array()))
    assert total.count == 50
    np.testing.assert_allclose(total.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total.covariance(), np.cov(features, rowvar=False), rtol=1e-7, atol=1e-9)


def test_features_of_torch_are_taken_in_float64():
    features = _features(20, 4, seed=0)
    tensor = torch.from_numpy(features).requires_grad_()
    assert np.array_equal(_moments(tensor).to_array(), _moments(features.astype(np.float64)).to_array())


def test_merging_leaves_the_other_alone():
    one, other = _moments(_features(5, 3, 0)), _moments(_features(7, 3, 1))
    total = Moments()
    total.merge(one)
    before = one.to_array().copy()
    total.merge(other)
    assert np.array_equal(one.to_array(), before)


@pytest.mark.parametrize("dim", [0, 1, 64])
def test_array_round_trip(dim):
    moments = Moments(dim)
    if dim:
        moments.update(np.random.default_rng(0).standard_normal((9, dim)))
    again = Moments.from_array(moments.to_array())
    assert (again.count, len(again.mean)) == (moments.count, dim)
    assert np.array_equal(again.to_array(), moments.to_array())


@pytest.mark.parametrize("size", [0, 2, 5, 8])
def test_an_array_that_holds_no_moments(size):
    with pytest.raises(ValueError, match="holds no moments"):
        Moments.from_array(np.zeros(size))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples(n):
    with pytest.raises(UsageError, match=f"at least 2 samples; there are {n}"):
        _moments(np.zeros((n, 3))).covariance()


def test_other_widths_are_refused():
    moments = _moments(np.zeros((3, 4)))
    with pytest.raises(UsageError, match="width 5 cannot be added to features of 4"):
        moments.update(np.zeros((3, 5)))
    with pytest.raises(UsageError, match="width 4 cannot be compared with a reference of width 5"):
        frechet_distance(np.zeros(4), np.eye(4), np.zeros(5), np.eye(5))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(value):
    with pytest.raises(UsageError, match="not finite"):
        Moments().update(np.array([[0.0, value]]))


# ------------------------------------------------------------------------------------------ oracles of methods.md §12.8


def test_equal_covariances():
    covariance = np.cov(_features(100, 16, 0), rowvar=False)
    assert frechet_distance(np.zeros(16), covariance, np.full(16, 0.5), covariance) == pytest.approx(4.0, abs=1e-3)


def test_covariances_one_and_four():
    assert frechet_distance(np.zeros(16), np.eye(16), np.zeros(16), 4 * np.eye(16)) == pytest.approx(16.0)


def test_identical_sets():
    features = _features(200, 16, 0)
    assert _fid(features, features) == pytest.approx(0.0, abs=1e-3)


def test_means_in_float32_are_accepted():
    mean = np.zeros(16, dtype=np.float32)
    assert frechet_distance(mean, np.eye(16), np.ones(16), np.eye(16)) == pytest.approx(16.0)


@settings(max_examples=20)
@given(n=st.integers(20, 200), d=st.integers(2, 32), seed=st.integers(0, 1000))
def test_equal_to_torch_fidelity_on_the_same_features(n, d, seed):
    one, other = _features(n, d, seed), _features(n + 7, d, seed + 1)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(f).double()) for f in (one, other)), verbose=False
    )[KEY_METRIC_FID]
    assert _fid(one, other) == pytest.approx(theirs, rel=1e-6, abs=1e-6)
