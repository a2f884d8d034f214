"""EDM (Karras et al., arXiv 2206.00364): preconditioning, training law and noise grid (methods.md §3.2).

Letters: x0 clean image (B, C, H, W), eps unit noise, σ noise std (B,), x = x0 + σ eps, F raw output of the network,
D(x; σ, y) = c_skip x + c_out F(c_in x; ln(σ)/4, y) the denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sddit.config import Diffusion
from sddit.diffusion.base import Process


class Coefficients(NamedTuple):
    """Each of the shape of σ."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float) -> Coefficients:
    """c_skip, c_out, c_in, c_noise."""
    c_in = (sigma.square() + sigma_data**2).rsqrt()
    return Coefficients((sigma_data * c_in).square(), sigma_data * sigma * c_in, c_in, sigma.log() / 4)


def weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """λ(σ) = (σ² + σ_data²) / (σ σ_data)² = 1 / c_out²."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def training_sigma(normal: Tensor, p_mean: float, p_std: float) -> Tensor:
    """σ with ln σ ~ N(p_mean, p_std²) from standard normal draws; unclipped, as published."""
    return (p_mean + p_std * normal).exp()


def network_input(x0: Tensor, eps: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """c_in (x0 + σ eps)."""
    sigma = sigma[:, None, None, None]
    return torch.addcmul(x0, eps, sigma) * (sigma.square() + sigma_data**2).rsqrt()


def raw_target(x0: Tensor, eps: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The F that denoises exactly: (F - raw_target)² = λ(σ) (D(x) - x0)².

    (x0 - c_skip x) / c_out with the terms that cancel at small σ cancelled by hand: c_in (σ x0 / σ_data - σ_data eps).
    """
    sigma = sigma[:, None, None, None]
    c_in = (sigma.square() + sigma_data**2).rsqrt()
    return x0 * (sigma * c_in / sigma_data) - eps * (sigma_data * c_in)


def denoise(network: nn.Module, x: Tensor, sigma: Tensor, y: Tensor, sigma_data: float) -> Tensor:
    """D(x; σ, y) in the dtype of x (B, C, H, W); the network runs in that of its parameters. σ (B,)."""
    c = coefficients(sigma.to(x.dtype), sigma_data)
    skip, out, c_in = (k[:, None, None, None] for k in c[:3])
    dtype = next(network.parameters()).dtype
    return torch.addcmul(skip * x, out, network((c_in * x).to(dtype), c.noise.to(dtype), y).to(x.dtype))


def sigma_grid(n: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """n noise levels from σ_max down to σ_min, evenly spaced in σ^(1/ρ); the final 0 is the sampler's own."""
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(hi + i / (n - 1) * (lo - hi)) ** rho for i in range(n)]


class EDM(Process):
    """The process of an experiment with `diffusion.kind` 'edm'. The level of an image is its σ, float32."""

    draws = {"sigma": ("normal", ())}

    def __init__(self, config: Diffusion) -> None:
        super().__init__()
        self.config = config

    def level(self, draws: Mapping[str, Tensor]) -> Tensor:
        return training_sigma(draws["sigma"], self.config.p_mean, self.config.p_std)

    def level_of(self, sigma: Tensor) -> Tensor:
        return sigma

    def sigma(self, level: Tensor) -> Tensor:
        return level

    def noisy(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        return torch.addcmul(x0, eps, level[:, None, None, None])

    def network_input(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        return network_input(x0, eps, level, self.config.sigma_data)

    def condition(self, level: Tensor) -> Tensor:
        return level.log() / 4

    def error(self, output: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """λ(σ) (D - x0)²."""
        return (output.float() - raw_target(x0, eps, level, self.config.sigma_data)).square()

    def denoised(self, output: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        c_out = coefficients(level, self.config.sigma_data).out[:, None, None, None]
        return x0 + c_out * (output.float() - raw_target(x0, eps, level, self.config.sigma_data))

    def confidence(self, level: Tensor) -> Tensor:
        """1: the preconditioning bounds D."""
        return torch.ones_like(level)

    def evaluate(self, network: nn.Module, x: Tensor, level: Tensor, y: Tensor) -> Tensor:
        """D(x; σ, y)."""
        return denoise(network, x, level, y, self.config.sigma_data)
