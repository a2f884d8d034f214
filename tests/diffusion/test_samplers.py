"""Every sampler against closed forms: constant and Gaussian data, whose best network is known (methods.md §12.1).

All samplers are linear there, so that one item per source of noise gives the exact spread of the samples.
"""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sddit import presets
from sddit.config import SAMPLERS, Diffusion, Experiment
from sddit.diffusion import edm, iddpm, samplers
from sddit.errors import UsageError

NOISE = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
X0 = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ALL = [(kind, sampler) for kind, names in SAMPLERS.items() for sampler in names]
FULL = iddpm.schedule(Diffusion(kind="iddpm"))
OTHER = iddpm.Schedule(np.linspace(1e-3, 0.1, 120))  # nothing that a scheduler could have as a default


def grid(n: int) -> list[float]:
    return edm.sigma_grid(n, 0.002, 80, 7)


def experiment(kind: str, sampler: str, steps: int, **options: object) -> Experiment:
    return Experiment.parse(
        {"diffusion": {"kind": kind}, "eval": {"sampler": sampler, "sampler_steps": steps, **options}}
    )


def zero_noise(step: int) -> Tensor:
    return torch.zeros_like(NOISE)


# The best networks. F's second half is v.


def best_denoiser(std: float) -> Callable[[Tensor, float], Tensor]:
    """D of Gaussian data of mean 0."""
    return lambda x, sigma: std**2 / (std**2 + sigma**2) * x


def best_noise(schedule: iddpm.Schedule, std: float, v: float | Callable[[int], float] = 0.0):
    """F of Gaussian data of mean 0."""

    def evaluate(x: Tensor, t: float) -> Tensor:
        assert isinstance(t, int) and x.dtype == torch.float64
        share = schedule.alphas_cumprod[t]
        eps = math.sqrt(1 - share) / (share * std**2 + 1 - share) * x
        return torch.cat([eps, torch.full_like(x, v(t) if callable(v) else v)], dim=1)

    return evaluate


def constant_noise(schedule: iddpm.Schedule, v: float):
    """F of data that are X0 and nothing else."""

    def evaluate(x: Tensor, t: float) -> Tensor:
        share = float(schedule.alphas_cumprod[t])
        return torch.cat([(x - math.sqrt(share) * X0) / math.sqrt(1 - share), torch.full_like(x, v)], dim=1)

    return evaluate


def spread(solve: Callable[[Tensor, Callable[[int], Tensor]], Tensor], sources: int) -> float:
    """Std of the samples of a linear sampler: item 0 is the answer to the start, item 1 + i to the noise of step i."""

    def one_hot(item: int) -> Tensor:
        return torch.eye(1 + sources, dtype=torch.float64)[item].view(-1, 1, 1, 1)

    return solve(one_hot(0), lambda i: one_hot(1 + i)).square().sum().sqrt().item()


# ----------------------------------------------------------------------------------------------------------------- EDM


@pytest.mark.parametrize(("order", "n", "evaluations"), [(2, 10, 19), (2, 18, 35), (2, 40, 79), (2, 50, 99), (1, 9, 9)])
@pytest.mark.parametrize("churn", [0.0, 30.0])
def test_edm_with_a_perfect_denoiser_gives_its_image(order: int, n: int, evaluations: int, churn: float) -> None:
    calls = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        calls.append((x.dtype, type(sigma)))
        return X0

    result = samplers.karras(
        denoise, NOISE, sigmas=grid(n), order=order, churn=churn, churn_noise=lambda i: NOISE.roll(i)
    )
    assert len(calls) == evaluations and set(calls) == {(torch.float64, float)}
    torch.testing.assert_close(result, X0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("order", "first", "ratio"), [(2, 0.05, 3.5), (1, 0.5, 1.8)])
