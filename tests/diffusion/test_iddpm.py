"""Oracles of methods.md §12.5 and of the IDDPM part of §12.2, and the loss against its definition in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sddit import seeding
from sddit.config import Diffusion
from sddit.diffusion import build_process, iddpm

FULL = iddpm.schedule(Diffusion(kind="iddpm"))
PROCESS = iddpm.IDDPM(Diffusion(kind="iddpm"))
steps = st.integers(0, 999)
betas = st.lists(st.floats(1e-4, 0.5), min_size=2, max_size=30).map(np.array)


def images(value: float, t: int | list[int], channels: int = 1) -> tuple[Tensor, Tensor]:
    """Constant images (B, C, 2, 2), and their steps (B,)."""
    t = torch.tensor([t] if isinstance(t, int) else t)
    return torch.full((len(t), channels, 2, 2), value), t


# ------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("table", "t", "value"),
    [
        ("betas", 0, 1e-4),
        ("betas", 1, 1.1991992e-4),
        ("betas", 999, 0.02),
        ("alphas_cumprod", 0, 0.9999),
        ("alphas_cumprod", 499, 0.0785872429),
        ("alphas_cumprod", 500, 0.0777966584),
        ("alphas_cumprod", 999, 4.03582977e-5),
        ("sigma", 0, 0.0100005),
        ("sigma", 500, 3.44296711),
        ("sigma", 999, 157.407281),
        ("log_posterior_variance", 0, -9.81672514),
        ("log_posterior_variance", 1, -9.81672514),
    ],
)
def test_published_schedule(table: str, t: int, value: float) -> None:
    assert getattr(FULL, table)[t] == pytest.approx(value, rel=2e-7)
    assert len(getattr(FULL, table)) == 1000 and getattr(FULL, table).dtype == np.float64


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [
        (250, [0, 4, 8, 12, 16, 20], [991, 995, 999]),
        (50, [0, 20, 41, 61], [958, 979, 999]),
        (1000, [0, 1, 2], [997, 998, 999]),
        (2, [0], [999]),
    ],
)
def test_kept_steps(count: int, first: list[int], last: list[int]) -> None:
    indices, kept = iddpm.respaced(FULL, count)
    assert len(indices) == len(set(indices)) == count and {type(i) for i in indices} == {int}
    assert indices[: len(first)] == first and indices[-len(last) :] == last
    np.testing.assert_allclose(kept.alphas_cumprod, FULL.alphas_cumprod[indices], rtol=1e-12)
    if count == 250:
        assert kept.betas[[0, 1, 249]] == pytest.approx([1e-4, 5.99065564e-4, 7.75193450e-2], rel=2e-8)


@pytest.mark.parametrize("count", [10, 25, 50, 100, 250])
def test_kept_steps_are_those_of_the_published_code(count: int) -> None:
    """Which adds up the stride; where that lands on a half by rounding, some other counts differ by one index."""
    position, expected = 0.0, []
    for _ in range(count):
        expected.append(round(position))
        position += 999 / (count - 1)
    assert iddpm.respaced(FULL, count)[0] == expected


@given(betas)
def test_posterior_is_bayes_rule(betas: np.ndarray) -> None:
    """q(x_{t-1} | x_t, x0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x0): precisions add, and so do means times precisions."""
    s = iddpm.Schedule(betas)
    for t in range(1, len(betas)):
        before = math.prod(1 - betas[:t])
        assert s.alphas_cumprod[t - 1] == pytest.approx(before)
        precision = (1 - betas[t]) / betas[t] + 1 / (1 - before)
        assert s.posterior_variance[t] == pytest.approx(1 / precision)
        assert math.exp(s.log_posterior_variance[t]) == pytest.approx(1 / precision)
        assert s.posterior_noisy[t] == pytest.approx(math.sqrt(1 - betas[t]) / betas[t] / precision)
        assert s.posterior_clean[t] == pytest.approx(math.sqrt(before) / (1 - before) / precision)
        assert s.posterior_variance[t] <= betas[t]
    assert s.posterior_variance[0] == 0 == s.posterior_noisy[0] and s.posterior_clean[0] == pytest.approx(1)
    assert s.log_posterior_variance[0] == s.log_posterior_variance[1]


@given(st.integers(0, 20), betas.filter(lambda b: len(b) > 5), st.integers(2, 6))
def test_respacing_composes_steps(seed: int, betas: np.ndarray, count: int) -> None:
    """A kept step is the product of what it replaces, and keeping all changes nothing."""
    s = iddpm.Schedule(betas)
    indices, kept = iddpm.respaced(s, count)
    for k in range(1, count):
        assert 1 - kept.betas[k] == pytest.approx(math.prod(1 - betas[indices[k - 1] + 1 : indices[k] + 1]))
    np.testing.assert_allclose(iddpm.respaced(s, len(betas))[1].betas, betas, rtol=1e-9)


# --------------------------------------------------------------------------------------------------------------- levels


def test_level_is_uniform() -> None:
    draws = torch.from_numpy(seeding.uniform(0, "t", 0, 0, 200_000)).float()
    counts = torch.bincount(PROCESS.level({"t": draws}), minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0
    assert float(((counts - 200) ** 2 / 200).sum()) == pytest.approx(999, abs=5 * math.sqrt(2 * 999))
    edges = PROCESS.level({"t": torch.tensor([0.0, 0.9999, 1.0])})
    assert edges.tolist() == [0, 999, 999] and edges.dtype == torch.int64


def test_level_of_inverts_sigma() -> None:
    t = torch.arange(1000)
    assert torch.equal(PROCESS.level_of(PROCESS.sigma(t)), t)


@given(st.floats(-7, 7))
def test_level_of_is_nearest_in_the_logarithm(log_sigma: float) -> None:
    distance = np.abs(np.log(FULL.sigma) - log_sigma)
    t = int(PROCESS.level_of(torch.tensor([math.exp(log_sigma)])))
    assert distance[t] <= distance.min() + 1e-5


@given(steps, st.integers(0, 100))
def test_noising(t: int, seed: int) -> None:
    x0, eps = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    level = torch.tensor([t])
    x = PROCESS.noisy(x0.float(), eps.float(), level)
    share = FULL.alphas_cumprod[t]
    torch.testing.assert_close(x, (math.sqrt(share) * x0 + math.sqrt(1 - share) * eps).float())
    torch.testing.assert_close(PROCESS.network_input(x0.float(), eps.float(), level), x)
    torch.testing.assert_close(x / math.sqrt(share), (x0 + float(PROCESS.sigma(level)) * eps).float())
    assert PROCESS.condition(level).tolist() == [t] and PROCESS.condition(level).dtype == torch.float32


def test_denoised_is_what_the_predicted_noise_stands_for() -> None:
    x0, eps, predicted, v = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 900])
    share = torch.from_numpy(FULL.alphas_cumprod)[t].view(3, 1, 1, 1)
    x = share.sqrt() * x0 + (1 - share).sqrt() * eps
    expected = (x - (1 - share).sqrt() * predicted) / share.sqrt()
    result = PROCESS.denoised(torch.cat([predicted, v], dim=1), x0, eps, t)
    torch.testing.assert_close(result, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(PROCESS.denoised(torch.cat([eps, v], dim=1), x0, eps, t), x0)


def test_evaluate_runs_the_network_in_its_own_dtype() -> None:
    class Network(torch.nn.Linear):
        def forward(self, x: Tensor, noise: Tensor, y: Tensor) -> Tensor:
            self.seen = x.dtype, noise, y
            return torch.cat([x, 2 * x], dim=1)

    network, y = Network(1, 1), torch.tensor([0, 1])
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    result = PROCESS.evaluate(network, x, torch.tensor([0, 999]), y)
    dtype, noise, labels = network.seen
    assert dtype == noise.dtype == torch.float32 and noise.tolist() == [0, 999] and labels is y
    assert torch.equal(result, torch.cat([x, 2 * x], dim=1).float().double())


def test_tables_are_no_part_of_a_checkpoint() -> None:
    assert isinstance(build_process(Diffusion(kind="iddpm")), iddpm.IDDPM) and not PROCESS.state_dict()


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("t", "bound"),
    [
        (0, 2.4186869),
        (1, 0.6327131),
        (2, 0.3788534),
        (250, 0.00772034),
        (500, 0.00795238),
        (750, 0.01105142),
        (999, 0.01472191),
    ],
)
def test_loss_of_an_untrained_network(t: int, bound: float) -> None:
    """x0 = 0, ε = 1 and F = 0."""
    x0, level = images(0.0, t)
    error = PROCESS.error(torch.zeros(1, 2, 2, 2), x0, torch.ones_like(x0), level)
    torch.testing.assert_close(error, torch.full_like(x0, 1 + bound), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("t", "v", "bound"),
    [
        (0, -1, 1.3056649),
        (0, 0, 1.5071433),
        (0, 1, 1.7130145),
        (1, -1, 0),
        (1, 0, 0.0493115),
        (1, 1, 0.1751246),
        (2, -1, 0),
        (500, -1, 0),
        (999, -1, 0),
    ],
)
def test_bound_of_the_true_noise(t: int, v: float, bound: float) -> None:
    """x0 = 0 and ε̂ = ε = 1: the squared error is 0."""
    x0, level = images(0.0, t)
    eps = torch.ones_like(x0)
    error = PROCESS.error(torch.cat([eps, v * eps], dim=1), x0, eps, level)
    torch.testing.assert_close(error, torch.full_like(x0, bound), rtol=1e-5, atol=1e-7)


def reference_bound(predicted: Tensor, v: Tensor, x0: Tensor, eps: Tensor, t: int) -> Tensor:
    """The bound's term in bits from its definition, in float64: torch's own KL of normals; a normal's mass in a bin.

    The normal distribution function is approximated by tanh, as published: 0.5 (1 + tanh(√(2/π) (z + 0.044715 z³))).
    """
    share, before = FULL.alphas_cumprod[t], FULL.alphas_cumprod[t - 1] if t else 1.0
    beta = FULL.betas[t]
    x = math.sqrt(share) * x0 + math.sqrt(1 - share) * eps

    def mean(clean: Tensor) -> Tensor:
        return (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x) / (1 - share)

    posterior = FULL.posterior_variance[max(t, 1)]
    std = (posterior ** ((1 - v) / 2) * beta ** ((1 + v) / 2)).sqrt()
    mu = mean((x - math.sqrt(1 - share) * predicted) / math.sqrt(share))
    if t:
        true = torch.distributions.Normal(mean(x0), math.sqrt(posterior))
        return torch.distributions.kl_divergence(true, torch.distributions.Normal(mu, std)) / math.log(2)

    def cdf(value: Tensor) -> Tensor:
        z = (value - mu) / std
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    upper = torch.where(x0 > 0.999, 1.0, cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0.0, cdf(x0 - 1 / 255))
    return -(upper - lower).clamp(min=1e-12).log2()


@settings(max_examples=200)
@given(st.one_of(st.sampled_from([0, 1, 2, 999]), steps), st.integers(0, 10_000), st.booleans())
def test_loss_is_its_definition(t: int, seed: int, edge: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, eps, miss, v = torch.randn(4, 1, 2, 3, 3, dtype=torch.float64, generator=generator)
    x0 = x0.sign() if edge else x0
    predicted = eps + (0.3 if t else 0.1) * miss
    error = PROCESS.error(torch.cat([predicted, v], dim=1).float(), x0.float(), eps.float(), torch.tensor([t]))
    expected = (eps - predicted).square() + reference_bound(predicted, v, x0, eps, t)
    torch.testing.assert_close(error, expected.float(), rtol=3e-4, atol=2e-5)


@given(steps, st.integers(0, 1000))
def test_noise_learns_from_the_squared_error_alone_and_v_from_the_bound_alone(t: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, eps, miss, v = torch.randn(4, 1, 2, 3, 3, dtype=torch.float64, generator=generator)
    predicted = (eps + 0.1 * miss).requires_grad_()
    v.requires_grad_()
    output = torch.cat([predicted, v], dim=1).float()
    PROCESS.error(output, x0.float(), eps.float(), torch.tensor([t])).sum().backward()
    torch.testing.assert_close(predicted.grad, 2 * (predicted - eps).detach(), rtol=1e-4, atol=1e-5)
    (of_v,) = torch.autograd.grad(reference_bound(predicted.detach(), v, x0, eps, t).sum(), v)
    torch.testing.assert_close(v.grad, of_v, rtol=1e-3, atol=1e-4)


def test_each_image_has_its_own_step() -> None:
    x0, level = images(0.2, [0, 1, 500, 999], channels=3)
    eps, output = torch.randn(x0.shape), torch.randn(4, 6, 2, 2)
    together = PROCESS.error(output, x0, eps, level)
    for i in range(4):
        one = slice(i, i + 1)
        assert torch.equal(PROCESS.error(output[one], x0[one], eps[one], level[one]), together[one])


def test_the_loss_is_finite_far_from_the_truth() -> None:
    """Both branches are computed for every image: what is not taken must not poison the gradient either."""
    level = torch.arange(1000)
    x0, eps = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 30.0):
        output = (size * torch.randn(1000, 2, 2, 2, generator=torch.Generator().manual_seed(1))).requires_grad_()
        error = PROCESS.error(output, x0, eps, level)
        error.sum().backward()
        assert error.isfinite().all() and output.grad.isfinite().all()


def test_min_snr_weights_the_squared_error_alone() -> None:
    """methods.md §12.5; arXiv 2303.09556 with γ = 5, as MDT v2 uses it."""
    weighted = iddpm.IDDPM(Diffusion(kind="iddpm", min_snr_gamma=5.0))
    x0, level = images(0.0, list(range(1000)))
    eps = torch.ones_like(x0)
    plain, other = (p.error(torch.zeros(1000, 2, 2, 2), x0, eps, level)[:, 0, 0, 0] for p in (PROCESS, weighted))
    weights = 1 + other - plain  # the squared error is 1
    assert weights[[0, 100]].tolist() == pytest.approx([5.0005e-4, 0.585709], abs=1e-6)
    assert weights[129] < 1 and torch.allclose(weights[130:], torch.ones(870), rtol=0, atol=1e-6)
    assert float(weights.double().mean()) == pytest.approx(0.9130731, abs=1e-6)
