"""From noise to images with a denoiser; knows nothing of networks or methods.

The noise levels are Python floats, so that the host never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), σ (B,)) → D(x; σ)
ClassDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, σ, y (B,)) → D(x; σ, y)


def heun(
    denoise: Denoiser,
    noise: Tensor,
    *,
    sigmas: Sequence[float],
    churn: float = 0.0,
    churn_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """EDM's second-order solver (arXiv 2206.00364, algorithms 1 and 2) on `sigmas`, then 0: float64 images.

    Calls `denoise` 2·len(sigmas) - 1 times: the last step, to σ = 0, is Euler's. The state is float64.

    Args:
        noise: (B, ...) standard normal; the start is sigmas[0] times it.
        churn: S_churn. Above 0, step i first adds noise from `churn_noise(i)` (B, ...); S_min 0, S_max ∞, S_noise 1.
    """
    if churn and churn_noise is None:
        raise ValueError(f"churn is {churn}, but there is no churn_noise. Give a function from the step to noise.")

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoise(x, x.new_full((len(x),), sigma))) / sigma

    gamma = min(churn / len(sigmas), math.sqrt(2) - 1)
    x = noise.double() * sigmas[0]
    for i, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        if gamma and churn_noise:
            raised = sigma * (1 + gamma)
            x = x + math.sqrt(raised**2 - sigma**2) * churn_noise(i).double()
            sigma = raised
        d = slope(x, sigma)
        euler = x + (following - sigma) * d
        x = x + (following - sigma) * (d + slope(euler, following)) / 2 if following else euler
    return x


def guided(denoise: ClassDenoiser, y: Tensor, null: int, scale: float) -> Denoiser:
    """Classifier-free guidance on all channels: D(null) + scale (D(y) - D(null)), both in one call of `denoise`.

    Scale 1 is the conditional denoiser itself, at half the cost; 0 the unconditional one.
    """
    if scale == 1:
        return lambda x, sigma: denoise(x, sigma, y)
    labels = torch.cat([y, torch.full_like(y, null)])

    def both(x: Tensor, sigma: Tensor) -> Tensor:
        conditional, unconditional = denoise(x.repeat(2, *[1] * (x.ndim - 1)), sigma.repeat(2), labels).chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return both
