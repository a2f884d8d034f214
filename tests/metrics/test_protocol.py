import dataclasses
import subprocess
import sys

import pytest

from sddit import presets
from sddit.metrics.protocol import Protocol

EXPERIMENT = presets.digits()
PROTOCOL = Protocol.from_experiment(EXPERIMENT, "d" * 64, "e" * 12, reference_images=1797)


def test_says_what_a_reader_must_know():
    assert PROTOCOL.describe() == (
        "FID on digits-cnn features, 1,024 samples against 1,797 images, cyclic labels, no guidance, averaged weights, "
        "evaluation seed 0"
    )


def test_leaves_out_what_is_not_known():
    assert Protocol("digits-cnn", "e" * 12, "d" * 64, 500).describe() == (
        "FID on digits-cnn features, 500 samples against reference dddddddddddd"
    )


def test_json_round_trip():
    assert Protocol.from_json(PROTOCOL.to_json()) == PROTOCOL
    assert Protocol.from_json(PROTOCOL.to_json()).reference_images == 1797


@pytest.mark.parametrize(
    "changes",
    [
        {"eval.extractor": "inception-v3-compat"},
        {"eval.samples": 512},
        {"eval.seed": 1},
        {"eval.labels": "uniform"},
        {"eval.guidance": 1.5},
        {"eval.weights": "raw"},
    ],
)
def test_what_two_scores_must_share(changes):
    other = Protocol.from_experiment(EXPERIMENT.replace(changes), "d" * 64, "e" * 12)
    assert other.digest != PROTOCOL.digest


@pytest.mark.parametrize("field", ["extractor_digest", "reference", "decoder", "rounding"])
def test_what_else_they_must_share(field):
    assert dataclasses.replace(PROTOCOL, **{field: "another"}).digest != PROTOCOL.digest


@pytest.mark.parametrize(
    "changes",
    [{"seed": 7}, {"train.steps": 10}, {"eval.every": 100}, {"eval.sampler_steps": 18}, {"train.ema": 0.99}],
)
def test_what_belongs_to_the_method(changes):
    assert Protocol.from_experiment(EXPERIMENT.replace(changes), "d" * 64, "e" * 12).digest == PROTOCOL.digest


def test_any_two_guidance_scales_may_be_drawn_together():
    guided = [Protocol.from_experiment(EXPERIMENT.replace({"eval.guidance": g}), "d", "e") for g in (1.5, 4.0)]
    assert guided[0].digest == guided[1].digest
    assert "guided" in guided[0].describe()


def test_other_metrics_are_named_and_leave_the_digest_alone():
    assert PROTOCOL.describe(["fid", "is", "recall"]).startswith(
        "FID, IS, recall on digits-cnn features, 1,024 samples"
    )
    more = Protocol.from_experiment(EXPERIMENT.replace({"eval.metrics": ("fid", "kid")}), "d" * 64, "e" * 12)
    assert more.digest == PROTOCOL.digest
    # an ADM file's statistics and its images are two sets
    assert dataclasses.replace(PROTOCOL, reference_subset="i" * 64).digest != PROTOCOL.digest


def test_digest_is_pinned():
    # It is a tag of finished cells: another one would have them drawn apart from new ones.
    assert PROTOCOL.digest == "b049a3190b5e"
    assert dataclasses.replace(PROTOCOL, reference_images=None).digest == PROTOCOL.digest


def test_free_of_torch():
    code = "import sys, sddit.metrics.protocol; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
