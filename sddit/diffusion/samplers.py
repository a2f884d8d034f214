"""From noise to images with a guided or plain network; knows nothing of networks or methods.

A sampler asks ``evaluate(x, level)`` for D under EDM and for F = (ε̂, v) under IDDPM, x (B, C, ...) and the level a
Python number. It keeps its state in float64 and every coefficient on the host, which so never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sddit.config import Experiment
from sddit.diffusion import edm, iddpm
from sddit.diffusion.guidance import Evaluate


def solve(experiment: Experiment, evaluate: Evaluate, noise: Callable[[str, int], Tensor]) -> Tensor:
    """Images (B, C, ...), float64, by the experiment's sampler.

    `noise` gives standard normal draws (B, C, ...) by stream and solver step: 'noise' at 0 is the start, 'churn' and
    'ancestral' are what a step adds.
    """
    diffusion, (name, steps) = experiment.diffusion, experiment.solver
    start = noise("noise", 0)
    if name in ("heun", "euler"):
        return karras(
            evaluate,
            start,
            sigmas=edm.sigma_grid(steps, diffusion.sigma_min, diffusion.sigma_max, diffusion.rho),
            order=2 if name == "heun" else 1,
            churn=experiment.eval.churn,
            churn_noise=lambda i: noise("churn", i),
        )
    schedule = iddpm.schedule(diffusion)
    if name == "ddpm":
        return ancestral(evaluate, start, schedule=schedule, steps=steps, step_noise=lambda i: noise("ancestral", i))
    return (ddim if name == "ddim" else dpm_solver)(evaluate, start, betas=schedule.betas, steps=steps)


# ----------------------------------------------------------------------------------------------------------------- EDM


def karras(
    evaluate: Evaluate,
    noise: Tensor,
    *,
    sigmas: Sequence[float],
    order: int = 2,
    churn: float = 0.0,
    churn_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """EDM's solver (arXiv 2206.00364, algorithms 1 and 2) on `sigmas`, then 0: Heun, or Euler where `order` is 1.

    Calls `evaluate` 2·len(sigmas) - 1 times, since the last step, to σ = 0, is Euler's; len(sigmas) times by Euler.

    Args:
        noise: (B, ...) standard normal; the start is sigmas[0] times it.
        churn: S_churn. Above 0, step i first adds noise from `churn_noise(i)` (B, ...); S_min 0, S_max ∞, S_noise 1.
    """
    if churn and churn_noise is None:
        raise ValueError(f"churn is {churn}, but there is no churn_noise. Give a function from the step to noise.")

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - evaluate(x, sigma)) / sigma

    gamma = min(churn / len(sigmas), math.sqrt(2) - 1)
    x = noise.double() * sigmas[0]
    for i, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        if gamma and churn_noise:
            raised = sigma * (1 + gamma)
            x = x + math.sqrt(raised**2 - sigma**2) * churn_noise(i).double()
            sigma = raised
        d = slope(x, sigma)
        euler = x + (following - sigma) * d
        x = x + (following - sigma) * (d + slope(euler, following)) / 2 if following and order == 2 else euler
    return x


# --------------------------------------------------------------------------------------------------------------- IDDPM


def ancestral(
    evaluate: Evaluate,
    noise: Tensor,
    *,
    schedule: iddpm.Schedule,
    steps: int,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Ancestral sampling with learnt variance on `steps` kept steps (Nichol & Dhariwal, arXiv 2102.09672, §3 and §4).

    x' = μ(x, ε̂) + exp(½ (s ln β + (1 - s) ln β̃)) z with s = (v + 1)/2 and z from ``step_noise(i)``, i = 0 … steps - 2;
    the last step adds none. `evaluate` is given original indices. x̂0 is not clipped.

    Own code although diffusers' DDPMScheduler computes the same step: that one draws z itself, so that a sample would
    depend on the batch and on the device it is made on.
    """
    indices, kept = iddpm.respaced(schedule, steps)
    x = noise.double()
    for i, k in enumerate(reversed(range(steps))):
        eps, v = evaluate(x, indices[k]).chunk(2, dim=1)
        clean, noisy, share = (
            float(table[k]) for table in (kept.posterior_clean, kept.posterior_noisy, kept.alphas_cumprod)
        )
        x = clean * (x / math.sqrt(share) - float(kept.sigma[k]) * eps) + noisy * x
        if k:
            low, high = float(kept.log_posterior_variance[k]), math.log(kept.betas[k])
            x = x + (0.5 * (low + (v + 1) / 2 * (high - low))).exp() * step_noise(i).double()
    return x


def ddim(evaluate: Evaluate, noise: Tensor, *, betas: np.ndarray, steps: int) -> Tensor:
    """DDIM with η = 0 (Song et al., arXiv 2010.02502, equation 12), by diffusers: x̂0 and ε̂ move to the step before.

    The steps are the published ``ddimN`` stride, t = 0, s, 2s, … with s = T // N, and end on x̂0 at t = 0: 'leading' is
    the only spacing whose neighbours are the step that the scheduler takes, T // N. Its coefficients are float32.
    """
    # Slow to import, and most experiments never need it.
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(len(betas), trained_betas=betas, clip_sample=False, timestep_spacing="leading")
    return _by_diffusers(scheduler, evaluate, noise, steps)


def dpm_solver(evaluate: Evaluate, noise: Tensor, *, betas: np.ndarray, steps: int) -> Tensor:
    """DPM-Solver++ (2M) (Lu et al., arXiv 2211.01095, algorithm 2), by diffusers, evenly spaced in t from T - 1.

    The last step, from t ≈ T / N, goes to x̂0. Even spacing in t is its authors' advice for latents and large images.
    The scheduler rounds the state to float32 at each step, and its coefficients are float32.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        len(betas),
        trained_betas=betas,
        solver_order=2,
        algorithm_type="dpmsolver++",
        timestep_spacing="linspace",
        final_sigmas_type="zero",
    )
    return _by_diffusers(scheduler, evaluate, noise, steps)


def _by_diffusers(scheduler: Any, evaluate: Evaluate, noise: Tensor, steps: int) -> Tensor:
    """Follows ε̂ alone. The scheduler's tables stay on the host, as scalars that a device takes without waiting."""
    scheduler.set_timesteps(steps)
    x = noise.double()
    for t in scheduler.timesteps.tolist():
        eps, _ = evaluate(x, t).chunk(2, dim=1)
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x
