"""The experiment tree: validation in words, overrides, and identities that must never change by accident."""

import pytest

from sddit import presets
from sddit.config import Experiment, NotInDigest, flatten, parse_assignment
from sddit.errors import UsageError, did_you_mean

DATA = "0" * 64

BAD = [
    ({"method.mask_ratio": 1.2}, "method.mask_ratio is 1.2, but must be in [0, 1)."),
    ({"method.mask_ratio": -0.1}, "must be in [0, 1)"),
    ({"method.maskratio": 0.1}, "Unknown field 'method.maskratio'. Did you mean 'method.mask_ratio'?"),
    ({"train.leaning_rate": 0.1}, "Unknown field 'train.leaning_rate'"),
    ({"method.name": "masdit"}, "Unknown method 'masdit'"),
    ({"method.name": "dit"}, "presets.digits(method='dit')"),
    ({"model.size": "Q/2"}, "model.size is 'Q/2', but must be"),
    ({"model.size": "H/2"}, "not in the tiny grid"),
    ({"train.ema": "pow"}, "power:GAMMA"),
    ({"train.ema": 1.0}, "rate in [0, 1)"),
    ({"train.precision": "fp16"}, "Did you mean 'bf16'?"),
    ({"method.teacher_sigma": "drown"}, "Did you mean 'drawn'?"),
    (
        {"train.batch_size": 250, "resources.workers": 8},
        "batch_size 250 is not divisible by 8 workers. Use 248 or 256, or --workers 5 or 10.",
    ),
    ({"train.micro_batch": 5}, "not divisible by train.micro_batch 5"),
    ({"seed": -1}, "seed is -1, but must be ≥ 0"),
    ({"method.teacher_momentum_end": 1.0}, "must be given together"),
    ({"method.lambda_d_end": 1.0}, "lambda_d_end and lambda_d_horizon must be given together"),
    (
        {"method.stop_gradient": True, "method.lambda_d_end": 0, "method.lambda_d_horizon": 9},
        "nothing would train the encoder",
    ),
    ({"method.cls_in_decoder": "forwarded", "method.cls_at_inference": False}, "[CLS] cannot be absent at inference"),
    ({"eval.sampler": "ddpm"}, "eval.sampler 'ddpm' is not for edm diffusion: use heun or euler"),
    ({"diffusion.kind": "iddpm", "eval.churn": 10}, "eval.churn is for the samplers heun and euler alone"),
    ({"eval.guidance_rule": "power-cosine"}, "is for iddpm diffusion alone"),
    ({"eval.guidance_interval": [2.0, 0.5]}, "which is empty: give [low, high] in sigma"),
    ({"train.lr": "abc"}, "train.lr is 'abc'"),
    ({"train.lr": float("nan")}, "train.lr is"),
    ({"train": 3}, "Unknown field 'train'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_are_explained(changes, message):
    with pytest.raises(UsageError) as error:
        presets.digits().replace(changes)
    assert message in str(error.value)
    assert "validation error" not in str(error.value)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'sddit'"):
        presets.digits(method="sdit")
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        presets.preset("digit")
    assert did_you_mean("zzz", ["a", "b"]) == "Known: a, b."


def test_assignments():
    assert parse_assignment("method.mask_ratio=0.3") == ("method.mask_ratio", 0.3)
    assert parse_assignment("train.ema=power:6.94") == ("train.ema", "power:6.94")
    assert parse_assignment("method.mask_ratio=[0, 0.5]") == ("method.mask_ratio", [0, 0.5])
    with pytest.raises(UsageError, match=r"section\.field=value"):
        parse_assignment("mask_ratio")


# Finished cells are found by these: if one changes, every record of every user is orphaned. A default may change only
# together with config.SCHEMA.
RECORDED = {
    ("digits", "sddit", "S/2"): "1085f5573513",
    ("digits", "dit", "S/2"): "3a9e41e2c19f",
    ("digits", "sddit", "B/2"): "84112e4cc677",
    ("cifar10", "sddit", "S/2"): "9ca51e863023",
    ("imagenet256", "sddit", "XL/2"): "ffab87cc0707",
    ("imagenet256", "dit", "S/4"): "285754a31ed2",
}


@pytest.mark.parametrize(("preset", "method", "size"), RECORDED)
def test_recorded_identities_stay(preset, method, size):
    experiment = presets.preset(preset)(size, method).replace({"diffusion.kind": "edm"})
    assert experiment.identity(DATA) == RECORDED[preset, method, size]


def _paths(section, prefix=""):
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", NotInDigest in info.metadata


def test_exactly_what_can_change_a_result_is_in_the_identity():
    outside = {path for path, skipped in _paths(presets.digits()) if skipped}
    assert outside == {
        "method.collapse_threshold", "method.collapse_after", "data.path", "data.test_path", "data.shape",
        "data.num_classes", "data.vae", "eval.reference",
        "train.steps", "train.micro_batch", "train.compile", "train.log_every", "eval.nfe",
        "eval.batch_size", "eval.grid", "resources.workers", "resources.cpus_per_worker", "resources.gpus_per_worker",
    }  # fmt: skip
    base = presets.digits()
    for change in ({"train.steps": 7}, {"resources.workers": 2}, {"train.micro_batch": 8}, {"eval.batch_size": 3}):
        assert base.replace(change).identity(DATA) == base.identity(DATA)
    for change in ({"seed": 1}, {"method.mask_ratio": 0.3}, {"train.precision": "bf16"}, {"eval.samples": 100}):
        assert base.replace(change).identity(DATA) != base.identity(DATA)
    assert base.identity("1" * 64) != base.identity(DATA)


def test_a_field_at_its_default_is_not_in_the_identity():
    """So a field that is added later leaves finished cells finished."""
    assert Experiment().identity(DATA) == Experiment().replace({"train.lr": 1e-4, "method.mask_ratio": 0.2}).identity(
        DATA
    )
    assert Experiment().replace({"method.mask_ratio": 0}).identity(DATA) == Experiment().replace(
        {"method.mask_ratio": 0.0}
    ).identity(DATA)


def test_experiments_survive_json():
    experiment = presets.digits().replace({"method.teacher_sigma": "drawn", "data.shape": [1, 8, 8]})
    again = Experiment.parse(experiment.model_dump(mode="json"))
    assert again == experiment and again.identity(DATA) == experiment.identity(DATA)
    assert flatten(experiment.model_dump())["method.teacher_sigma"] == "drawn"


def test_an_identity_knows_what_none_stands_for():
    """What is left to the project, and the same value given, are one cell."""
    sddit = presets.imagenet256("S/2")
    last = {"method.decoder": "last_blocks"}
    for none, given in [
        ({}, {"eval.sampler": "heun", "eval.sampler_steps": 40, "eval.guidance_channels": "all"}),
        ({"eval.nfe": 35}, {"eval.sampler_steps": 18}),
        (last, last | {"method.last_blocks": 4}),
    ]:
        assert sddit.replace(none).identity(DATA) == sddit.replace(given).identity(DATA)
    assert sddit.replace(last).identity(DATA) != sddit.replace(last | {"method.last_blocks": 3}).identity(DATA)


def test_fields_of_another_formulation_are_no_part_of_an_experiment():
    iddpm = presets.imagenet256("S/2", "dit")
    assert iddpm.replace({"diffusion.sigma_data": 0.7}).identity(DATA) == iddpm.identity(DATA)
    assert iddpm.replace({"diffusion.timesteps": 500}).identity(DATA) != iddpm.identity(DATA)
    assert "diffusion.sigma_data" not in iddpm.digest_fields() and "diffusion.timesteps" in iddpm.digest_fields()
