"""How fast is a whole training step, beside what the machine can multiply at most and beside the obvious alternatives?

A step is what `sddit.training.loop` does: noise, teacher, forward, backward, optimiser, averages, centres. Against it
stand a plain port of each published step (`ports`) and, for DiT, diffusers' `DiTTransformer2DModel` in a plain loop.
All contenders of a method run in turn in one process, and a large matrix product with them, so that whatever else the
machine does falls on all; memory is that of a process of each one's own.

python -m benchmarks.training --all         # S/2 in fp32 with every method too, and MDT's port with fused attention
python -m benchmarks.training --tiny        # a minute, all in one process: do all parts run?
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import ports
from sddit import cost, presets, seeding
from sddit.config import Experiment
from sddit.methods import METHODS, build_method
from sddit.methods.base import Batch
from sddit.training.state import TrainState

LATENTS, DIGITS = ((4, 32, 32), 1000), ((1, 8, 8), 10)
BATCH = 32
ROUNDS = {"fp32": 2, "bf16": 3, "digits": 21}
SQUARES = (2048, 3072, 4096)
LAYERS = ((384, 1152), (384, 1536), (1536, 384), (512, 1536), (512, 2048), (2048, 512))  # of S/2 and the light decoder
WARM = 2  # images of the first step, which makes the optimiser's moments and is not counted
SHARE, RATIO = (0.65, 0.8), 1.2  # targets
TINY: dict[str, Any] = {
    "model.grid": "tiny", "model.decoder_depth": 1, "model.decoder_width": 64, "model.decoder_heads": 4,
}  # fmt: skip
TINY_METHODS: dict[str, dict[str, Any]] = {
    "mdt": {"method.decoder_layers": 1},
    "sddit": {"method.num_prototypes": 256, "method.head_hidden": 128},
}


class Contender(Protocol):
    def step(self, x0: Tensor, y: Tensor) -> Tensor:
        """A whole training step; the loss."""


class Ours:
    """`sddit.training.loop.train`'s step, with one worker and micro-batch. The noise, which the loop draws in a thread
    beside the step before, is drawn here within it."""

    def __init__(self, e: Experiment, shape: tuple[int, int, int], classes: int, device: str) -> None:
        self.experiment, self.device = e, device
        self.method = build_method(e, shape, classes)
        self.state = TrainState.create(e, self.method, torch.device(device))

    def step(self, x0: Tensor, y: Tensor) -> Tensor:
        method, state, step = self.method, self.state, self.state.step
        draws = {
            name: torch.from_numpy(getattr(seeding, law)(0, name, step, 0, len(x0), shape)).float().to(self.device)
            for name, (law, shape) in method.draws().items()
        }
        batch = Batch(x0, y, draws)
        contexts = method.begin_step([batch], step)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.experiment.train.precision == "bf16"):
            losses = method(batch, contexts[0], step)
        losses.total.backward()
        assert torch.isfinite(losses.per_image).all()
        method.after_backward(step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        method.after_optimizer(step)
        state.ema.update(step + 1)
        method.end_step(step)
        state.step += 1
        return losses.total.detach()


class Diffusers:
    """The loop of `ports.Port` on diffusers' model and average."""

    def __init__(self, e: Experiment, shape: tuple[int, int, int], classes: int, device: str) -> None:
        from diffusers.training_utils import EMAModel

        self.experiment, self.device = e, device
        self.model = ports.diffusers_dit(e, shape, classes)  # its embedders drop labels themselves, one in ten
        self.model.to(device).train()
        self.ema = EMAModel(self.model.parameters(), decay=ports.EMA_DECAY)
        self.iddpm = ports.IDDPM(e.diffusion).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=e.train.lr, weight_decay=0)

    def step(self, x0: Tensor, y: Tensor) -> Tensor:
        t = torch.randint(0, self.experiment.diffusion.timesteps, (len(x0),), device=self.device)
        noise = torch.randn_like(x0)
        noisy = self.iddpm.q_sample(x0, t, noise)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.experiment.train.precision == "bf16"):
            output = self.model(noisy, timestep=t, class_labels=y).sample
            loss = self.iddpm.loss(output, x0, noisy, t, noise).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return loss.detach()


def fused_port(e: Experiment, shape: tuple[int, int, int], classes: int, device: str) -> Contender:
    """MDT's port with its bias as the mask of the fused attention."""
    ports.Attention.fused_bias = True  # of this process: `port` is timed in another
    return ports.PORTS[e.method.name](e, shape, classes, device)