def test_edm_follows_the_exact_flow_of_gaussian_data(order: int, first: float, ratio: float) -> None:
    """The flow scales x(σ) by √(σ² + σ_d²)."""
    exact = NOISE.double() * 80 * 0.5 / math.sqrt(80**2 + 0.25)
    errors = [
        ((samplers.karras(best_denoiser(0.5), NOISE, sigmas=grid(n), order=order) - exact).norm() / exact.norm()).item()
        for n in (20, 40, 80)
    ]
    assert errors[0] < first
    assert errors[0] / errors[1] > ratio and errors[1] / errors[2] > ratio


@pytest.mark.parametrize("order", [1, 2])
def test_churn_keeps_the_spread_of_gaussian_data(order: int) -> None:
    errors = []
    for n in (20, 80, 320):
        churned = spread(
            lambda start, noise, n=n: samplers.karras(
                best_denoiser(0.5), start, sigmas=grid(n), order=order, churn=30.0, churn_noise=noise
            ),
            n,
        )
        errors.append(abs(churned / 0.5 - 1))
    assert errors[2] < errors[1] < errors[0] < 0.4 and errors[2] < (1e-3 if order == 2 else 0.04), errors


def test_heun_step_by_hand() -> None:
    def denoise(x: Tensor, sigma: float) -> Tensor:
        return x / (1 + sigma)

    x = NOISE.double() * 4
    d = (x - x / 5) / 4
    euler = x + (1 - 4) * d
    expected = (x + (1 - 4) * (d + (euler - euler / 2) / 1) / 2) / 2  # last: Euler to 0 lands on the denoised image
    torch.testing.assert_close(samplers.karras(denoise, NOISE, sigmas=[4.0, 1.0]), expected)
    torch.testing.assert_close(samplers.karras(denoise, NOISE, sigmas=[4.0, 1.0], order=1), euler / 2)


@pytest.mark.parametrize("order", [1, 2])
def test_churn_raises_the_noise_first(order: int) -> None:
    seen, asked = [], []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append((sigma, x))
        return torch.zeros_like(x)

    def churn_noise(i: int) -> Tensor:
        asked.append(i)
        return torch.ones_like(NOISE)

    samplers.karras(denoise, NOISE, sigmas=[4.0, 1.0], order=order, churn=0.5, churn_noise=churn_noise)
    assert asked == [0, 1]
    assert seen[0][0] == pytest.approx(5.0)  # γ = 0.5 / 2
    torch.testing.assert_close(seen[0][1], NOISE.double() * 4 + 3)  # √(5² - 4²)
    seen.clear()
    samplers.karras(denoise, NOISE, sigmas=[4.0, 1.0], order=order, churn=99, churn_noise=churn_noise)
    assert seen[0][0] == pytest.approx(4 * math.sqrt(2))  # γ is at most √2 - 1
    with pytest.raises(ValueError, match="no churn_noise"):
        samplers.karras(denoise, NOISE, sigmas=[4.0, 1.0], churn=1.0)


# --------------------------------------------------------------------------------------------------------------- IDDPM


@pytest.mark.parametrize("schedule", [FULL, OTHER], ids=["published", "other"])
@pytest.mark.parametrize("steps", [2, 10, 40])
def test_iddpm_with_a_perfect_network_gives_its_image(schedule: iddpm.Schedule, steps: int) -> None:
    evaluate = constant_noise(schedule, v=-0.3)
    result = samplers.ancestral(evaluate, NOISE, schedule=schedule, steps=steps, step_noise=lambda i: NOISE.roll(i))
    torch.testing.assert_close(result, X0, rtol=0, atol=1e-10)
    for sampler in (samplers.ddim, samplers.dpm_solver):  # with coefficients in float32
        result = sampler(evaluate, NOISE, betas=schedule.betas, steps=steps)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, X0, rtol=0, atol=1e-4)


