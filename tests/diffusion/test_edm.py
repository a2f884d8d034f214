"""Oracles of methods.md §12.1 and of the EDM part of §12.2."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sddit import seeding
from sddit.diffusion import edm

TABLE = [  # σ, c_skip, c_out, c_in, c_noise, λ at σ_data = 0.5
    (0.002, 0.999984, 0.001999984, 1.999984, -1.55365202, 250004),
    (0.1, 0.961538462, 0.0980580676, 1.96116135, -0.575646273, 104),
    (0.5, 0.5, 0.353553391, 1.41421356, -0.173286795, 8),
    (1, 0.2, 0.447213595, 0.894427191, 0, 5),
    (2, 0.0588235294, 0.48507125, 0.48507125, 0.173286795, 4.25),
    (80, 3.90609742e-5, 0.499990235, 0.0124997559, 1.09550666, 4.00015625),
]
sigmas = st.floats(1e-3, 100.0)


@pytest.mark.parametrize("row", TABLE)
def test_coefficients(row: tuple[float, ...]) -> None:
    sigma, *expected = row
    s = torch.tensor([sigma], dtype=torch.float64)
    values = [float(v) for v in edm.coefficients(s, 0.5)] + [float(edm.weight(s, 0.5))]
    assert values == pytest.approx(expected, rel=2e-8, abs=1e-12)
    single = [float(v) for v in edm.coefficients(s.float(), 0.5)] + [float(edm.weight(s.float(), 0.5))]
    assert single == pytest.approx(expected, rel=2e-6, abs=1e-7)


@given(sigmas, st.floats(0.1, 2.0))
def test_identities(sigma: float, sigma_data: float) -> None:
    s = torch.tensor(sigma, dtype=torch.float64)
    c = edm.coefficients(s, sigma_data)
    assert float(edm.weight(s, sigma_data) * c.out**2) == pytest.approx(1)
    assert float(c.skip) == pytest.approx(float(sigma_data**2 * c.input**2))
    assert float(c.out) == pytest.approx(float(sigma * sigma_data * c.input))


def test_training_law() -> None:
    sigma = edm.training_sigma(torch.from_numpy(seeding.normal(0, "sigma", 0, 0, 200_000)).double(), -1.2, 1.2)
    assert float(sigma.median()) == pytest.approx(0.301194, rel=0.01)
    assert float(sigma.log().std()) == pytest.approx(1.2, rel=0.01)
    # E[λ] = 4 + exp(2.4 + 2.88), by quadrature over the normal draw.
    z, w = np.polynomial.hermite_e.hermegauss(80)
    weights = edm.weight(edm.training_sigma(torch.from_numpy(z), -1.2, 1.2), 0.5)
    assert float((weights * torch.from_numpy(w)).sum() / math.sqrt(2 * math.pi)) == pytest.approx(200.36988, rel=1e-6)


@given(sigmas, st.floats(0.3, 1.0), st.integers(0, 1000))
def test_loss_on_raw_outputs_is_the_weighted_denoising_loss(sigma: float, sigma_data: float, seed: int) -> None:
    x0, eps, f = torch.randn(3, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    s = torch.tensor([sigma], dtype=torch.float64)
    c = edm.coefficients(s, sigma_data)
    x = x0 + sigma * eps
    torch.testing.assert_close(edm.network_input(x0, eps, s, sigma_data), c.input * x)
    error = edm.weight(s, sigma_data) * (c.skip * x + c.out * f - x0).square()
    torch.testing.assert_close((f - edm.raw_target(x0, eps, s, sigma_data)).square(), error, rtol=1e-6, atol=1e-8)


def test_raw_target_is_exact_in_float32_near_the_data() -> None:
    x0, eps = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.full((4,), 0.002, dtype=torch.float64)
    exact = edm.raw_target(x0, eps, s, 0.5)
    torch.testing.assert_close(
        edm.raw_target(x0.float(), eps.float(), s.float(), 0.5).double(), exact, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("q", "mean"), [(0.25, 1.0), (0.0, 0.63394), (0.7, 1.65891), (1.0, 2.09819)])
def test_loss_of_an_untrained_network(q: float, mean: float) -> None:
    """E over eps of (0 - raw_target)² is (σ² q/σ_d² + σ_d²)/(σ² + σ_d²); then over the training law."""
    x0 = torch.full((1, 1, 1, 2), math.sqrt(q), dtype=torch.float64)
    eps = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 1, 2)  # mean 0, mean square 1
    z, w = np.polynomial.hermite_e.hermegauss(120)
    sigma = edm.training_sigma(torch.from_numpy(z), -1.2, 1.2)
    loss = edm.raw_target(x0, eps, sigma, 0.5).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, (sigma**2 * q / 0.25 + 0.25) / (sigma**2 + 0.25))
    assert float((loss * torch.from_numpy(w)).sum() / math.sqrt(2 * math.pi)) == pytest.approx(mean, abs=6e-6)


def test_denoise_runs_the_network_in_its_own_dtype() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.seen = x.dtype, noise, y
            return self.weight * x

    network, x, y = Network(), torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    result = edm.denoise(network, x, sigma, y, 0.5)
    dtype, noise, labels = network.seen
    assert dtype == noise.dtype == torch.float32 and labels is y and result.dtype == torch.float64
    torch.testing.assert_close(noise, sigma.log().float() / 4)
    c = edm.coefficients(sigma[:, None, None, None], 0.5)
    torch.testing.assert_close(result, c.skip * x + c.out * (c.input * x).float())


@pytest.mark.parametrize(
    ("n", "first", "last"),
    [
        (40, [80, 69.45094604, 60.11739476], [0.00643711, 0.00367659, 0.002]),
        (18, [80, 57.58598472, 40.7855738], [0.02293452, 0.00752802, 0.002]),
    ],
)
def test_grid(n: int, first: list[float], last: list[float]) -> None:
    grid = edm.sigma_grid(n, 0.002, 80, 7)
    assert len(grid) == n
    assert grid[:3] == pytest.approx(first, rel=1e-8)
    assert grid[-3:] == pytest.approx(last, abs=6e-9)
    if n == 40:
        assert grid[20] == pytest.approx(2.24043976, rel=1e-8)
