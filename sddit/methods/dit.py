"""DiT trained under EDM: all tokens, one loss (methods.md §2.1, §3.2 and §3.3 with M = 0)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sddit.config import Experiment
from sddit.diffusion import edm
from sddit.methods.base import Batch, Draws, Losses, Method
from sddit.models import build_network


class DiTMethod(Method):
    def __init__(self, experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(experiment, shape, num_classes)
        self.network = build_network(experiment, shape, num_classes)

    def draws(self) -> Draws:
        return {"drop": ("uniform", ()), "sigma": ("normal", ()), "noise": ("normal", self.shape)}

    def forward(self, batch: Batch, context: Any, step: int) -> Losses:
        diffusion = self.experiment.diffusion
        sigma = edm.training_sigma(batch.draws["sigma"], diffusion.p_mean, diffusion.p_std)
        x = edm.network_input(batch.x0, batch.draws["noise"], sigma, diffusion.sigma_data)
        target = edm.raw_target(batch.x0, batch.draws["noise"], sigma, diffusion.sigma_data)
        output = self.network(x, sigma.log() / 4, self.drop_labels(batch))
        per_image = (output.float() - target).square().mean(dim=(1, 2, 3))
        total = per_image.mean()
        return Losses(total, per_image.detach(), {"generative": total.detach()})

    @torch.no_grad()
    def denoise(self, network: nn.Module, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        return edm.denoise(network, x, sigma, y, self.experiment.diffusion.sigma_data)
