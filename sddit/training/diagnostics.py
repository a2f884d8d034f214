"""What is asked of a network once, at its last step (`eval.final`): probe, copying, denoising, seeds.

| name | metrics | what it is |
|---|---|---|
| `probe` | `probe/accuracy_sigma_…` | how well a linear classifier on the encoder's features tells held-out images |
| `copying` | `copying/ratio`, `copying/closer` | whether samples are nearer to training images than held-out ones are |
| `denoising` | `denoising/loss_sigma_…` | the generative loss on held-out images, by noise |
| `seeds` | `eval/fid_seeds_mean`, `eval/fid_seeds_std` | FID over several evaluation seeds |

The workers share the images; what is fitted or compared at the end is, on rank 0. All draws are keyed by `eval.seed`
and the image's place in its list, so the number of workers does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddit import seeding
from sddit.config import Experiment
from sddit.data import open_manifest
from sddit.data.sampler import BatchSampler, ImageSet, as_network_sees
from sddit.data.shards import Shards
from sddit.methods.base import Method
from sddit.metrics.features import Extractor
from sddit.metrics.reference import Reference
from sddit.training import distributed, evaluation

PROBE_SIGMAS = (
    0.002,
    0.1,
    0.5,
    2.0,
)  # noise std over signal: from the teacher's, through the data's own, to mostly noise
DENOISING_SIGMAS = (0.002, 0.02, 0.1, 0.5, 2.0, 10.0)
IMAGES = 10_000  # of each set at most, but for training images in `copying`, which are all compared
Metrics = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What a diagnostic works with; the same on every worker, but for the reference, which rank 0 alone needs."""

    method: Method
    network: nn.Module  # the one that is sampled from
    extractor: Extractor | None  # for `copying` and `seeds`
    reference: Reference | None
    training: ImageSet
    held_out: ImageSet
    device: torch.device
    evaluated: evaluation.Evaluation  # at the same step; with the samples' features, for `copying`

    @property
    def seed(self) -> int:
        return self.method.experiment.eval.seed


def diagnose(names: Sequence[str], setting: Setting) -> Metrics:
    """The metrics of these diagnostics, the same on every worker; every worker must call it."""
    was_training = setting.network.training
    setting.network.eval()
    try:
        found: Metrics = {}
        for name in names:
            found |= DIAGNOSTICS[name](setting)
        return distributed.broadcast_values(found)
    finally:
        setting.network.train(was_training)