def port(e: Experiment, shape: tuple[int, int, int], classes: int, device: str) -> Contender:
    return ports.PORTS[e.method.name](e, shape, classes, device)


CONTENDERS: dict[str, Callable[[Experiment, tuple[int, int, int], int, str], Contender]] = {
    "ours": Ours, "port": port, "diffusers": Diffusers, "port, fused bias": fused_port,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    experiment: Experiment
    data: tuple[tuple[int, int, int], int]  # shape, classes
    contenders: tuple[str, ...]
    rounds: int

    def make(self, name: str, device: str) -> tuple[Contender, Callable[[int], tuple[Tensor, Tensor]]]:
        """A contender that has made one small step, and what makes batches for it."""
        torch.manual_seed(0)
        shape, classes = self.data

        def batch(size: int) -> tuple[Tensor, Tensor]:
            return torch.randn(size, *shape, device=device), torch.arange(size, device=device) % classes

        contender = CONTENDERS[name](self.experiment, shape, classes, device)
        contender.step(*batch(WARM))
        return contender, batch


# -------------------------------------------------------------------------------- each of these in a process of its own


def measure_products(precision: str, squares: tuple[int, ...], tokens: int) -> dict[str, float]:
    """FLOP/s of products, the best of several: of square matrices, and of the layers of S/2 on `tokens` rows."""
    shapes = {f"{n}³": (n, n, n) for n in squares} | {f"{a}→{b}": (tokens, a, b) for a, b in LAYERS}
    device = _device()
    best = {}
    for name, (m, k, n) in shapes.items():
        repeats = max(3, min(20, int(2e11 / (m * k * n))))
        best[name] = max(_product(precision, m, k, n, device) for _ in range(repeats))
    return best


def measure_speed(job: Job, square: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each round's step by contender, and the best FLOP/s of a product of squares in between."""
    device = _device()
    made = {name: job.make(name, device) for name in job.contenders}
    x0, y = next(iter(made.values()))[1](job.experiment.train.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    peak = 0.0
    for i in range(job.rounds):
        for name in list(made)[:: 1 if i % 2 == 0 else -1]:
            begun = _now(device)
            made[name][0].step(x0, y)
            seconds[name].append(_now(device) - begun)
        if i % max(1, job.rounds // 3) == 0:
            peak = max(peak, _product(job.experiment.train.precision, square, square, square, device))
    return seconds, peak


def measure_memory(job: Job, name: str) -> float:
    """Bytes that a step takes at most: on a CPU beyond what the process with its libraries takes."""
    device = _device()
    if name == "diffusers":
        import diffusers.models.transformers.dit_transformer_2d
        import diffusers.training_utils  # noqa: F401
    before = 0 if device == "cuda" else _status("VmRSS")
    contender, batch = job.make(name, device)
    contender.step(*batch(job.experiment.train.batch_size))
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM") - before


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _product(precision: str, m: int, k: int, n: int, device: str) -> float:
    """FLOP/s of one product (m, k) × (k, n), laid out as a Linear's; the faster of two."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
    least = float("inf")
    for _ in range(2):
        begun = _now(device)
        torch.nn.functional.linear(a, b)
        least = min(least, _now(device) - begun)
    return 2 * m * k * n / least


def _status(field: str) -> float:
    """Bytes, from the kernel's account of this process. (`ru_maxrss` would begin with the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith(field)))


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# -------------------------------------------------------------------------------------------------------------- report


def jobs(everything: bool, tiny: bool) -> dict[tuple[str, str], Job]:
    """By (size and precision, method)."""
    bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    found = {}
    for precision in ["bf16", "fp32"] if bf16 else ["fp32"]:
        for name in METHODS if precision == "bf16" or not bf16 or everything else ("dit", "sddit"):
            changes = {"train.precision": precision, "train.batch_size": 4 if tiny else BATCH}
            changes |= TINY | TINY_METHODS.get(name, {}) if tiny else {}
            experiment = presets.imagenet256("S/2", name).replace(changes)
            others = {"dit": ("diffusers",)}.get(name, ())
            found[f"S/2 {precision}", name] = Job(experiment, LATENTS, ("ours", "port", *others), ROUNDS[precision])
    for name in METHODS:
        others = {"dit": ("diffusers",)}.get(name, ())
        found["digits fp32", name] = Job(
            presets.digits("S/2", name), DIGITS, ("ours", "port", *others), 3 if tiny else ROUNDS["digits"]
        )
    return found


def report(everything: bool = False, tiny: bool = False) -> list[str]:
    """A section of RESULTS.md."""
    squares = (256, 512) if tiny else SQUARES
    run = (lambda work, *arguments: work(*arguments)) if tiny else apart
    todo = jobs(everything, tiny)
    products, speeds, memory = {}, {}, {}
    for precision in dict.fromkeys(job.experiment.train.precision for job in todo.values()):
        products[precision] = run(measure_products, precision, squares, 256 if tiny else 256 * BATCH)
    peaks = {p: max(rates[f"{n}³"] for n in squares) for p, rates in products.items()}
    for key, job in todo.items():
        precision = job.experiment.train.precision
        largest = max(squares, key=lambda n: products[precision][f"{n}³"])
        speeds[key], peak = run(measure_speed, job, largest)
        peaks[precision] = max(peaks[precision], peak)
        if everything and key[1] == "mdt":
            fused = Job(job.experiment, job.data, ("port, fused bias",), job.rounds)
            speeds[key] |= run(measure_speed, fused, largest)[0]
    main = next(iter(todo))[0]  # with every method; memory is of this one
    for (kind, name), job in todo.items():
        if kind == main:
            memory[name] = {contender: run(measure_memory, job, contender) for contender in job.contenders}

    batch = todo[main, "dit"].experiment.train.batch_size
    fastest = {
        p: statistics.median(speeds[f"S/2 {p}", "dit"]["ours"]) for p in products if (f"S/2 {p}", "dit") in speeds
    }
    lines = [
        "## Training step",
        "",
        f"The whole step on {_device()}, {torch.get_num_threads()} threads: S/2 on 4×32×32 latents at batch {batch}, "
        "and the `digits` preset at its own. Median (least) of the rounds, in which all contenders take turns. Share: "
        "model FLOPs ÷ least time ÷ the best product of large square matrices in this run "
        f"({', '.join(f'{p} {rate / 1e9:,.0f} GFLOP/s' for p, rate in peaks.items())}). Times ours: the median of the "
        f"rounds' ratios (least … most). Targets at S/2 in {min(fastest, key=lambda p: fastest[p])}, the faster "
        f"precision here: a share of {SHARE[0]:.0%}, or {SHARE[1]:.0%}, and {RATIO}× against each alternative.",
        "",
        "| | method | images/s | step | share of peak | port | times ours | diffusers | times ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, name), seconds in speeds.items():
        experiment, (shape, _) = todo[kind, name].experiment, todo[kind, name].data
        images = experiment.train.batch_size
        rate = images * cost.training_flops_per_image(experiment, shape) / min(seconds["ours"])
        share = rate / peaks[experiment.train.precision]
        others = [_against(seconds, other) for other in ("port", "diffusers")]
        lines.append(
            f"| {kind} | {name} | {images / statistics.median(seconds['ours']):,.1f} | {_seconds(seconds['ours'])} "
            f"| {share:.0%} | {' | '.join(others)} |"
        )
    for (kind, _), seconds in speeds.items():
        if "port, fused bias" in seconds:
            lines += ["", f"MDT's port with its bias as `attn_mask`, {kind}: {_seconds(seconds['port, fused bias'])}."]
    lines += [
        "",
        f"Peak memory of a step, {main}, beyond the process with its libraries (GB):",
        "",
        "| method | ours | port | diffusers |",
        "|---|---|---|---|",
    ]
    for name, of in memory.items():
        cells = [f"{of[c] / 1e9:.2f}" if c in of else "" for c in ("ours", "port", "diffusers")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Single products, GFLOP/s (layers on {batch} images of 256 tokens):", ""]
    lines += [f"| | {' | '.join(next(iter(products.values())))} |", "|---" * (1 + len(squares) + len(LAYERS)) + "|"]
    lines += [f"| {p} | {' | '.join(f'{r / 1e9:,.0f}' for r in rates.values())} |" for p, rates in products.items()]
    return lines


def _seconds(times: list[float]) -> str:
    median, least = statistics.median(times), min(times)
    return f"{median:.2f} s ({least:.2f})" if median >= 1 else f"{1e3 * median:.1f} ms ({1e3 * least:.1f})"


def _against(seconds: dict[str, list[float]], other: str) -> str:
    """Two cells: the other's step, and how many times ours it takes."""
    if other not in seconds:
        return " | "
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[other], strict=True)]
    return f"{_seconds(seconds[other])} | {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    print("\n".join(report(arguments.all, arguments.tiny)))
