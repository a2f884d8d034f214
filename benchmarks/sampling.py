"""How fast samples are made, against the same sampler in diffusers, and whether memory grows with their number.

diffusers by the loop that its users write, once with our network and once with its own DiT of the same size: S/2 on
4×32×32 latents, all sides in turn. Heun, EDM's default here, has no counterpart for EDM in diffusers. Memory: the most
that a process of its own holds while it samples and remembers for FID, with a tiny network.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import ports
from sddit import presets, seeding
from sddit.config import SAMPLERS, Experiment
from sddit.methods import build_method
from sddit.methods.base import Method
from sddit.metrics.features import Extractor
from sddit.training import evaluation

SHAPE, CLASSES, GUIDANCE = (4, 32, 32), 1000, 4.0
GPU = torch.cuda.is_available()
BATCH, STEPS, ROUNDS = (64, 50, 5) if GPU else (4, 4, 4)
DEVICE = torch.device("cuda" if GPU else "cpu")
CASES = {  # label → (sampler, scale)
    "EDM, Euler": ("euler", 1.0),
    "EDM, Euler, guided": ("euler", GUIDANCE),
    "IDDPM, ancestral, guided": ("ddpm", GUIDANCE),
}
SAMPLES, TINY_SHAPE = 1024, (3, 32, 32)
TARGET = 1.2

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, level or step, classes) → D's raw output, or (ε̂, v)


def make_method(sampler: str, guidance: float) -> Method:
    """DiT-S/2 with random weights; as initialised it would give zeros."""
    kind = next(kind for kind, samplers in SAMPLERS.items() if sampler in samplers)
    experiment = presets.imagenet256("S/2", "dit").replace(
        {
            "diffusion.kind": kind,
            "eval.sampler": sampler,
            "eval.sampler_steps": STEPS,
            "eval.guidance": guidance,
            "eval.guidance_channels": "all",
            "eval.batch_size": BATCH,
        }
    )
    method = build_method(experiment, SHAPE, CLASSES).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in method.parameters():
        parameter.normal_(std=0.02)
    return method


def ours(method: Method, device: torch.device = DEVICE) -> Tensor:
    """What `sddit sample` and the evaluations do: uint8 (B, C, H, W)."""
    return evaluation.sample(method, method.network, np.arange(BATCH), 0, 0, device)


@torch.no_grad()
def by_diffusers(scheduler: Any, network: Network, guidance: float, noise: Tensor | None = None) -> Tensor:
    """The same with a scheduler of diffusers, as its pipelines do; `noise` is drawn where it is not given."""
    scheduler.set_timesteps(STEPS)
    y = torch.arange(BATCH, device=DEVICE)
    labels = torch.cat([y, torch.full_like(y, CLASSES)]) if guidance != 1 else y
    x = torch.randn((BATCH, *SHAPE), device=DEVICE) if noise is None else noise
    x = x * getattr(scheduler.config, "sigma_max", 1.0)
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([x] * 2) if guidance != 1 else x, t)
        output = network(inputs, t[None].to(DEVICE).expand(len(inputs)), labels)
        if guidance != 1:
            c, u = output.chunk(2)
            channels = SHAPE[0]
            followed = u[:, :channels] + guidance * (c[:, :channels] - u[:, :channels])
            output = torch.cat([followed, c[:, channels:]], dim=1)
        x = scheduler.step(output, t, x).prev_sample
    return evaluation.to_uint8(x)


def make_scheduler(sampler: str, experiment: Experiment) -> Any:
    """Of diffusers, with the experiment's noise levels."""
    from diffusers import DDPMScheduler, EDMEulerScheduler

    diffusion = experiment.diffusion
    if sampler == "euler":
        sigmas = {"sigma_min": diffusion.sigma_min, "sigma_max": diffusion.sigma_max, "rho": diffusion.rho}
        return EDMEulerScheduler(**sigmas, sigma_data=diffusion.sigma_data)
    return DDPMScheduler(
        diffusion.timesteps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def make_dit(experiment: Experiment) -> Network:
    """diffusers' DiT of the same size, untrained."""
    network = ports.diffusers_dit(experiment, SHAPE, CLASSES)
    network.to(DEVICE).eval().requires_grad_(False)
    return lambda x, t, y: network(x, timestep=t, class_labels=y).sample


def check_same(scheduler: Any, method: Method, guidance: float) -> None:
    """That both sides compute the same images where nothing but the start is random."""
    noise = torch.from_numpy(seeding.normal(0, "eval/noise", 0, 0, BATCH, SHAPE)).to(DEVICE, torch.float32)
    theirs = by_diffusers(scheduler, method.network, guidance, noise)
    if (off := int((theirs.int() - ours(method).int()).abs().max())) > 1:
        raise SystemExit(f"Our sampler and diffusers' differ by {off} of 255.")


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def race(label: str) -> tuple[str, int]:
    """A row of the table, and how often the network is called in a step."""
    sampler, guidance = CASES[label]
    method = make_method(sampler, guidance).to(DEVICE)
    scheduler, dit = make_scheduler(sampler, method.experiment), make_dit(method.experiment)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(method),
        "scheduler": lambda: by_diffusers(scheduler, method.network, guidance),
        "both": lambda: by_diffusers(scheduler, dit, guidance),
    }
    if sampler == "euler":
        check_same(scheduler, method, guidance)
    calls: list[int] = []
    with method.network.register_forward_hook(lambda *_: calls.append(1)):
        ours(method)
    for call in sides.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, call in sides.items():
            times[name].append(seconds(call))

    def against(side: str) -> str:
        ratios = [theirs / mine for theirs, mine in zip(times[side], times["ours"], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"

    rate = BATCH / statistics.median(times["ours"])
    return f"| {label} | {rate:.3g} | {against('scheduler')} | {against('both')} | {TARGET} |", len(calls) // STEPS


def samplers_that_wait() -> list[str]:
    """Those that read a value back from the device, which torch's meta device, having none, refuses."""
    found = []
    for sampler in (name for names in SAMPLERS.values() for name in names):
        with torch.device("meta"):
            method = make_method(sampler, GUIDANCE)
        try:
            ours(method, torch.device("meta"))
        except RuntimeError:
            found.append(sampler)
    return found


class Means(nn.Module):
    """Features that cost nothing."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (images.float().mean((2, 3)),)


def peak(samples: int) -> int:
    """Bytes at most that this process held after an evaluation of that many samples."""
    experiment = presets.imagenet256("S/8", "dit").replace(
        {
            "model.grid": "tiny",
            "diffusion.kind": "edm",
            "eval.sampler": "euler",
            "eval.sampler_steps": 2,
            "eval.samples": samples,
            "eval.batch_size": 64,
        }
    )
    method = build_method(experiment, TINY_SHAPE, 10).eval()
    device = torch.device("cpu")
    evaluation.evaluate(method, method.network, Extractor("means", Means(), "", device), None, device)
    # Not getrusage: it counts what the parent held when it started this process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def peak_of(samples: int) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sampling", str(samples)]
    root = Path(__file__).parents[1]
    return int(subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def report() -> list[str]:
    """A section of RESULTS.md."""
    rows, calls = zip(*(race(label) for label in CASES), strict=True)
    waiting = samplers_that_wait()
    few, many = peak_of(SAMPLES), peak_of(4 * SAMPLES)
    kept = (many - few) / (3 * SAMPLES)
    return [
        "## Sampling",
        "",
        f"DiT-S/2 on 4×32×32 latents, fp32, {BATCH} samples of {STEPS} steps, {DEVICE.type}, {torch.get_num_threads()} "
        f"threads; ratios of samples/s: median (least … most) of {ROUNDS} rounds, all sides in turn. diffusers by the "
        "loop of its users; Euler gives the same images on both sides.",
        "",
        "| | samples/s | against diffusers' scheduler, our network | against diffusers' scheduler and DiT | target |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "| | measured | target |",
        "|---|---|---|",
        f"| calls of the network in a guided step | {max(calls)} | 1 |",
        "| samplers that read a value back to the host (as torch's meta device shows) "
        f"| {', '.join(waiting) or 'none'} of {sum(map(len, SAMPLERS.values()))} | none |",
        f"| memory for {4 * SAMPLES:,} samples against {SAMPLES:,}, process and all | {many / few:.3f} × "
        f"({few / 1e6:.0f} MB; {kept / 1e3:+.1f} kB a sample, of {np.prod(TINY_SHAPE) / 1e3:.1f} kB) | 1 × |",
    ]


if __name__ == "__main__":
    print(peak(int(sys.argv[1])))