def probe(setting: Setting) -> Metrics:
    """Accuracy on held-out images of a logistic regression on the encoder's features, by the noise they were seen with.

    Fitted to standardised features of up to 10,000 training images. The features are patch tokens averaged, under the
    null label. Memory on rank 0: the features of both sets, 80 MB each for 10,000 images and 2,048 features.
    """
    sets = {"train": setting.training.sample(IMAGES), "test": _held_out(setting)}
    found: Metrics = {}

    def features(x0: Tensor, eps: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        return setting.method.features(setting.network, x0, eps, sigma)

    for sigma in PROBE_SIGMAS:
        seen = {name: _gathered(setting, images, sigma, f"probe/{name}", features) for name, images in sets.items()}
        if distributed.rank() == 0:
            labels = {name: _labels(images) for name, images in sets.items()}
            found[f"probe/accuracy_sigma_{sigma:g}"] = linear_accuracy(
                seen, labels, setting.method.num_classes, setting.device
            )
    return found


def copying(setting: Setting) -> Metrics:
    """The distance of samples to their nearest training image, against that of held-out images, in extractor features.

    `ratio` is median over median: far below 1 where samples are copies. `closer` is the fraction of samples nearer than
    all but 1 % of held-out images are: near 0.01 where they are as far. Mirrored training images are not looked for.

    Each worker compares all queries with its share of the training images, block by block. Memory: the features of up
    to 10,000 samples and 10,000 held-out images on each worker, 8 KB each for Inception.
    """
    extractor, device, training = setting.extractor, setting.device, setting.training
    assert extractor is not None
    held_out = _held_out(setting)
    blocks = [np.empty((0, extractor.dim), dtype=np.float32)]
    for _, stored, _ in _shared(setting, held_out):
        blocks.append(extractor(_pixels(setting, held_out, stored)).cpu().numpy())
    mine = np.concatenate(blocks)
    real = np.concatenate(distributed.gather(mine, device, everywhere=True))
    sampled = setting.evaluated.features
    samples = distributed.broadcast_values(None if sampled is None else sampled[:IMAGES])
    queries = torch.from_numpy(np.concatenate([samples, real])).to(device)
    nearest = torch.full((len(queries),), torch.inf, device=device)
    for _, stored, _ in _shared(setting, training):
        features = extractor(_pixels(setting, training, stored))
        nearest = torch.minimum(nearest, torch.cdist(queries, features).amin(dim=1))
    distances = distributed.minimum(nearest.cpu().numpy(), device)
    ours, theirs = distances[: len(samples)], distances[len(samples) :]
    return {
        "copying/ratio": float(np.median(ours) / np.median(theirs)),
        "copying/closer": float((ours < np.percentile(theirs, 1)).mean()),
    }


def denoising(setting: Setting) -> Metrics:
    """The generative loss, as training weights it, of up to 10,000 held-out images under their labels, by noise."""
    found: Metrics = {}

    def error(x0: Tensor, eps: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        return setting.method.denoising_error(setting.network, x0, eps, sigma, y)

    for sigma in DENOISING_SIGMAS:
        errors = _gathered(setting, _held_out(setting), sigma, "denoising", error)
        if distributed.rank() == 0:
            found[f"denoising/loss_sigma_{sigma:g}"] = float(errors.astype(np.float64).mean())
    return found


def seeds(setting: Setting) -> Metrics:
    """Mean and standard deviation (ddof 1) of FID over evaluation seeds `eval.seed`, `eval.seed` + 1, …"""

    def fid(seed: int) -> float:
        if seed == setting.seed and "eval/fid" in setting.evaluated.metrics:
            return setting.evaluated.metrics["eval/fid"]
        assert setting.extractor is not None
        result = evaluation.evaluate(
            setting.method, setting.network, setting.extractor, setting.reference, setting.device, ("fid",), seed
        )
        return result.metrics["eval/fid"]

    scores = [fid(setting.seed + i) for i in range(setting.method.experiment.eval.final_seeds)]
    return {"eval/fid_seeds_mean": float(np.mean(scores)), "eval/fid_seeds_std": float(np.std(scores, ddof=1))}


DIAGNOSTICS: dict[str, Callable[[Setting], Metrics]] = {
    "probe": probe,
    "copying": copying,
    "denoising": denoising,
    "seeds": seeds,
}


def metrics_of(experiment: Experiment) -> tuple[str, ...]:
    """The metrics that extractor and reference must serve: those of the evaluations, and FID for `seeds`."""
    return (*experiment.eval.metrics, *(("fid",) if "seeds" in experiment.eval.final else ()))


def held_out_images(experiment: Experiment, sampler: BatchSampler) -> ImageSet:
    """Those of `data.test_path`, else those that `data.hold_out` sets aside; none without either."""
    path = experiment.data.test_path
    return ImageSet(Shards(open_manifest(path))) if path else sampler.held_out_images()


def _held_out(setting: Setting) -> ImageSet:
    assert len(setting.held_out), "check_held_out comes first"
    return setting.held_out.sample(IMAGES)


def _shared(setting: Setting, images: ImageSet) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """This worker's share of a list, in batches: place of the first, images as stored (b, …), labels (b,)."""
    lo, hi = distributed.share(len(images))
    size = setting.method.experiment.eval.batch_size
    for start in range(lo, hi, size):
        yield start, *images.read(start, min(start + size, hi))


def _pixels(setting: Setting, images: ImageSet, stored: np.ndarray) -> Tensor:
    """What the extractor sees of stored images: themselves, or what latents decode to; uint8 (b, C, H, W)."""
    vae = images.shards.manifest.vae
    if vae is None:
        return torch.from_numpy(stored)
    latents = torch.from_numpy(as_network_sees(stored, vae)).to(setting.device)
    return evaluation.to_uint8(setting.method.decode(latents))


def _gathered(
    setting: Setting,
    images: ImageSet,
    sigma: float,
    stream: str,
    of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> np.ndarray:
    """``of(x0, eps, sigma, y)`` for each image of the list, float32 (n, …) on rank 0; elsewhere of the own share."""

    vae = images.shards.manifest.vae

    def compute(first: int, stored: np.ndarray, labels: np.ndarray) -> np.ndarray:
        eps = seeding.normal(setting.seed, f"final/{stream}", 0, first, first + len(labels), setting.method.shape)
        x0, noise, y = (torch.from_numpy(a).to(setting.device) for a in (as_network_sees(stored, vae), eps, labels))
        return of(x0, noise, torch.full((len(y),), sigma, device=y.device), y).float().cpu().numpy()

    parts = [compute(*batch) for batch in _shared(setting, images)]
    if not parts:  # fewer images than workers: for the width alone
        parts = [compute(0, *images.read(0, 1))[:0]]
    mine = np.concatenate(parts)
    return np.concatenate(distributed.gather(mine, setting.device) or [mine])


def _labels(images: ImageSet) -> np.ndarray:
    size = 1024
    return np.concatenate([images.read(lo, lo + size)[1] for lo in range(0, len(images), size)])


def linear_accuracy(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], num_classes: int, device: torch.device
) -> float:
    """Accuracy on 'test' of a multinomial logistic regression on 'train': features (n, d), labels (n,) int64.

    Features are standardised; the penalty |W|² / 2n is scikit-learn's default, and the optimum is unique. L-BFGS in
    float64 on `device`, since a worker has one thread: 1,000 classes would take scikit-learn minutes.
    """
    x, z = (torch.from_numpy(features[part]).to(device, torch.float64) for part in ("train", "test"))
    y, truth = (torch.from_numpy(labels[part]).to(device) for part in ("train", "test"))
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    x, z = (x - mean) / std, (z - mean) / std
    weight = torch.zeros((x.shape[1], num_classes), dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((z @ weight + bias).argmax(dim=1) == truth).double().mean().item()
