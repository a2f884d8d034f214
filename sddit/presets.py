"""Complete named experiments, as functions of size and method, and where each of their values comes from.

A preset is the defaults of `config` under layers of settings; every layer names its source. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sddit.config import METHOD_CONFIGS, Experiment, flatten
from sddit.errors import UsageError, did_you_mean


class Layer(NamedTuple):
    source: str
    settings: dict[str, Any]


def digits(size: str = "S/2", method: str = "sddit") -> Experiment:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey, ten classes: minutes on two cores."""
    return _build("digits", size, method)


def cifar10(size: str = "S/2", method: str = "sddit") -> Experiment:
    """CIFAR-10 in pixels, 32×32×3: hours on one GPU. Needs prepared data (`data.path`)."""
    return _build("cifar10", size, method)


def cifar10_latents(size: str = "S/2", method: str = "sddit") -> Experiment:
    """CIFAR-10 as 4×8×8 latents, scored on EfficientNet-Lite0's features: for two cores. Needs prepared
    data (`data.path`), and the same images in pixels (`eval.reference`)."""
    return _build("cifar10-latents", size, method)


def imagenet256(size: str = "XL/2", method: str = "sddit") -> Experiment:
    """ImageNet-1k at 256², as 4×32×32 latents, each method as its authors published it. Needs prepared data."""
    return _build("imagenet256", size, method)


PRESETS: dict[str, Callable[..., Experiment]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar10-latents": cifar10_latents,
    "imagenet256": imagenet256,
}


