"""Oracles of methods.md §12.1 on Heun's method and §12.6 on guidance."""

import math

import pytest
import torch
from torch import Tensor

from sddit.diffusion import edm, samplers

NOISE = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def grid(n: int) -> list[float]:
    return edm.sigma_grid(n, 0.002, 80, 7)


@pytest.mark.parametrize(("n", "evaluations"), [(10, 19), (18, 35), (40, 79), (50, 99)])
@pytest.mark.parametrize("churn", [0.0, 30.0])
def test_a_perfect_denoiser_gives_its_image(n: int, evaluations: int, churn: float) -> None:
    x0 = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    calls = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x.dtype, sigma.shape))
        return x0

    result = samplers.heun(denoise, NOISE, sigmas=grid(n), churn=churn, churn_noise=lambda i: NOISE)
    assert len(calls) == evaluations and set(calls) == {(torch.float64, (5,))}
    torch.testing.assert_close(result, x0, rtol=0, atol=1e-12)


def test_gaussian_data_follow_the_exact_solution() -> None:
    """With D = c_skip x the exact flow scales x(σ) by √(σ² + σ_d²)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return edm.coefficients(sigma, 0.5).skip[:, None, None, None] * x

    exact = NOISE.double() * 80 * 0.5 / math.sqrt(80**2 + 0.25)
    errors = [
        ((samplers.heun(denoise, NOISE, sigmas=grid(n)) - exact).abs().max() / exact.abs().max()).item()
        for n in (20, 40, 80)
    ]
    assert errors[2] < errors[1] < errors[0] < 0.05
    assert errors[1] / errors[2] > 3  # of second order


def test_one_step_by_hand() -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma[:, None, None, None])

    x = NOISE.double() * 4
    d = (x - x / 5) / 4
    euler = x + (1 - 4) * d
    x = x + (1 - 4) * (d + (euler - euler / 2) / 1) / 2
    expected = x / 2  # last step: Euler to 0 lands on the denoised image
    torch.testing.assert_close(samplers.heun(denoise, NOISE, sigmas=[4.0, 1.0]), expected)


def test_churn_raises_the_noise_first() -> None:
    seen, asked = [], []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((float(sigma[0]), x))
        return torch.zeros_like(x)

    def churn_noise(i: int) -> Tensor:
        asked.append(i)
        return torch.ones_like(NOISE)

    samplers.heun(denoise, NOISE, sigmas=[4.0, 1.0], churn=0.5, churn_noise=churn_noise)
    assert asked == [0, 1]
    assert seen[0][0] == pytest.approx(5.0)  # γ = 0.5 / 2
    torch.testing.assert_close(seen[0][1], NOISE.double() * 4 + 3)  # √(5² - 4²)
    samplers.heun(denoise, NOISE, sigmas=[4.0, 1.0], churn=99, churn_noise=churn_noise)
    assert seen[-3][0] == pytest.approx(4 * math.sqrt(2))  # γ is at most √2 - 1
    with pytest.raises(ValueError, match="no churn_noise"):
        samplers.heun(denoise, NOISE, sigmas=[4.0, 1.0], churn=1.0)


class Labelled:
    """D(x; σ, y) = x · y, and what it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(sigma) == len(y)
        self.batches.append(len(x))
        return x * y[:, None, None, None]


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 5), (0.0, 10), (1.5, 10), (4.0, 10)])
def test_guidance(scale: float, batch: int) -> None:
    denoise, y, x, sigma = Labelled(), torch.arange(5), NOISE.double(), torch.ones(5)
    conditional, unconditional = x * y[:, None, None, None], x * 10
    guided = samplers.guided(denoise, y, 10, scale)
    result = guided(x, sigma)
    assert denoise.batches == [batch]  # one call; half the cost without guidance
    torch.testing.assert_close(result, unconditional + scale * (conditional - unconditional))
    if scale in (0, 1):
        assert torch.equal(result, conditional if scale else unconditional)
