"""Fewer images by configuration, and data that cannot be trained on."""

import numpy as np
import pytest

from sddit import presets
from sddit.config import Data, Experiment
from sddit.data import open_manifest
from sddit.data.sampler import BatchSampler
from sddit.data.shards import Shards, write_shards
from sddit.data.subset import check_data, num_used, subset
from sddit.errors import DataError, UsageError

N, CLASSES = 500, 7
IMAGES = np.arange(N, dtype=np.uint16).view(np.uint8).reshape(N, 2, 1, 1)
LABELS = np.sort(np.random.default_rng(0).integers(0, CLASSES, N))  # sorted by class, as folders of images are
COUNTS = np.bincount(LABELS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return Shards(write_shards(IMAGES, LABELS, folder, name="synthetic", num_classes=CLASSES, shard_size=64))


def test_all_by_default(shards):
    assert subset(shards, Data()) is None and subset(shards, Data(max_images=N)) is None
    assert num_used(shards.manifest, Data()) == N


def test_so_many_images(shards):
    few, more = subset(shards, Data(max_images=50)), subset(shards, Data(max_images=200))
    assert len(few) == 50 == num_used(shards.manifest, Data(max_images=50)) and (np.diff(few) > 0).all()
    assert set(few) < set(more), "a larger number adds to them"
    assert len(set(LABELS[few])) == CLASSES, "of all classes, however the data are sorted"


def test_so_many_of_each_class(shards):
    few, more = subset(shards, Data(per_class=3)), subset(shards, Data(per_class=40))
    assert (
        np.array_equal(np.bincount(LABELS[few]), np.full(CLASSES, 3))
        and num_used(shards.manifest, Data(per_class=3)) == 21
    )
    assert np.array_equal(np.bincount(LABELS[more]), np.full(CLASSES, 40)) and set(few) < set(more)
    order = [i for i in subset_order() if LABELS[i] == 4]
    assert set(few[LABELS[few] == 4]) == set(order[:3]), "the first of the class in the fixed order"


def subset_order():
    from sddit import seeding

    return seeding.permuted("subset", np.arange(N), N).tolist()


@pytest.mark.parametrize("changes", [{"max_images": 60}, {"per_class": 9}])
def test_batches_of_a_subset(shards, changes):
    experiment = presets.digits().replace({f"data.{k}": v for k, v in changes.items()} | {"train.batch_size": 20})
    chosen = subset(shards, experiment.data)
    sampler = BatchSampler.of(experiment, shards)
    steps = range(-(-len(chosen) // 20))
    seen = np.concatenate([sampler.indices(step, 0, 20) for step in steps])[: len(chosen)]
    assert sorted(seen) == chosen.tolist(), "an epoch shows every image of it once, and no other"
    assert set(sampler.training_images().indices) == set(chosen) and len(sampler.held_out_images()) == 0
    x0, y = sampler.batch(1, 5, 15)
    assert np.array_equal(y, LABELS[sampler.indices(1, 5, 15)]) and len(x0) == 10


def test_some_of_a_subset_are_held_out(shards):
    experiment = presets.digits().replace({"data.per_class": 10, "data.hold_out": 0.2, "train.batch_size": 8})
    sampler = BatchSampler.of(experiment, shards)
    trained, unseen = sampler.training_images().indices, sampler.held_out_images().indices
    assert len(unseen) == 14 and not set(trained) & set(unseen)
    assert set(trained) | set(unseen) == set(subset(shards, experiment.data))


def test_they_are_part_of_the_identity():
    plain = presets.digits()
    identities = {
        plain.replace(changes).identity("digest")
        for changes in ({}, {"data.max_images": 100}, {"data.max_images": 200}, {"data.per_class": 100})
    }
    assert len(identities) == 4
    # As it was before there were such fields: finished cells stay finished.
    assert plain.identity("0" * 64) == "1085f5573513"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_images": 501}, r"data.max_images is 501, but .* has 500 images. Use fewer, or leave it out"),
        ({"per_class": 400}, r"data.per_class is 400, but there are fewer images of classes 1, 2. Use at most \d+"),
    ],
)
def test_more_than_there_are(shards, changes, message):
    with pytest.raises(UsageError, match=message):
        subset(shards, Data(**changes))


def test_both_at_once_are_refused():
    with pytest.raises(UsageError, match=r"data.max_images 5 and data.per_class 5 cannot both be given"):
        presets.digits().replace({"data.max_images": 5, "data.per_class": 5})
    for name in ("max_images", "per_class"):
        with pytest.raises(UsageError, match=f"data.{name}"):
            presets.digits().replace({f"data.{name}": 0})


# --------------------------------------------------------------------------------------- data that cannot be trained on


def write(folder, labels, *, num_classes, side=8, classes=None):
    from sddit.data.manifest import write_manifest
    from sddit.data.shards import write_shard

    folder.mkdir()
    images = np.zeros((len(labels), 1, side, side), dtype=np.uint8)
    line = write_shard(images, np.asarray(labels), folder, 0, num_classes=num_classes)
    write_manifest(folder, [line], name="made", shape=images.shape[1:], num_classes=num_classes, classes=classes)
    return open_manifest(folder)


def test_a_class_without_images(tmp_path):
    manifest = write(tmp_path / "set", [0, 1, 3, 4, 1], num_classes=6, classes=["a", "b", "cat", "d", "e", "fox"])
    with pytest.raises(
        DataError, match=r"have no image of classes 2 \(cat\), 5 \(fox\): samples of it would come from"
    ):
        check_data(presets.digits(), manifest)


def test_many_classes_without_images_are_counted(tmp_path):
    manifest = write(tmp_path / "set", [0, 1], num_classes=1000)
    with pytest.raises(DataError, match=r"have no image of classes 2, 3, 4, 5, 6 and 993 more: "):
        check_data(presets.digits(), manifest)


def test_a_class_that_max_images_leaves_out_is_said(shards, tmp_path):
    manifest = write(tmp_path / "set", [*range(50), *range(50)], num_classes=50)
    with pytest.warns(
        UserWarning, match=r"data.max_images 20 leaves no image of classes .* data.per_class takes as many"
    ):
        check_data(presets.digits().replace({"data.max_images": 20}), manifest)
    check_data(presets.digits().replace({"data.per_class": 1}), manifest)


@pytest.mark.parametrize("classes", [["a", "b", "a"], ["a", "b"]])
def test_labels_that_are_one_class(tmp_path, classes):
    with pytest.raises(DataError, match=r"has the class 'a' twice|names 2 classes, and has 3"):
        write(tmp_path / "set", [0, 1, 2], num_classes=3, classes=classes)


def test_another_size(tmp_path):
    manifest = write(tmp_path / "set", range(10), num_classes=10)
    meant = presets.digits().replace({"data.shape": (3, 32, 32)})
    with pytest.raises(
        UsageError, match=r"are 1 × 8 × 8 \(C × H × W\), but this experiment is for 3 × 32 × 32\. Prepare"
    ):
        check_data(meant, manifest)
    check_data(meant.replace({"data.shape": None}), manifest)
    odd = write(tmp_path / "odd", range(10), num_classes=10, side=9)
    with pytest.raises(UsageError, match=r"patches of 2×2, which do not divide .* 1 × 9 × 9 .*'S/1'"):
        check_data(presets.digits(), odd)


def test_presets_say_what_they_are_for():
    assert Experiment().data.shape is None and presets.digits().data.shape is None, "own data need no preset"
    assert presets.imagenet256().data.shape == (4, 32, 32)
