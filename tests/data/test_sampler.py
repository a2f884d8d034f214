from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sddit.data.sampler import BatchSampler
from sddit.data.shards import Shards, write_shards

N = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 1, 2, 3), dtype=np.uint8)
LABELS = np.arange(N)  # a label tells its image


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return Shards(write_shards(IMAGES, LABELS, folder, name="synthetic", num_classes=N, shard_size=10))


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**7),
    batch_size=st.integers(1, 60),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_any_split_of_a_batch_is_the_batch(shards, seed, step, batch_size, cuts):
    sampler = BatchSampler(shards, seed=seed, batch_size=batch_size, flip=True)
    x0, y = sampler.batch(step, 0, batch_size)
    ends = [0, *sorted(int(c * batch_size) for c in cuts), batch_size]
    parts = [sampler.batch(step, lo, hi) for lo, hi in pairwise(ends)]
    assert np.array_equal(np.concatenate([x for x, _ in parts]), x0)
    assert np.array_equal(np.concatenate([y for _, y in parts]), y)


@given(seed=st.integers(0, 2**32), batch_size=st.integers(1, 3 * N), epoch=st.integers(0, 5))
def test_every_epoch_shows_every_image_once(shards, seed, batch_size, epoch):
    sampler = BatchSampler(shards, seed=seed, batch_size=batch_size)
    steps = range(epoch * N // batch_size, -(-(epoch + 1) * N // batch_size))
    stream = np.concatenate([sampler.batch(step, 0, batch_size)[1] for step in steps])
    first = epoch * N - steps[0] * batch_size
    assert sorted(stream[first : first + N]) == list(range(N))


def test_a_batch_larger_than_the_data(shards):
    _, y = BatchSampler(shards, seed=0, batch_size=3 * N).batch(0, 0, 3 * N)
    assert np.array_equal(np.bincount(y), np.full(N, 3))


def test_pure_in_seed_and_step(shards):
    one, other = (BatchSampler(shards, seed=5, batch_size=8, flip=True) for _ in range(2))
    for _ in range(3):
        other.batch(99, 0, 8)  # whatever was asked before
    assert np.array_equal(one.batch(7, 0, 8)[0], other.batch(7, 0, 8)[0])
    orders = [BatchSampler(shards, seed=seed, batch_size=N).indices(step, 0, N) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_range_and_types(shards):
    x0, y = BatchSampler(shards, seed=0, batch_size=N).batch(0, 0, N)
    assert (x0.dtype, x0.shape, y.dtype, y.shape) == (np.float32, (N, 1, 2, 3), np.int64, (N,))
    assert np.array_equal(x0, IMAGES[y].astype(np.float32) / np.float32(127.5) - 1)
    extremes = np.array([0, 255], dtype=np.uint8).astype(np.float32) / np.float32(127.5) - 1
    assert extremes.tolist() == [-1, 1]


def test_flips_are_half_of_the_images_and_mirror_columns(shards):
    size = 2000
    x0, y = BatchSampler(shards, seed=0, batch_size=size, flip=True).batch(0, 0, size)
    plain = IMAGES[y].astype(np.float32) / np.float32(127.5) - 1
    flipped = (x0 == plain[..., ::-1]).all(axis=(1, 2, 3)) & ~(x0 == plain).all(axis=(1, 2, 3))
    assert np.array_equal(x0[~flipped], plain[~flipped])
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(size)


def test_an_empty_slice(shards):
    x0, y = BatchSampler(shards, seed=0, batch_size=4, flip=True).batch(0, 2, 2)
    assert x0.shape == (0, 1, 2, 3)
    assert y.shape == (0,)


def test_an_epoch_of_imagenet_is_exact_in_constant_memory():
    """1,281,167 images: each once an epoch, whatever the workers; a step of an advanced run costs no more than the
    first, and holds no more than its batch."""
    import tracemalloc

    class Counted:  # an order needs no images
        manifest = SimpleNamespace(vae=None)

        def __len__(self):
            return n

    n, batch = 1_281_167, 4096
    sampler = BatchSampler(Counted(), seed=3, batch_size=batch)
    seen, steps = np.zeros(n, dtype=np.uint8), n // batch + 1
    for step in range(steps):
        for worker in range(2):
            indices = sampler.indices(step, worker * batch // 2, (worker + 1) * batch // 2)
            if step == steps - 1:  # the epoch ends in the middle of a batch
                position = step * batch + worker * batch // 2 + np.arange(batch // 2)
                indices = indices[position < n]
            np.add.at(seen, indices, 1)
    assert (seen == 1).all()
    tracemalloc.start()
    resumed = BatchSampler(Counted(), seed=3, batch_size=batch).indices(10**7, 0, batch)
    assert tracemalloc.get_traced_memory()[1] < 100 * batch * 8, "no list of the images is made"
    tracemalloc.stop()
    assert np.array_equal(resumed, sampler.indices(10**7, 0, batch)), "nothing of the steps before it is needed"
