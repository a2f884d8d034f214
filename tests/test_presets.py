"""Presets: complete for every size and method, sampled at one cost, and each value with its source."""

import itertools

import pytest

from sddit import cost, presets
from sddit.config import METHOD_CONFIGS, SIZE_GRIDS
from sddit.describe import describe

SHAPES = {
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar10-latents": ((4, 8, 8), 10),
    "imagenet256": ((4, 32, 32), 1000),
}
SIZES = [f"{letter}/{patch}" for letter in ("S", "B", "L", "XL") for patch in (2, 4)]
CASES = list(itertools.product(presets.PRESETS, METHOD_CONFIGS, SIZES))


@pytest.mark.parametrize(("name", "method", "size"), CASES)
def test_every_preset_is_complete(name, method, size):
    experiment = presets.preset(name)(size, method)
    shape, classes = SHAPES[name]
    assert (experiment.model.size, experiment.method.name) == (size, method)
    assert experiment.diffusion.kind == {"dit": "iddpm", "mdt": "iddpm"}.get(method, "edm")
    assert cost.num_parameters(experiment, shape, classes)[0] > 0
    if name == "imagenet256":
        assert experiment.solver == {"edm": ("heun", 40), "iddpm": ("ddpm", 250)}[experiment.diffusion.kind]
    else:
        assert 19 <= cost.evaluations(experiment) <= 36
    assert experiment.model.dims == SIZE_GRIDS[experiment.model.grid][size.partition("/")[0]]


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10-latents"])
def test_samples_cost_every_method_the_same(name):
    methods = [presets.preset(name)("S/2", method) for method in METHOD_CONFIGS]
    both = [e.replace({"diffusion.kind": kind}) for e in methods for kind in ("edm", "iddpm")]
    assert len({cost.evaluations(experiment) for experiment in both}) == 1
    assert {experiment.solver[0] for experiment in both} == {"heun", "dpmpp"}


def test_dit_under_edm_is_one_override():
    published = presets.imagenet256("S/2", "dit")
    control = published.replace({"diffusion.kind": "edm"})
    assert published.solver == ("ddpm", 250) and published.guidance_rule == ("constant", "three")
    assert control.solver == ("heun", 40) and control.guidance_rule == ("constant", "all")
    assert control.identity("0") != published.identity("0")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dit", {"train.lr": 1e-4, "train.batch_size": 256, "train.steps": 7_000_000, "data.flip": True}),
        ("maskdit", {"train.lr": 1e-4, "train.batch_size": 1024, "method.mask_ratio": 0.5, "data.flip": False}),
        ("mdt", {"train.lr": 3e-4, "train.batch_size": 256, "method.mask_ratio": 0.3, "method.decoder_layers": 2}),
        ("sddit", {"train.lr": 1e-4, "train.batch_size": 256, "method.mask_ratio": 0.2, "train.steps": 2_400_000}),
    ],
)
def test_published_settings(method, settings):
    rows = {field: (value, source) for field, value, source in presets.explain("imagenet256", "XL/2", method, {})}
    assert {field: rows[field][0] for field in settings} == settings
    assert all(rows[field][1] != "default of this project" for field in settings if field != "data.flip")
    assert rows["train.ema"][0] == 0.9999 and rows["train.precision"][0] == "fp32"


def test_what_is_given_is_said_to_be_and_other_formulations_are_left_out():
    rows = {f: (v, s) for f, v, s in presets.explain("digits", "S/2", "dit", {"train.lr": 0.1})}
    assert rows["train.lr"] == (0.1, "given")
    assert "diffusion.timesteps" in rows and "diffusion.sigma_data" not in rows
    assert rows["eval.sampler"][0] == "dpmpp" and rows["eval.sampler_steps"][0] == 19
    edm = [field for field, *_ in presets.explain("digits", "S/2", "dit", {"diffusion.kind": "edm"})]
    assert "diffusion.sigma_data" in edm and "diffusion.timesteps" not in edm


def test_description():
    text = describe("imagenet256", "XL/2", "mdt", {}, *SHAPES["imagenet256"])
    assert "699,778,144 in the generator" in text and "207.59 G multiply-adds" in text and "ddpm, 250 steps" in text
    text = describe("digits", "S/2", "sddit", {"train.batch_size": 32}, *SHAPES["digits"])
    assert "in the projection head" in text and "at 32 images (fp32, 1 worker" in text
    assert "inferred: iBOT" in text and "# given" in text
