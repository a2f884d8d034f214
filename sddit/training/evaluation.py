"""Samples of a network, and their score, shared by all workers.

Sample i is a function of (`eval.seed`, i) alone; each worker makes a contiguous share and remembers of it what the
metrics need (`sddit.metrics.fidelity.Tally`), which is merged in the order of the ranks and scored on rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sddit import seeding
from sddit.config import Experiment
from sddit.diffusion import samplers
from sddit.diffusion.guidance import guided, scale_rule
from sddit.errors import UsageError
from sddit.methods.base import Method
from sddit.metrics.features import Extractor
from sddit.metrics.fidelity import Tally, score
from sddit.metrics.reference import Reference
from sddit.training import distributed


@dataclass
class Evaluation:
    metrics: dict[str, float]  # 'eval/fid', …; the same on every worker
    grid: np.ndarray | None = None  # uint8 (H, W, C), on rank 0
    features: np.ndarray | None = None  # of the samples, float32 (n, d), on rank 0, where asked for


def labels_of(experiment: Experiment, num_classes: int, lo: int, hi: int, seed: int | None = None) -> np.ndarray:
    """Classes of samples lo … hi-1, int64: drawn uniformly, or i mod num_classes (`eval.labels`).

    `seed` is the evaluation's; None is `eval.seed`.
    """
    if experiment.eval.labels == "cyclic":
        return np.arange(lo, hi) % num_classes
    draws = seeding.uniform(experiment.eval.seed if seed is None else seed, "eval/label", 0, lo, hi)
    return np.minimum((draws * num_classes).astype(np.int64), num_classes - 1)


@torch.no_grad()
def sample(
    method: Method, network: nn.Module, labels: np.ndarray, first: int, seed: int, device: torch.device
) -> Tensor:
    """Samples first … first + len(labels) - 1 by the experiment's sampler: uint8 (N, C, H, W) on `device`, decoded.

    `network` is the averaged or raw generator of `method`. Initial noise, churn and what ancestral sampling adds are
    keyed by (seed, i, solver step).
    """
    experiment, shape, process = method.experiment, method.shape, method.process
    if len(labels) and not 0 <= labels.min() <= labels.max() < method.num_classes:
        raise UsageError(f"Classes must be in [0, {method.num_classes}); got {labels.min()} … {labels.max()}.")
    scale = scale_rule(experiment)
    channels = shape[0] if experiment.guidance_rule[1] == "all" else min(3, shape[0])
    images = []
    for lo in range(first, first + len(labels), experiment.eval.batch_size):
        hi = min(lo + experiment.eval.batch_size, first + len(labels))
        y = _to_device(labels[lo - first : hi - first], device)

        def noise(stream: str, step: int, lo: int = lo, hi: int = hi) -> Tensor:
            return _to_device(seeding.normal(seed, f"eval/{stream}", step, lo, hi, shape), device)

        evaluate = guided(partial(process.evaluate, network), y, method.num_classes, scale, channels)
        images.append(to_uint8(method.decode(samplers.solve(experiment, evaluate, noise))))
    return torch.cat(images) if images else to_uint8(method.decode(torch.empty((0, *shape), device=device)))


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Without the host waiting for what the device still has to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0 … 255 as EDM and DiT write images: clip(127.5 x + 128), truncated."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def evaluate(
    method: Method,
    network: nn.Module,
    extractor: Extractor,
    reference: Reference | None,
    device: torch.device,
    metrics: Sequence[str] | None = None,
    seed: int | None = None,
    *,
    keep_features: bool = False,
) -> Evaluation:
    """Scores `eval.samples` samples; every worker must call it. `reference` is needed on rank 0 only.

    `metrics` and `seed` are those of the experiment's evaluations unless given.
    """
    options = method.experiment.eval
    seed = options.seed if seed is None else seed
    lo, hi = distributed.share(options.samples)
    labels = labels_of(method.experiment, method.num_classes, lo, hi, seed)
    tally = Tally(extractor, options.metrics if metrics is None else metrics, keep_features=keep_features)
    grid: list[Tensor] = []
    for start in range(0, hi - lo, options.batch_size):
        part = labels[start : start + options.batch_size]
        images = sample(method, network, part, lo + start, seed, device)
        tally.update(images, lo + start)
        if distributed.rank() == 0 and start < options.grid:
            grid.append(images[: options.grid - start])
    _merge(tally, device)
    scores = score(tally, reference) if distributed.rank() == 0 and reference is not None else {}
    return Evaluation(
        distributed.broadcast_values({f"eval/{name}": value for name, value in scores.items()}),
        make_grid(to_nhwc(torch.cat(grid))) if grid else None,
        tally.kept() if keep_features and distributed.rank() == 0 else None,
    )


def _merge(tally: Tally, device: torch.device) -> None:
    """Adds to rank 0's tally what the other workers have seen."""
    if distributed.world_size() == 1:
        return
    gathered = {name: distributed.gather(array, device) for name, array in tally.to_arrays().items()}
    for rank in range(1, distributed.world_size()):
        if distributed.rank() == 0:
            tally.merge({name: shares[rank] for name, shares in gathered.items()})


def sample_grid(method: Method, network: nn.Module, device: torch.device) -> np.ndarray:
    """The grid alone, for step 0: the same noise and classes as at every other step and in every cell."""
    count = min(method.experiment.eval.grid, method.experiment.eval.samples)
    labels = labels_of(method.experiment, method.num_classes, 0, count)
    return make_grid(to_nhwc(sample(method, network, labels, 0, method.experiment.eval.seed, device)))


def to_nhwc(images: Tensor) -> np.ndarray:
    """(N, C, H, W) on any device to (N, H, W, C) in numpy."""
    return images.cpu().numpy().transpose(0, 2, 3, 1)


def make_grid(images: np.ndarray, columns: int = 10) -> np.ndarray:
    """Images uint8 (N, H, W, C) in rows of `columns` with a grey line between them: uint8 (height, width, C).

    Small images are enlarged by whole factors, so that 8×8 digits can be seen.
    """
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    tiles = np.zeros((rows * columns, height + 1, width + 1, channels), dtype=np.uint8)
    tiles[:n, :height, :width] = images
    tiles[:, height], tiles[:, :, width] = 96, 96
    grid = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    factor = max(1, 32 // height)
    return grid.repeat(factor, 0).repeat(factor, 1)
