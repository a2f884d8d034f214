import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sddit.data.manifest import open_manifest
from sddit.data.shards import Shards, write_shards
from sddit.errors import DataError, UsageError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 2, 3, 4), dtype=np.uint8)
LABELS = RNG.integers(0, 5, 23)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return Shards(write_shards(IMAGES, LABELS, folder, name="synthetic", num_classes=5, shard_size=7))


@given(indices=st.lists(st.integers(0, 22), max_size=60))
def test_reads_any_order_across_shards(shards, indices):
    indices = np.array(indices, dtype=np.int64)
    images, labels = shards.read(indices)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert np.array_equal(images, IMAGES[indices])
    assert np.array_equal(labels, LABELS[indices])


@pytest.mark.parametrize("indices", [[-1], [0, 23]])
def test_an_index_outside(shards, indices):
    with pytest.raises(IndexError, match=r"must be in \[0, 23\)"):
        shards.read(np.array(indices))


def test_what_is_read_is_the_callers_to_change(shards):
    first, _ = shards.read(np.arange(3))
    first[:] = 0
    assert np.array_equal(shards.read(np.arange(3))[0], IMAGES[:3])


def test_opening_is_lazy(tmp_path):
    manifest = write_shards(IMAGES, LABELS, tmp_path, name="synthetic", num_classes=5, shard_size=10)
    (tmp_path / "images-00002.npy").unlink()
    shards = Shards(manifest)
    shards.read(np.arange(20))
    with pytest.raises(DataError, match=r"images-00002.npy is not a .npy file of numbers"):
        shards.read(np.array([20]))


def test_pickles_are_refused(tmp_path):
    manifest = write_shards(IMAGES, LABELS, tmp_path, name="synthetic", num_classes=5)
    np.save(tmp_path / "images-00000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"is not a .npy file of numbers"):
        Shards(manifest).read(np.array([0]))


def test_a_file_of_another_shape(tmp_path):
    write_shards(IMAGES, LABELS, tmp_path, name="synthetic", num_classes=5)
    np.save(tmp_path / "images-00000.npy", IMAGES.reshape(23, 2, 4, 3))  # of the same size
    with pytest.raises(DataError, match=r"holds uint8 \(23, 2, 4, 3\), but its manifest says uint8 \(23, 2, 3, 4\)"):
        Shards(open_manifest(tmp_path)).read(np.array([0]))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, r"Images are float32 .* but must be uint8 \(n, C, H, W\)"),
        (IMAGES[:, 0], LABELS, "but must be uint8"),
        (IMAGES, LABELS[:-1], "one for each of 23 images"),
        (IMAGES, LABELS.astype(np.float64), "must be integers"),
        (IMAGES, LABELS + 1, r"Labels span 1 to 5, but must be in \[0, 5\)"),
        (IMAGES[:0], LABELS[:0], "There are no images"),
    ],
)
def test_wrong_input_is_refused_before_a_manifest_is_written(tmp_path, images, labels, message):
    with pytest.raises(UsageError, match=message):
        write_shards(images, labels, tmp_path, name="synthetic", num_classes=5)
    assert not (tmp_path / "manifest.json").exists()


def test_images_in_another_memory_order(tmp_path):
    manifest = write_shards(np.asfortranarray(IMAGES), LABELS, tmp_path, name="synthetic", num_classes=5)
    manifest.verify()
    assert np.array_equal(Shards(manifest).read(np.arange(23))[0], IMAGES)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused_when_their_file_is_opened(tmp_path, label):
    """5 would pass for the null class."""
    manifest = write_shards(IMAGES, LABELS, tmp_path, name="synthetic", num_classes=5, shard_size=10)
    file = tmp_path / manifest.shards[1].labels.file
    labels = np.load(file, allow_pickle=False)
    labels[3] = label
    np.save(file, labels)
    shards = Shards(open_manifest(tmp_path))
    shards.read(np.arange(10))
    with pytest.raises(DataError, match=r"labels-00001.npy has labels from .* must be in \[0, 5\)"):
        shards.read(np.array([10]))


def test_more_shards_than_files_that_may_be_open(tmp_path):
    """A map holds its file open, and ImageNet has more shards than a shell allows files by default."""
    many = np.arange(300, dtype=np.uint16).view(np.uint8).reshape(300, 2, 1, 1)
    write_shards(many, np.zeros(300, dtype=np.int64), tmp_path, name="many", num_classes=1, shard_size=1)
    code = f"""
import resource
import numpy as np
from sddit.data import open_manifest, shards
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
assert shards.Shards(open_manifest("{tmp_path}")).read(np.arange(300))[0].sum() == {many.sum()}
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))
try:
    shards.Shards(open_manifest("{tmp_path}"))
except shards.DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "This data set has 300 shards, but a process may hold 1,000 files open here. Raise" in done.stdout


def test_read_by_several_threads(shards):
    orders = [np.random.default_rng(i).integers(0, 23, 50) for i in range(40)]
    fresh = Shards(shards.manifest)
    with ThreadPoolExecutor(8) as pool:
        for order, (images, labels) in zip(orders, pool.map(fresh.read, orders), strict=True):
            assert np.array_equal(images, IMAGES[order]) and np.array_equal(labels, LABELS[order])


def test_all_labels(shards):
    assert np.array_equal(shards.labels(), LABELS)
