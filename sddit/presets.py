"""Complete named experiments, as functions of size and method. Free of torch."""

from __future__ import annotations

from collections.abc import Callable

from sddit.config import METHOD_CONFIGS, Experiment
from sddit.errors import UsageError, did_you_mean


def digits(size: str = "S/2", method: str = "sddit") -> Experiment:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey, ten classes: minutes on two cores (methods.md §15)."""
    settings: dict = {
        "model.size": size,
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
        "eval.sampler_steps": 10,
    }
    if method == "sddit":
        settings |= {
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
        }
    return _base(method).replace(settings)


def cifar10(size: str = "S/2", method: str = "sddit") -> Experiment:
    """CIFAR-10 in pixels, 32×32×3: hours on one GPU. Needs prepared data (`data.path`)."""
    return _base(method).replace(
        {
            "model.size": size,
            "data.path": "data/cifar10",
            "data.shape": (3, 32, 32),
            "data.num_classes": 10,
            "data.flip": True,
            "train.steps": 100_000,
            "eval.every": 10_000,
            "eval.samples": 10_000,
            "eval.labels": "cyclic",
            "eval.sampler_steps": 18,
        }
    )


def imagenet256(size: str = "XL/2", method: str = "sddit") -> Experiment:
    """ImageNet-1k at 256², as 4×32×32 latents; the setting of the paper. Needs prepared data (`data.path`)."""
    return _base(method).replace(
        {
            "model.size": size,
            "data.path": "data/imagenet256",
            "data.shape": (4, 32, 32),
            "data.num_classes": 1000,
        }
    )


PRESETS: dict[str, Callable[..., Experiment]] = {"digits": digits, "cifar10": cifar10, "imagenet256": imagenet256}


def preset(name: str) -> Callable[..., Experiment]:
    """The preset function of that name."""
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}. {did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def _base(method: str) -> Experiment:
    if method not in METHOD_CONFIGS:
        raise UsageError(f"Unknown method {method!r}. {did_you_mean(method, METHOD_CONFIGS)}")
    return Experiment(method=METHOD_CONFIGS[method]())  # type: ignore[arg-type]
