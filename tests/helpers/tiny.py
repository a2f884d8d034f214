"""Experiments that take a second: the real preset with fewer steps, images and samples."""

from sddit import presets
from sddit.config import Experiment

TINY = {
    "train.steps": 6,
    "train.batch_size": 16,
    "train.log_every": 2,
    "train.warmup_steps": 2,
    "method.collapse_after": 0,
    "eval.every": 3,
    "eval.samples": 80,
    "eval.sampler_steps": 2,
    "eval.grid": 20,
}


def experiment(method: str = "sddit", **changes: object) -> Experiment:
    """The digits preset, tiny; `changes` are given with '__' for the dot."""
    base = presets.digits(method=method)
    tiny = {k: v for k, v in TINY.items() if k != "method.collapse_after" or method == "sddit"}
    return base.replace(tiny | {k.replace("__", "."): v for k, v in changes.items()})


def set_flags(**changes: object) -> list[str]:
    """The same as `--set` flags of a command, without the steps."""
    values = {k: v for k, v in TINY.items() if k != "train.steps"} | {
        k.replace("__", "."): v for k, v in changes.items()
    }
    return [flag for k, v in values.items() for flag in ("--set", f"{k}={v}")]
