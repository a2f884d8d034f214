"""Draws are functions of (seed, stream, step, position): slices, independence, and the laws they claim."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sddit import seeding


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10),
    st.integers(0, 1000),
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([(), (1,), (3,), (2, 5)]),
)
def test_a_slice_is_the_slice_of_the_whole(seed, step, a, b, shape):
    lo, hi = sorted((a, b))
    for draw in (seeding.uniform, seeding.normal):
        whole = draw(seed, "noise", step, 0, 32, shape)
        part = draw(seed, "noise", step, lo, hi, shape)
        assert part.shape == (hi - lo, *shape)
        assert np.array_equal(part, whole[lo:hi])


def test_seeds_streams_steps_and_positions_are_independent():
    draws = {
        (seed, stream, step): seeding.uniform(seed, stream, step, 0, 256)
        for seed in (0, 1)
        for stream in ("noise", "mask")
        for step in (0, 1)
    }
    values = np.concatenate(list(draws.values()))
    assert len(np.unique(values)) == len(values)
    correlations = np.corrcoef(np.stack(list(draws.values()))) - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.25


def test_laws():
    u, z = seeding.uniform(0, "u", 0, 0, 20_000), seeding.normal(0, "z", 0, 0, 20_000)
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_recorded_draws_stay():
    """What a seed means is part of every recorded result."""
    assert seeding.uniform(0, "noise", 3, 5, 6, (2,)).tolist() == [[0.43485071865835107, 0.4162585557215321]]
    assert seeding.permuted(0, np.arange(10), 10).tolist() == [3, 0, 9, 2, 5, 4, 7, 6, 1, 8]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 300), st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed, n, epoch):
    order = seeding.permuted(seed, np.arange(epoch * n, (epoch + 1) * n), n)
    assert sorted(order) == list(range(n))


def test_epochs_and_seeds_have_other_orders():
    orders = [seeding.permuted(seed, np.arange(e * 500, (e + 1) * 500), 500) for seed in (0, 1) for e in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.05
