"""What a training step of each method costs beside DiT's, and what its multiply-adds predict.

Forward and backward without the optimiser, at S/2 on 4×32×32 latents: all methods in turn, many times over, so that
whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import statistics
import time

import torch

from sddit import cost, presets, seeding
from sddit.methods import METHODS, build_method
from sddit.methods.base import Batch, Method

SHAPE, CLASSES, BATCH, ROUNDS = (4, 32, 32), 1000, 16, 11
VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "dit, EDM": ("dit", {"diffusion.kind": "edm"}),
    "mdt v2": ("mdt", {"method.version": "v2", "method.decoder_layers": 4, "method.mask_ratio_max": 0.5}),
    "sddit, λ_D = 0": ("sddit", {"method.lambda_d": 0}),
}


def step(method: Method, batch: Batch, bf16: bool) -> float:
    """Seconds."""
    device = batch.x0.device.type
    begun = time.perf_counter()
    contexts = method.begin_step([batch], 0)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        losses = method(batch, contexts[0], 0)
    losses.total.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def make_batch(method: Method, device: str) -> Batch:
    draws = {
        name: torch.from_numpy(getattr(seeding, law)(0, name, 0, 0, BATCH, shape)).float().to(device)
        for name, (law, shape) in method.draws().items()
    }
    x0 = torch.from_numpy(seeding.normal(0, "x0", 0, 0, BATCH, SHAPE)).to(device)
    return Batch(x0, torch.arange(BATCH, device=device), draws)


def report() -> list[str]:
    """A section of RESULTS.md."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    methods, batches, predicted = {}, {}, {}
    for label, (name, changes) in VARIANTS.items():
        experiment = presets.imagenet256("S/2", name).replace(
            {**changes, "train.precision": "bf16" if bf16 else "fp32", "train.batch_size": BATCH}
        )
        methods[label] = build_method(experiment, SHAPE, CLASSES).to(device).train()
        batches[label] = make_batch(methods[label], device)
        predicted[label] = cost.training_flops_per_image(experiment, SHAPE)
    seconds: dict[str, list[float]] = {label: [] for label in methods}
    for _ in range(ROUNDS + 1):
        for label, method in methods.items():
            seconds[label].append(step(method, batches[label], bf16))
    least = {label: min(times[1:]) for label, times in seconds.items()}  # what disturbs only adds
    rows = []
    for label in methods:
        measured, expected = least[label] / least["dit"], predicted[label] / predicted["dit"]
        median = statistics.median(seconds[label][1:])
        rows.append(
            f"| {label} | {least[label]:.2f} s (median {median:.2f}) | {measured:.2f} | {expected:.2f} "
            f"| {100 * (measured / expected - 1):+.0f}% |"
        )
    precision = "bf16 autocast" if bf16 else "fp32"
    return [
        "## Cost of a step",
        "",
        f"S/2 on 4×32×32 latents, batch {BATCH}, forward and backward without the optimiser, {precision}, {device}, "
        f"{torch.get_num_threads()} threads; the least of {ROUNDS} rounds, all methods in turn. Target: within 20% of "
        "what the multiply-adds predict.",
        "",
        "| method | step | against dit | predicted | off by |",
        "|---|---|---|---|---|",
        *rows,
    ]