def preset(name: str) -> Callable[..., Experiment]:
    """The preset function of that name."""
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}. {did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def explain(name: str, size: str, method: str, changes: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(field, value, where it comes from) of a preset's experiment under `changes`, in the order of the fields."""
    experiment = preset(name)(size, method).replace(changes)
    sources = SOURCES | METHOD_SOURCES[method]
    for layer in _layers(name, size, method):
        sources |= dict.fromkeys(layer.settings, layer.source)
    sources |= dict.fromkeys(changes, "given")
    if experiment.eval.nfe and not experiment.eval.sampler_steps:
        sources |= dict.fromkeys(("eval.sampler", "eval.sampler_steps"), "follows from eval.nfe")
    elif "diffusion.kind" in changes:
        sources |= dict.fromkeys(("eval.sampler", "eval.sampler_steps"), "follows from diffusion.kind")
    resolved = experiment.digest_fields()  # what None stands for, and nothing of another formulation
    for field, value in flatten(experiment.model_dump(mode="json")).items():
        if not field.startswith("diffusion.") or field in resolved:
            yield field, resolved.get(field, value), sources.get(field, "default of this project")


def _build(name: str, size: str, method: str) -> Experiment:
    if method not in METHOD_CONFIGS:
        raise UsageError(f"Unknown method {method!r}. {did_you_mean(method, METHOD_CONFIGS)}")
    experiment = Experiment(method=METHOD_CONFIGS[method]())  # type: ignore[arg-type]
    return experiment.replace({k: v for layer in _layers(name, size, method) for k, v in layer.settings.items()})


def _layers(name: str, size: str, method: str) -> list[Layer]:
    layers = [Layer("asked size", {"model.size": size})]
    if name == "imagenet256":
        layers += [IMAGENET256, PUBLISHED[method]]
        return layers + ([PUBLISHED_LARGE[method]] if size == "XL/2" and method in PUBLISHED_LARGE else [])
    base, methods = OWN[name]
    return [*layers, base, *([methods[method]] if method in methods else [])]


# -------------------------------------------------------------------------------------------------------- imagenet256

IMAGENET256 = Layer(
    "ImageNet-1k at 256², latents of a diffusers AutoencoderKL",
    {"data.path": "data/imagenet256", "data.shape": (4, 32, 32), "data.num_classes": 1000},
)
PUBLISHED = {
    "dit": Layer("DiT (arXiv 2212.09748), train.py", {"data.flip": True, "train.steps": 400_000}),
    "maskdit": Layer(
        # fp16 was published; precision is never chosen behind the user's back: --set train.precision=bf16
        "MaskDiT (arXiv 2306.09305), training config at 256²",
        {"train.batch_size": 1024, "train.steps": 2_000_000},
    ),
    "mdt": Layer(
        "MDT (arXiv 2303.14389), scripts of v1", {"data.flip": True, "train.lr": 3e-4, "train.steps": 400_000}
    ),
    "sddit": Layer("SD-DiT (arXiv 2403.17004), Table 1", {"train.steps": 400_000}),
}
PUBLISHED_LARGE = {
    "dit": Layer("DiT (arXiv 2212.09748), XL/2", {"train.steps": 7_000_000}),
    "mdt": Layer("SD-DiT (arXiv 2403.17004), Table 2: MDT-XL/2", {"train.steps": 2_500_000}),
    "sddit": Layer("SD-DiT (arXiv 2403.17004), Table 2", {"train.steps": 2_400_000}),
}

# ------------------------------------------------------------------------------------------------------------ cifar10

CIFAR10 = Layer(
    "this project, for CIFAR-10",
    {
        "data.path": "data/cifar10",
        "data.shape": (3, 32, 32),
        "data.num_classes": 10,
        "data.flip": True,
        "train.steps": 100_000,
        "eval.every": 10_000,
        "eval.samples": 10_000,
        "eval.labels": "cyclic",
        "eval.nfe": 35,  # Heun with 18 steps, or DPM-Solver++ with 35
    },
)

CIFAR10_METHODS = {
    "sddit": Layer(
        "iBOT's epochs, at 195 steps each",
        {"method.tau_teacher_warmup_steps": 5_860, "method.prototype_freeze_steps": 195},
    ),
}

# ------------------------------------------------------------------------------------------------------------- digits

DIGITS = Layer(
    "this project, for digits",
    {
        "model.grid": "tiny",
        "model.decoder_depth": 2,
        "model.decoder_width": 64,
        "model.decoder_heads": 4,
        "diffusion.sigma_data": 0.75,  # the images' std is 0.752: the loss starts near 1
        "diffusion.p_mean": -0.8,
        "data.path": "digits",
        "train.steps": 600,
        "train.batch_size": 64,
        "train.lr": 7e-3,
        "train.warmup_steps": 50,
        "train.beta2": 0.99,
        "train.ema": "power:6.94",  # needs no horizon; 0.9999 would remember the start of 600 steps
        "train.log_every": 10,
        "eval.every": 200,
        "eval.samples": 1024,
        "eval.extractor": "digits-cnn",
        "eval.labels": "cyclic",
        "eval.nfe": 19,  # Heun with 10 steps, or DPM-Solver++ with 19
    },
)
DIGITS_METHODS = {
    "mdt": Layer("this project, for digits", {"method.decoder_layers": 1}),  # of two blocks or more
    "sddit": Layer(
        "this project, for digits",
        {
            "method.lambda_d": 0.1,
            "method.tau_teacher": 0.04,
            "method.tau_teacher_warmup_steps": 0,
            "method.centring": "sinkhorn",
            "method.teacher_momentum": 0.97,  # half-life near 1/25 of the run; CLS dies at 0.99
            "method.num_prototypes": 64,
            "method.head_hidden": 128,
            "method.head_bottleneck": 64,
            "method.head_init": "xavier",
            "method.prototype_freeze_steps": 0,
            "method.collapse_after": 200,
        },
    ),
}

# ---------------------------------------------------------------------------------------------------- cifar10-latents

CIFAR10_LATENTS = Layer(
    "this project, for latents of CIFAR-10",
    {
        "model.grid": "tiny",
        "model.decoder_depth": 2,
        "model.decoder_width": 64,
        "model.decoder_heads": 4,
        "diffusion.sigma_data": 1.0,  # the scaled latents' std
        "diffusion.p_mean": -0.5,  # EDM's −1.2 is for a std of 0.5
        "data.path": "data/cifar10-latents",
        "data.shape": (4, 8, 8),
        "data.num_classes": 10,
        "train.steps": 4000,
        "train.batch_size": 128,
        "train.lr": 3e-3,
        "train.warmup_steps": 100,
        "train.beta2": 0.99,
        "train.ema": "power:6.94",
        "train.log_every": 50,
        "eval.every": 1000,
        "eval.samples": 4096,
        "eval.extractor": "efficientnet-lite0",
        "eval.reference": "data/cifar10",
        "eval.labels": "cyclic",
        "eval.nfe": 19,
    },
)
CIFAR10_LATENTS_METHODS = {
    "mdt": Layer("this project, for latents of CIFAR-10", {"method.decoder_layers": 1}),
    "sddit": Layer(
        "this project, for latents of CIFAR-10",
        DIGITS_METHODS["sddit"].settings | {"method.teacher_momentum": 0.99, "method.collapse_after": 1000},
    ),
}

OWN = {  # neither published nor varying with size
    "digits": (DIGITS, DIGITS_METHODS),
    "cifar10": (CIFAR10, CIFAR10_METHODS),
    "cifar10-latents": (CIFAR10_LATENTS, CIFAR10_LATENTS_METHODS),
}

# ------------------------------------------------------------------------------------------- where defaults come from

_EDM = "EDM (arXiv 2206.00364)"
_DIT = "DiT (arXiv 2212.09748)"
_MASKDIT = "MaskDiT (arXiv 2306.09305)"
_MDT = "MDT (arXiv 2303.14389)"
_SDDIT = "SD-DiT (arXiv 2403.17004)"
_IBOT = "inferred: iBOT (arXiv 2111.07832)"
_ADM = "ADM's evaluation suite"
_SAMPLING = ("eval.sampler", "eval.sampler_steps", "eval.guidance_rule", "eval.guidance_channels")

SOURCES = {
    "method.name": "asked method",
    "diffusion.kind": "as the method was published",
    "model.grid": _DIT,
    **dict.fromkeys(("model.decoder_depth", "model.decoder_width", "model.decoder_heads"), _MASKDIT),
    **{f"diffusion.{name}": _EDM for name in ("sigma_data", "p_mean", "p_std", "sigma_min", "sigma_max", "rho")},
    **{f"diffusion.{name}": "DDPM (arXiv 2006.11239)" for name in ("timesteps", "beta_start", "beta_end")},
    **{
        f"train.{name}": _DIT
        for name in ("optimizer", "lr", "batch_size", "beta1", "beta2", "eps", "weight_decay", "ema", "precision")
    },
    **{f"eval.{name}": _ADM for name in ("samples", "extractor", "labels")},
    **dict.fromkeys(_SAMPLING, "as the method was published"),
    "eval.guidance_power": _MDT,
    "method.class_dropout": _DIT,
}
METHOD_SOURCES: dict[str, dict[str, str]] = {
    "dit": {},
    "maskdit": {f"method.{name}": _MASKDIT for name in ("mask_ratio", "mask_schedule", "lambda_mae")},
    "mdt": {f"method.{name}": f"{_MDT}, v1" for name in ("version", "mask_ratio", "decoder_layers")},
    "sddit": {
        **{f"method.{name}": "inferred: not in the paper" for name in METHOD_CONFIGS["sddit"].model_fields},
        "method.name": "asked method",
        "method.teacher_sigma": _SDDIT,
        "method.masked_slots": "inferred: MaskGWM (arXiv 2502.11663)",
        **{
            f"method.{name}": _IBOT
            for name in (
                "lambda_d", "tau_student", "tau_teacher", "tau_teacher_cls", "tau_teacher_start",
                "tau_teacher_warmup_steps", "centring", "centre_momentum", "num_prototypes", "head_layers",
                "head_hidden", "head_bottleneck", "head_init", "head_shared", "prototype_freeze_steps",
                "teacher_tokens",
            )
        },
        **{f"method.{name}": f"inferred: {_MASKDIT}" for name in ("decoder", "cls_init_std", "cls_in_decoder")},
        **dict.fromkeys(_SAMPLING, f"inferred: {_MASKDIT}"),
        **{f"train.{name}": f"inferred: {_DIT}" for name in ("optimizer", "lr", "beta1", "beta2", "eps", "ema")},
        "method.mask_ratio": "inferred: secondary sources on the paper",
        "method.teacher_momentum": "inferred: SRA (arXiv 2505.02831)",
        "method.class_dropout": f"inferred: {_DIT}",
    },
}  # fmt: skip