def flow(schedule: iddpm.Schedule, std: float, t: int, to: float = 0.0) -> float:
    """What the exact flow of Gaussian data makes of x_t = 1 at noise σ = `to`, both in the scale where signal is 1."""
    return math.sqrt(1 + schedule.sigma[t] ** 2) * math.sqrt((std**2 + to**2) / (std**2 + schedule.sigma[t] ** 2))


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_ddim_converges_to_the_exact_flow_in_first_order(std: float) -> None:
    one = torch.ones(1, 1, 1, 1)
    errors = []
    for steps in (50, 100, 200):
        result = samplers.ddim(best_noise(FULL, std), one, betas=FULL.betas, steps=steps)
        errors.append(abs(result.item() / flow(FULL, std, 1000 - 1000 // steps) - 1))
    assert errors[0] < 0.06
    assert errors[0] / errors[1] > 1.8 and errors[1] / errors[2] > 1.8, errors


def solve_by_dpm(std: float, steps: int) -> tuple[float, int]:
    """What becomes of x = 1, and the last level."""
    levels = []

    def evaluate(x: Tensor, t: float) -> Tensor:
        levels.append(t)
        return best_noise(FULL, std)(x, t)

    return samplers.dpm_solver(evaluate, torch.ones(1, 1, 1, 1), betas=FULL.betas, steps=steps).item(), levels[-1]


@pytest.mark.parametrize(("std", "error"), [(0.5, 0.025), (1.0, 0.004), (2.0, 0.004)])
def test_dpm_solver_is_near_the_exact_flow_in_few_steps(std: float, error: float) -> None:
    errors = [abs(solve_by_dpm(std, steps)[0] / flow(FULL, std, 999) - 1) for steps in (25, 50, 100, 400)]
    assert max(errors) < error and errors[3] < 2e-4, errors


@pytest.mark.parametrize("std", [2.0, 4.0])
def test_dpm_solver_converges_in_second_order(std: float) -> None:
    """All but the last step, to the denoised image; the end moves nearer to the data, so that the ratio is below 4."""
    errors = []
    for steps in (100, 200, 400):
        result, last = solve_by_dpm(std, steps)
        sigma = FULL.sigma[last]
        errors.append(abs(result / (flow(FULL, std, 999, sigma) * std**2 / (std**2 + sigma**2)) - 1))
    assert errors[0] < 7e-4
    assert errors[0] / errors[1] > 3.3 and errors[1] / errors[2] > 3.3, errors


def test_dpm_solver_is_algorithm_2() -> None:
    """DPM-Solver++ (2M), arXiv 2211.01095, in float64."""
    calls, x = [], NOISE.double()

    def evaluate(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return best_noise(FULL, 0.7)(x, t).tanh()

    result = samplers.dpm_solver(evaluate, NOISE, betas=FULL.betas, steps=20)
    levels = calls.copy()
    assert levels == [round(999 * k / 20) for k in range(20, 0, -1)]
    before, h_before = None, 0.0
    for i, t in enumerate(levels):
        share, s = FULL.alphas_cumprod[t], FULL.sigma[t]
        x0 = (x - math.sqrt(1 - share) * evaluate(x, t).chunk(2, dim=1)[0]) / math.sqrt(share)
        if i == 19:
            x = x0
            break
        share_next, s_next = FULL.alphas_cumprod[levels[i + 1]], FULL.sigma[levels[i + 1]]
        h = math.log(s / s_next)
        slope = x0 if before is None else x0 + h / (2 * h_before) * (x0 - before)
        x = math.sqrt((1 - share_next) / (1 - share)) * x - math.sqrt(share_next) * math.expm1(-h) * slope
        before, h_before = x0, h
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-5)  # in float32


def test_ddim_is_equation_12_on_the_published_stride() -> None:
    calls, x, std = [], NOISE.double(), 0.7

    def evaluate(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return best_noise(FULL, std)(x, t).tanh()

    result = samplers.ddim(evaluate, NOISE, betas=FULL.betas, steps=50)
    expected = list(range(0, 1000, 20))  # 'ddim50' of guided-diffusion
    assert calls == expected[::-1]
    shares = FULL.alphas_cumprod[expected]
    for k in reversed(range(50)):
        eps = evaluate(x, expected[k]).chunk(2, dim=1)[0]
        before = shares[k - 1] if k else 1.0
        x0 = (x - math.sqrt(1 - shares[k]) * eps) / math.sqrt(shares[k])
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-5)  # the scheduler's coefficients are float32


@pytest.mark.parametrize(("timesteps", "steps"), [(20, 20), (1000, 250)])
def test_ancestral_is_the_step_of_ddpm_scheduler(timesteps: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same noise, which the scheduler takes from nobody; 'linspace' is the published choice of steps."""
    from diffusers.schedulers import scheduling_ddpm

    schedule = iddpm.schedule(Diffusion(kind="iddpm", timesteps=timesteps))
    scheduler = scheduling_ddpm.DDPMScheduler(
        timesteps,
        trained_betas=schedule.betas,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    noise = torch.randn(steps, *NOISE.shape, generator=torch.Generator().manual_seed(2))
    draws = iter(noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(draws))

    def evaluate(x: Tensor, t: float) -> Tensor:
        eps, _ = best_noise(schedule, 0.7)(x, t).chunk(2, dim=1)
        return torch.cat([eps, torch.sin(3 * x) * 1.2], dim=1)  # v leaves [-1, 1] and is not clamped

    x = NOISE.double()
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(evaluate(x, t), t, x).prev_sample
    result = samplers.ancestral(evaluate, NOISE, schedule=schedule, steps=steps, step_noise=lambda i: noise[i])
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)  # its tables are float32


@pytest.mark.parametrize(("v", "table"), [(-1.0, "posterior_variance"), (1.0, "betas")])
def test_v_is_the_variance_between_the_posterior_s_and_beta(v: float, table: str) -> None:
    indices, kept = iddpm.respaced(FULL, 25)
    asked, levels = [], []

    def step_noise(i: int) -> Tensor:
        asked.append(i)
        return torch.ones_like(NOISE)

    def evaluate(x: Tensor, t: float) -> Tensor:
        levels.append(t)
        return torch.cat([torch.zeros_like(x), torch.full_like(x, v)], dim=1)

    result = samplers.ancestral(evaluate, NOISE, schedule=FULL, steps=25, step_noise=step_noise)
    assert levels == indices[::-1] and levels[0] == 999 and levels[-1] == 0
    assert asked == list(range(24)), "the last step adds no noise"
    x = NOISE.double()
    for k in reversed(range(25)):  # with ε̂ = 0 the mean is x / √α
        x = x / math.sqrt(1 - kept.betas[k]) + (math.sqrt(getattr(kept, table)[k]) if k else 0)
    torch.testing.assert_close(result, x)


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 2.0])
def test_ancestral_sampling_with_the_true_variance_is_exact_for_gaussian_data(std: float, steps: int) -> None:
    """Var(x_{t-1} | x_t) is known, whatever the steps; the last gives E[x0 | x_0'] and loses that step's variance."""
    indices, kept = iddpm.respaced(FULL, steps)

    def variance(k: int) -> float:
        """Of the noised data: √ᾱ x0 + √(1 - ᾱ) ε."""
        return kept.alphas_cumprod[k] * std**2 + 1 - kept.alphas_cumprod[k]

    def v(t: int) -> float:
        k = indices.index(t)
        if k == 0:
            return 0.0
        true = variance(k - 1) - (1 - kept.betas[k]) * variance(k - 1) ** 2 / variance(k)
        low, high = np.log(kept.posterior_variance[k]), np.log(kept.betas[k])
        return 2 * float((np.log(true) - low) / (high - low)) - 1

    def solve(start: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        start = start * math.sqrt(variance(steps - 1))  # ᾱ_999 is not quite 0
        return samplers.ancestral(best_noise(FULL, std, v), start, schedule=FULL, steps=steps, step_noise=noise)

    share = kept.alphas_cumprod[0] * std**2 / variance(0)
    assert spread(solve, steps - 1) == pytest.approx(std * math.sqrt(share), rel=1e-9)


@pytest.mark.parametrize("v", [-1.0, 1.0])
def test_ancestral_sampling_converges_with_either_bound_of_the_variance(v: float) -> None:
    def solve(start: Tensor, noise: Callable[[int], Tensor], steps: int) -> Tensor:
        return samplers.ancestral(best_noise(FULL, 0.5, v), start, schedule=FULL, steps=steps, step_noise=noise)

    errors = [abs(spread(lambda start, noise, n=n: solve(start, noise, n), n - 1) / 0.5 - 1) for n in (50, 250, 1000)]
    assert errors[2] < errors[1] < errors[0] < 0.3 and errors[2] < 0.01, errors


# ---------------------------------------------------------------------------------------------- what an experiment asks


@pytest.mark.parametrize(("kind", "sampler"), ALL)
@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_the_host_never_waits_for_the_device(kind: str, sampler: str, churn: float) -> None:
    """Tensors without values: whoever would read one raises."""
    if churn and kind != "edm":
        return
    outputs = 1 if kind == "edm" else 2

    def noise(stream: str, step: int) -> Tensor:
        return torch.empty(3, 4, 2, 2, device="meta")

    def evaluate(x: Tensor, level: float) -> Tensor:
        return torch.empty(3, outputs * 4, 2, 2, device="meta", dtype=x.dtype)

    result = samplers.solve(experiment(kind, sampler, 5, churn=churn), evaluate, noise)
    assert result.device.type == "meta" and result.shape == (3, 4, 2, 2) and result.dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "sampler", "levels", "streams"),
    [
        ("edm", "heun", [80.0, *[s for s in edm.sigma_grid(4, 0.002, 80, 7)[1:] for _ in (1, 2)]], {"noise": [0]}),
        ("edm", "euler", edm.sigma_grid(4, 0.002, 80, 7), {"noise": [0]}),
        ("iddpm", "ddpm", [999, 666, 333, 0], {"noise": [0], "ancestral": [0, 1, 2]}),
        ("iddpm", "ddim", [750, 500, 250, 0], {"noise": [0]}),
        ("iddpm", "dpmpp", [999, 749, 500, 250], {"noise": [0]}),
    ],
)
def test_levels_and_noise_that_each_sampler_asks_for(kind: str, sampler: str, levels: list, streams: dict) -> None:
    seen, asked = [], {}

    def noise(stream: str, step: int) -> Tensor:
        asked.setdefault(stream, []).append(step)
        return NOISE

    def evaluate(x: Tensor, level: float) -> Tensor:
        seen.append(level)
        return x if kind == "edm" else torch.cat([x, x], dim=1)

    samplers.solve(experiment(kind, sampler, 4), evaluate, noise)
    assert asked == streams
    assert seen == pytest.approx(levels) and {type(s) for s in seen} == {float if kind == "edm" else int}
    assert len(seen) == (7 if sampler == "heun" else 4)


@pytest.mark.parametrize(
    ("sampler", "steps", "timesteps", "advice"),
    [
        ("ddpm", 1001, 1000, "at most 1000"),
        ("dpmpp", 1000, 1000, "at most 999"),
        ("ddim", 11, 10, "at most 10"),
        ("ddim", 334, 1000, "Use 333 or 500"),  # strides of 2 would start at t = 666
        ("ddim", 60, 1000, "Use 58 or 62"),
    ],
)
def test_steps_that_a_sampler_cannot_make_are_refused(sampler: str, steps: int, timesteps: int, advice: str) -> None:
    changes = {"diffusion.timesteps": timesteps, "eval.sampler": sampler, "eval.sampler_steps": steps}
    with pytest.raises(UsageError, match=advice):
        presets.digits(method="dit").replace(changes)


def test_diffusers_is_imported_only_by_the_samplers_that_need_it() -> None:
    code = """
import sys, torch
from sddit.config import Experiment
from sddit.diffusion import samplers
def run(kind, sampler):
    asked = Experiment.parse({"diffusion": {"kind": kind}, "eval": {"sampler": sampler, "sampler_steps": 3}})
    evaluate = lambda x, level: x if kind == "edm" else torch.cat([x, x], 1)
    samplers.solve(asked, evaluate, lambda stream, step: torch.zeros(1, 1, 2, 2))
    return "diffusers" in sys.modules
print(run("edm", "heun"), run("iddpm", "ddpm"), run("iddpm", "ddim"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]
