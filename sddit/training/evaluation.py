"""Samples of a network, and their score, shared by all workers.

Sample i is a function of (`eval.seed`, i) alone; each worker makes a contiguous share, reduces its features to
float64 moments, and the moments are merged in the order of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sddit import seeding
from sddit.config import Experiment
from sddit.diffusion import edm, samplers
from sddit.errors import UsageError
from sddit.methods.base import Method
from sddit.metrics.features import Extractor
from sddit.metrics.fidelity import score
from sddit.metrics.statistics import Moments
from sddit.training import distributed


@dataclass
class Evaluation:
    metrics: dict[str, float]  # 'eval/fid', …; the same on every worker
    grid: np.ndarray | None  # uint8 (H, W, C), on rank 0


def labels_of(experiment: Experiment, num_classes: int, lo: int, hi: int) -> np.ndarray:
    """Classes of samples lo … hi-1, int64: drawn uniformly, or i mod num_classes (`eval.labels`)."""
    if experiment.eval.labels == "cyclic":
        return np.arange(lo, hi) % num_classes
    draws = seeding.uniform(experiment.eval.seed, "eval/label", 0, lo, hi)
    return np.minimum((draws * num_classes).astype(np.int64), num_classes - 1)


@torch.no_grad()
def sample(
    method: Method, network: nn.Module, labels: np.ndarray, first: int, seed: int, device: torch.device
) -> Tensor:
    """Samples first … first + len(labels) - 1 by the experiment's sampler: uint8 (N, C, H, W) on `device`.

    `network` is the averaged or raw generator of `method`. Initial noise and churn are keyed by (seed, i, solver step).
    """
    experiment, shape = method.experiment, method.shape
    diffusion, options = experiment.diffusion, experiment.eval
    if len(labels) and not 0 <= labels.min() <= labels.max() < method.num_classes:
        raise UsageError(f"Classes must be in [0, {method.num_classes}); got {labels.min()} … {labels.max()}.")
    sigmas = edm.sigma_grid(options.sampler_steps, diffusion.sigma_min, diffusion.sigma_max, diffusion.rho)
    images = []
    for lo in range(first, first + len(labels), options.batch_size):
        hi = min(lo + options.batch_size, first + len(labels))
        y = torch.from_numpy(labels[lo - first : hi - first]).to(device)

        def noise(stream: str, step: int, lo: int = lo, hi: int = hi) -> Tensor:
            return torch.from_numpy(seeding.normal(seed, f"eval/{stream}", step, lo, hi, shape)).to(device)

        def denoise(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
            return method.denoise(network, x, sigma, y)

        guided = samplers.guided(denoise, y, method.num_classes, options.guidance)
        x = samplers.heun(
            guided, noise("noise", 0), sigmas=sigmas, churn=options.churn, churn_noise=lambda i: noise("churn", i)
        )
        images.append(to_uint8(x))
    return torch.cat(images) if images else torch.empty((0, *shape), dtype=torch.uint8, device=device)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0 … 255 as EDM and DiT write images: clip(127.5 x + 128), truncated."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def evaluate(
    method: Method, network: nn.Module, extractor: Extractor, reference: Moments | None, device: torch.device
) -> Evaluation:
    """Scores `eval.samples` samples; every worker must call it. `reference` is needed on rank 0 only."""
    options = method.experiment.eval
    rank, world_size = distributed.rank(), distributed.world_size()
    lo, hi = options.samples * rank // world_size, options.samples * (rank + 1) // world_size
    labels = labels_of(method.experiment, method.num_classes, lo, hi)
    moments = Moments(extractor.dim)
    grid: list[Tensor] = []
    for start in range(0, hi - lo, options.batch_size):
        part = labels[start : start + options.batch_size]
        images = sample(method, network, part, lo + start, options.seed, device)
        moments.update(extractor(images))
        if rank == 0 and start < options.grid:
            grid.append(images[: options.grid - start])
    total = distributed.merge_moments(moments, device)
    metrics = score(total, reference) if rank == 0 and reference is not None else {}
    return Evaluation(distributed.broadcast_values(metrics), make_grid(to_nhwc(torch.cat(grid))) if grid else None)


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
