"""The training methods by name; `build_method` makes the one of an experiment."""

from __future__ import annotations

from sddit.config import Experiment
from sddit.methods.base import Method
from sddit.methods.dit import DiTMethod
from sddit.methods.maskdit import MaskDiTMethod
from sddit.methods.mdt import MDTMethod
from sddit.methods.sddit import SDDiTMethod

METHODS: dict[str, type[Method]] = {
    "dit": DiTMethod,
    "maskdit": MaskDiTMethod,
    "mdt": MDTMethod,
    "sddit": SDDiTMethod,
}


def build_method(experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> Method:
    """The method of an experiment on (C, H, W) inputs, with its initial weights (a function of `seed` alone)."""
    return METHODS[experiment.method.name](experiment, shape, num_classes)
