"""MaskDiT: the diffusion loss on visible tokens, reconstruction of removed ones (arXiv 2306.09305; methods.md §3).

Published under EDM. Under IDDPM, where nothing bounds the denoised image, the reconstruction of an image is weighed
with its share of signal ᾱ: this project's choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sddit.config import Experiment
from sddit.config import MaskDiT as MaskDiTConfig
from sddit.methods.base import Batch, Draws, Losses, Method
from sddit.models import build_network, masking
from sddit.models.layers import Encoder, patchify

EPS = 1e-6  # under the root of a patch's variance


class MaskDiTMethod(Method):
    def __init__(self, experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(experiment, shape, num_classes)
        assert isinstance(experiment.method, MaskDiTConfig)
        self.options = experiment.method
        self.network = network = build_network(experiment, shape, num_classes)
        assert isinstance(network, Encoder)
        self.num_tokens, self.patch = network.num_tokens, network.patch
        largest = max(self.options.mask_ratio, self.options.mask_ratio_end if self.options.mask_horizon else 0.0)
        masking.keep_count(self.num_tokens, largest)  # says now that none would be left

    def draws(self) -> Draws:
        draws = super().draws()
        if self.options.mask_ratio or self.options.mask_horizon:
            draws["mask"] = ("uniform", (self.num_tokens,))
        return draws

    def begin_step(self, batches: list[Batch], step: int) -> list[Any]:
        """The masks."""
        keep = masking.keep_count(self.num_tokens, mask_ratio(self.options, step))
        if keep == self.num_tokens:
            return [None] * len(batches)
        return [masking.random_mask(batch.draws["mask"], keep) for batch in batches]

    def forward(self, batch: Batch, context: masking.Mask | None, step: int) -> Losses:
        process, x0, eps = self.process, batch.x0, batch.draws["noise"]
        level = process.level(batch.draws)
        y = self.drop_labels(batch.y, batch.draws["drop"])
        output = self.predict(self.network, x0, eps, level, y, context)
        error = process.error(output, x0, eps, level)
        if context is None:
            per_image = error.mean(dim=(1, 2, 3))
            total = per_image.mean()
            return Losses(total, per_image.detach(), {"generative": total.detach()})
        visible = masked_mean(patchify(error, self.patch).mean(dim=2), 1 - context.removed)
        parts = {"generative": visible.detach().mean()}
        per_image = visible
        if self.options.lambda_mae:
            denoised = process.denoised(output, x0, eps, level)
            token_errors = reconstruction_error(denoised, process.noisy(x0, eps, level), self.patch)
            mae = masked_mean(token_errors, context.removed) * process.confidence(level)
            parts["mae"] = mae.detach().mean()
            per_image = visible + self.options.lambda_mae * mae
        return Losses(per_image.mean(), per_image.detach(), parts)


def mask_ratio(options: MaskDiTConfig, step: int) -> float:
    """M at a step: constant, or from `mask_ratio` to `mask_ratio_end` over `mask_horizon` steps.

    By these curves the authors unmask in a fine-tune from trained weights; here they start at step 0.
    """
    if options.mask_horizon is None:
        return options.mask_ratio
    x = min(step / options.mask_horizon, 1.0)
    share = {
        "linear": 1 - x,
        "cosine4": math.cos(math.pi * x / 2) ** 4,
        "exp": math.exp(-7 * x),
    }[options.mask_schedule]
    return options.mask_ratio_end + (options.mask_ratio - options.mask_ratio_end) * share


def reconstruction_error(denoised: Tensor, noisy: Tensor, patch: int) -> Tensor:
    """Squared distance of each patch of the denoised image to the *noisy* patch, standardised by itself: (B, N).

    The target's and the prediction's scales differ, as published; the variance is the unbiased one.
    """
    target = patchify(noisy, patch)
    variance, mean = torch.var_mean(target, dim=2, keepdim=True)
    return (patchify(denoised, patch) - (target - mean) * (variance + EPS).rsqrt()).square().mean(dim=2)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row (B, N) over the places where `mask` (B, N) is 1: (B,)."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)
