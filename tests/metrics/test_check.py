import subprocess
import sys

import numpy as np
import pytest

from sddit import presets
from sddit.config import Eval
from sddit.data import open_manifest
from sddit.data.shards import write_shards
from sddit.errors import DataError, UsageError
from sddit.metrics.check import FINAL, check_evaluation, check_metrics
from sddit.metrics.protocol import METRICS

DIGITS = open_manifest("digits")


def test_enough_of_everything():
    check_metrics(tuple(METRICS), "digits-cnn", 4, 4)
    check_metrics(tuple(METRICS), "inception-v3-compat", 50_000, None)
    check_metrics(("fid", "kid", "precision", "recall"), "dinov2-vit-l-14", None, 50_000)
    check_metrics(("is", "sfid"), "own:Class", 50_000, 50_000)  # only its class can tell


@pytest.mark.parametrize(
    ("metrics", "extractor", "samples", "images", "message"),
    [
        (("fdi",), "digits-cnn", 9, 9, "Unknown metric 'fdi'. Did you mean 'fid'"),
        ((), "digits-cnn", 9, 9, "No metric is named. Known: fid, sfid, is, precision, recall, kid"),
        (("fid",), "digits-cnn", 1, 9, "FID needs at least 2 images; there are 1 samples. Raise eval.samples"),
        (("kid",), "digits-cnn", 9, 1, "KID needs at least 2 images; there are 1 reference images. Give a larger"),
        (("fid", "recall"), "digits-cnn", 3, 9, "recall needs at least 4 images; there are 3 samples"),
        (("precision",), "digits-cnn", 9, 3, "precision needs at least 4 images; there are 3 reference images"),
        (("sfid",), "dinov2-vit-s-14", 9, 9, "sFID cannot be computed with dinov2-vit-s-14, which has no 'spatial'"),
        (("is",), "vgg16", 9, 9, "IS cannot be computed with vgg16, .* use inception-v3-compat or digits-cnn"),
    ],
)
def test_what_is_not_enough(metrics, extractor, samples, images, message):
    with pytest.raises(UsageError, match=message):
        check_metrics(metrics, extractor, samples, images)


def test_the_names_are_those_of_the_fields():
    changes = {"eval.metrics": tuple(METRICS), "eval.final": FINAL, "data.hold_out": 0.1}
    check_evaluation(presets.digits().replace(changes), DIGITS)
    with pytest.raises(UsageError):
        presets.digits().replace({"eval.metrics": ("mind",)})
    assert Eval().metrics == ("fid",) and Eval().final == ()


@pytest.mark.parametrize("name", ["probe", "copying", "denoising"])
def test_diagnostics_without_held_out_images(name, tmp_path):
    experiment = presets.digits().replace({"eval.final": (name, "seeds")})
    with pytest.raises(
        UsageError, match=rf"{name} \(eval.final\) cannot be done .* Set data.hold_out .* data.test_path"
    ):
        check_evaluation(experiment, DIGITS)
    check_evaluation(experiment.replace({"data.hold_out": 0.01}), DIGITS)
    check_evaluation(experiment.replace({"data.test_path": "digits"}), DIGITS)
    check_evaluation(experiment.replace({"eval.final": ("seeds",)}), DIGITS)


def test_held_out_images_of_another_kind(tmp_path):
    images, labels = np.zeros((3, 1, 8, 8), dtype=np.uint8), np.zeros(3, dtype=np.int64)
    write_shards(images, labels, tmp_path / "set", name="some", num_classes=3)
    experiment = presets.digits().replace({"eval.final": ("probe",), "data.test_path": str(tmp_path / "set")})
    with pytest.raises(UsageError, match=r"data.test_path has images .* of 3 classes, but the data have .* of 10"):
        check_evaluation(experiment, DIGITS)
    with pytest.raises(DataError, match="No data set at"):
        check_evaluation(experiment.replace({"data.test_path": str(tmp_path / "nowhere")}), DIGITS)


@pytest.mark.parametrize("fraction", [1e-5, 0.9999])
def test_a_fraction_that_leaves_nothing(fraction):
    with pytest.raises(UsageError, match="must leave at least one on each side"):
        check_evaluation(presets.digits().replace({"data.hold_out": fraction}), DIGITS)


def test_free_of_torch():
    code = """
import sys
from sddit import presets
from sddit.data import open_manifest
from sddit.metrics.check import check_evaluation
check_evaluation(presets.digits(), open_manifest("digits"))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
