from itertools import pairwise

import adm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from sddit.errors import UsageError
from sddit.metrics import statistics
from sddit.metrics.statistics import SPLIT, Moments, SplitSums, frechet_distance, kernel_distance, precision_and_recall


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


# ------------------------------------------------------------------------------------------ independent formulas (ADM)


@settings(max_examples=20)
@given(n=st.integers(60, 300), d=st.integers(2, 24), seed=st.integers(0, 1000))
def test_frechet_distance_is_that_of_scipys_square_root(n, d, seed):
    one, other = _features(n, d, seed), _features(n + 7, d, seed + 1)
    assert _fid(one, other) == pytest.approx(adm.frechet(one, other), rel=1e-6)


def _score(logits, cuts=(), workers=1) -> float:
    """The Inception score from batches cut at `cuts`, over contiguous shares."""
    total = SplitSums(logits.shape[1])
    ends = [len(logits) * i // workers for i in range(workers + 1)]
    for lo, hi in pairwise(ends):
        part = SplitSums(logits.shape[1])
        edges = [lo, *sorted(lo + min(c, hi - lo) for c in cuts), hi]
        for a, b in pairwise(edges):
            part.update(logits[a:b], a)
        total.merge(SplitSums.from_array(part.to_array()))
    return total.score()


@settings(max_examples=30, deadline=None)
@given(
    n=st.sampled_from([3, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 1234]),
    cuts=st.lists(st.integers(0, 3 * SPLIT), max_size=4),
    workers=st.integers(1, 4),
    scale=st.sampled_from([0.1, 3.0, 300.0]),
    seed=st.integers(0, 100),
)
def test_inception_score_of_any_batches_and_shares(n, cuts, workers, scale, seed):
    logits = (np.random.default_rng(seed).standard_normal((n, 4)) * scale).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        theirs = adm.inception_score(logits)
    if np.isfinite(theirs):  # ADM's own 0 · ln 0
        assert _score(logits, cuts, workers) == pytest.approx(theirs, rel=1e-6)
    assert _score(logits, cuts, workers) == pytest.approx(_score(logits), rel=1e-12)


def test_inception_score_is_torch_fidelitys_without_its_shuffle():
    logits = _features(2 * SPLIT, 10, seed=3)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=2, shuffle=False)[KEY_METRIC_ISC_MEAN]
    assert _score(logits) == pytest.approx(theirs, rel=1e-9)


def test_inception_score_of_logits_that_are_not_finite():
    with pytest.raises(UsageError, match="not finite"):
        SplitSums(2).update(np.array([[0.0, np.nan]]), 0)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(4, 120), m=st.integers(4, 120), d=st.integers(2, 20), seed=st.integers(0, 1000))
def test_precision_and_recall_are_exact(n, m, d, seed):
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((n, d)).astype(np.float32)
    real = (rng.standard_normal((m, d)) * rng.uniform(0.5, 1.5) + rng.uniform(0, 1)).astype(np.float32)
    expected = adm.precision_and_recall(samples, real)
    for block in (7, 1000):
        assert precision_and_recall(torch.from_numpy(samples), torch.from_numpy(real), block) == expected


@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 80), d=st.integers(2, 20), seed=st.integers(0, 1000))
def test_kid_of_whole_sets_is_the_mmd(n, d, seed):
    """With as many features on both sides as a subset has, every subset is the whole set."""
    one, other = _features(n, d, seed), _features(n, d, seed + 1)
    largest = float(max((f**2).sum(axis=1).max() for f in (one, other)) / d + 1) ** 3  # terms cancel, in float32
    found = kernel_distance(torch.from_numpy(one), torch.from_numpy(other))
    assert found == pytest.approx(adm.kernel_distance(one, other), abs=1e-5 * largest)


def test_kid_of_subsets_estimates_the_mmd(monkeypatch):
    monkeypatch.setattr(statistics, "KID_SUBSET", 100)  # 1,000 would take seconds
    one, other = _features(600, 8, 0), _features(500, 8, 0)[:, ::-1].copy()
    assert kernel_distance(torch.from_numpy(one), torch.from_numpy(other)) == pytest.approx(
        adm.kernel_distance(one, other), rel=0.1
    )


# ----------------------------------------------------------------------------------------- oracles of methods.md §12.8


def test_uniform_predictions():
    assert _score(np.zeros((100, 10))) == pytest.approx(1)


def test_confident_predictions_by_the_order_of_their_classes():
    confident = 1e4 * np.eye(10)
    assert _score(confident[np.arange(2 * SPLIT) % 10]) == pytest.approx(10)
    assert _score(confident[np.repeat(np.arange(10), SPLIT)]) == pytest.approx(1)  # sorted: a class for each split


def test_identical_far_and_clustered_sets():
    wide = torch.from_numpy(np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32))
    assert precision_and_recall(wide, wide) == (1, 1)
    assert precision_and_recall(wide, wide + 100) == (0, 0)
    precision, recall = precision_and_recall(wide[:1] + 1e-3 * wide, wide)
    assert precision == 1 and recall < 0.05


def test_kid_of_equal_sets_is_near_zero():
    features = _features(300, 8, 0)
    same = kernel_distance(torch.from_numpy(features), torch.from_numpy(features))
    apart = kernel_distance(torch.from_numpy(features), torch.from_numpy(features + 5))
    assert abs(same) < 0.1 * apart
