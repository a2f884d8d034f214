"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as each method was published (methods.md §2.4 to §4.4).

A level is a Python number, σ or t, the same for all images of a batch: the host decides whether a step is guided at
all, and never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sddit.config import Experiment
from sddit.diffusion import build_process

Classes = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (B, C, ...), level (B,), y (B,)) → D, or F = (ε̂, v)
Evaluate = Callable[[Tensor, float], Tensor]  # (x (B, C, ...), level) → the same


def guided(evaluate: Classes, y: Tensor, null: int, scale: Callable[[float], float], channels: int) -> Evaluate:
    """The first `channels` channels are u + scale(level) (c - u), the others c; c is given `y`, u the class `null`.

    Both come from one call of `evaluate`. Where the scale is 1 that is c, at half the cost; 0 is u.
    """
    labels = torch.cat([y, torch.full_like(y, null)])

    def both(x: Tensor, level: float) -> Tensor:
        w = scale(level)
        # t stays an integer, as the tables of IDDPM want it.
        levels = torch.full_like(labels, level, dtype=torch.int64 if isinstance(level, int) else x.dtype)
        if w == 1:
            return evaluate(x, levels[: len(x)], y)
        c, u = evaluate(x.repeat(2, *[1] * (x.ndim - 1)), levels, labels).chunk(2)
        return torch.cat([torch.lerp(u[:, :channels], c[:, :channels], w), c[:, channels:]], dim=1)

    return both


def scale_rule(experiment: Experiment) -> Callable[[float], float]:
    """The guidance scale at each level by `eval.guidance`, its rule and its interval of σ."""
    options, (rule, _) = experiment.eval, experiment.guidance_rule
    process = build_process(experiment.diffusion)  # on the host, whatever the device of the method's own

    def scale(level: float) -> float:
        if options.guidance_interval is not None:
            low, high = options.guidance_interval
            dtype = torch.int64 if isinstance(level, int) else torch.float64
            if not low < float(process.sigma(torch.tensor(level, dtype=dtype))) <= high:
                return 1.0
        if rule == "power-cosine":
            return power_cosine(level, experiment.diffusion.timesteps, options.guidance, options.guidance_power)
        return options.guidance

    return scale


def power_cosine(t: float, timesteps: int, largest: float, power: float) -> float:
    """MDT's scale (arXiv 2303.14389): 1 + (largest - 1) ½ (1 - cos(π (1 - t/T)^power)), 1 at noise, `largest` at t = 0.

    t is the index among all T steps, whatever steps are kept.
    """
    return 1 + (largest - 1) * (1 - math.cos(math.pi * (1 - t / timesteps) ** power)) / 2
