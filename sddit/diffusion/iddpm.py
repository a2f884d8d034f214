"""IDDPM with learnt variance (Nichol & Dhariwal, arXiv 2102.09672), as DiT and MDT use it (methods.md §2.2).

Letters: t step index 0 … T - 1, ᾱ its share of signal, x_t = √ᾱ x0 + √(1 - ᾱ) eps, F = (ε̂, v) raw output of the
network: predicted noise and, in [-1, 1] but not clamped, where the variance lies between β̃ (-1) and β (1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sddit.config import Diffusion
from sddit.diffusion.base import Process


class Schedule:
    """The forward process on `betas` (T,), float64: every array is (T,) and indexed by t."""

    def __init__(self, betas: np.ndarray) -> None:
        self.betas = betas
        self.alphas_cumprod = np.cumprod(1 - betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = betas * (1 - previous) / (1 - self.alphas_cumprod)  # β̃
        # β̃ is 0 at t = 0: its logarithm there is that of t = 1.
        self.log_posterior_variance = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        # Mean of q(x_{t-1} | x_t, x0) = clean · x0 + noisy · x_t.
        self.posterior_clean = betas * np.sqrt(previous) / (1 - self.alphas_cumprod)
        self.posterior_noisy = (1 - previous) * np.sqrt(1 - betas) / (1 - self.alphas_cumprod)
        self.sigma = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)


def schedule(config: Diffusion) -> Schedule:
    """β linear from `beta_start` to `beta_end`, both included."""
    return Schedule(np.linspace(config.beta_start, config.beta_end, config.timesteps, dtype=np.float64))


def respaced(full: Schedule, steps: int) -> tuple[list[int], Schedule]:
    """`steps` of the T steps, evenly spaced, both ends included: their original indices, and the process on them."""
    last = len(full.betas) - 1
    indices = [round(k * (last / (steps - 1))) for k in range(steps)]
    kept = full.alphas_cumprod[indices]
    return indices, Schedule(1 - kept / np.append(1.0, kept[:-1]))


class IDDPM(Process):
    """The process of an experiment with `diffusion.kind` 'iddpm'. The level of an image is t, int64."""

    draws = {"t": ("uniform", ())}

    def __init__(self, config: Diffusion) -> None:
        super().__init__()
        self.config = config
        s = schedule(config)
        snr = s.alphas_cumprod / (1 - s.alphas_cumprod)
        weight = np.minimum(snr, config.min_snr_gamma or np.inf) / snr
        tables = {
            "signal": np.sqrt(s.alphas_cumprod),
            "noise": np.sqrt(1 - s.alphas_cumprod),
            "sigmas": s.sigma,
            "weight": weight,  # of the squared error: 1, or min(SNR, γ) / SNR (arXiv 2303.09556)
            "log_beta": np.log(s.betas),
            "log_posterior": s.log_posterior_variance,
            "clean": s.posterior_clean,
        }
        for name, table in tables.items():
            self.register_buffer(f"table_{name}", torch.tensor(table, dtype=torch.float32), persistent=False)

    def _at(self, name: str, t: Tensor) -> Tensor:
        return self.get_buffer(f"table_{name}")[t][:, None, None, None]

    def level(self, draws: Mapping[str, Tensor]) -> Tensor:
        """t uniform over all steps."""
        return (draws["t"] * self.config.timesteps).long().clamp(max=self.config.timesteps - 1)

    def level_of(self, sigma: Tensor) -> Tensor:
        return (self.get_buffer("table_sigmas").log() - sigma.log()[:, None]).abs().argmin(dim=1)

    def sigma(self, level: Tensor) -> Tensor:
        return self.get_buffer("table_sigmas")[level]

    def noisy(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        return self._at("signal", level) * x0 + self._at("noise", level) * eps

    def network_input(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        return self.noisy(x0, eps, level)

    def condition(self, level: Tensor) -> Tensor:
        return level.float()

    def error(self, output: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """(eps - ε̂)² + the variational bound's term at t in bits, through which only v learns."""
        predicted, v = output.float().chunk(2, dim=1)
        mse = (eps - predicted).square()
        if self.config.min_snr_gamma is not None:
            mse = self._at("weight", level) * mse
        return mse + self._bound(predicted.detach() - eps, v, x0, level)

    def _bound(self, miss: Tensor, v: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """t > 0: KL(q(x_{t-1} | x_t, x0) ‖ p). t = 0: -ln p(x0 | x_1), discretised as if to 8 bits.

        `miss` is ε̂ - eps.
        """
        log_beta, log_posterior = self._at("log_beta", t), self._at("log_posterior", t)
        log_variance = torch.lerp(log_posterior, log_beta, (v + 1) / 2)
        error = self._at("sigmas", t) * miss  # x0 minus what ε̂ takes for x0
        mean_error = self._at("clean", t) * error  # of the posterior's mean; x_t cancels
        kl = log_variance - log_posterior - 1 + (log_posterior - log_variance).exp()
        kl = 0.5 * (kl + mean_error.square() * (-log_variance).exp())
        likelihood = _discretised_log_likelihood(x0, mean_error, 0.5 * log_variance)
        return torch.where(t[:, None, None, None] == 0, -likelihood, kl) / math.log(2)

    def denoised(self, output: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        predicted = output.float().chunk(2, dim=1)[0]
        return x0 + self._at("sigmas", level) * (eps - predicted)

    def confidence(self, level: Tensor) -> Tensor:
        """ᾱ: an error of ε̂ is one of x̂0 σ times as large, up to 157."""
        return self.get_buffer("table_signal")[level].square()

    def evaluate(self, network: nn.Module, x: Tensor, level: Tensor, y: Tensor) -> Tensor:
        """F = (ε̂, v), (B, 2C, H, W)."""
        dtype = next(network.parameters()).dtype
        return network(x.to(dtype), level.to(dtype), y).to(x.dtype)


def _discretised_log_likelihood(x: Tensor, centred: Tensor, log_scale: Tensor) -> Tensor:
    """ln of a Gaussian's mass in the bin of half-width 1/255 around x; the outermost bins are open.

    `centred` is x minus the mean. With the tanh approximation of the normal distribution function, as published.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3))))

    precision = (-log_scale).exp()
    above, below = cdf(precision * (centred + 1 / 255)), cdf(precision * (centred - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
