"""From images to scores: what is remembered of a stream of samples, and the metrics it is scored by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sddit.metrics.check import check_metrics
from sddit.metrics.images import Images, images_in
from sddit.metrics.protocol import Protocol
from sddit.metrics.reference import BATCH, PARTS, Gaussian, Reference, as_tensor, open_reference
from sddit.metrics.statistics import Moments, SplitSums, frechet_distance, kernel_distance, precision_and_recall

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    from sddit.metrics.features import Extractor


class Tally:
    """All that `metrics` need to know of a stream of samples; those of several workers merge.

    Memory does not grow with the number of samples n, but where precision, recall or KID is asked for (or
    `keep_features`): then the features are kept, 4 d bytes a sample (8 KB for Inception, 410 MB for 50,000).
    """

    def __init__(self, extractor: Extractor, metrics: Sequence[str], *, keep_features: bool = False) -> None:
        self.extractor, self.metrics = extractor, tuple(metrics)
        parts = {PARTS.get(metric, "splits") for metric in metrics}
        dims = extractor.dims
        self.moments = Moments(extractor.dim) if "moments" in parts else None
        self.spatial = Moments(dims["spatial"]) if "spatial" in parts else None
        self.splits = SplitSums(dims["logits"]) if "splits" in parts else None
        self.features: list[np.ndarray] | None = [] if keep_features or "subset" in parts else None

    def update(self, images: Tensor, first: int) -> None:
        """Adds samples first … first + b - 1, uint8 (b, C, H, W).

        Raises:
            UsageError: their features are not finite.
        """
        layers = self.extractor.layers(images)
        if self.moments is not None:
            self.moments.update(layers["features"])
        if self.spatial is not None:
            self.spatial.update(layers["spatial"])
        if self.splits is not None:
            self.splits.update(layers["logits"], first)
        if self.features is not None:
            self.features.append(layers["features"].cpu().numpy())

    def kept(self) -> np.ndarray:
        """The features seen so far, float32 (n, d), in order."""
        assert self.features is not None
        if len(self.features) != 1:  # joined once, so that they are not held twice
            self.features = [np.concatenate([np.empty((0, self.extractor.dim), dtype=np.float32), *self.features])]
        return self.features[0]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it, to be gathered."""
        arrays = {}
        for name, part in (("moments", self.moments), ("spatial", self.spatial), ("splits", self.splits)):
            if part is not None:
                arrays[name] = part.to_array()
        if self.features is not None:
            arrays["features"] = self.kept()
        return arrays

    def merge(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds what another has seen, of samples that come after those seen here."""
        if self.moments is not None:
            self.moments.merge(Moments.from_array(arrays["moments"]))
        if self.spatial is not None:
            self.spatial.merge(Moments.from_array(arrays["spatial"]))
        if self.splits is not None:
            self.splits.merge(SplitSums.from_array(arrays["splits"]))
        if self.features is not None:
            self.features.append(arrays["features"])


def score(tally: Tally, reference: Reference) -> dict[str, float]:
    """The metrics that `tally` was made for, by their names in `eval.metrics`.

    Raises:
        UsageError: fewer samples than a metric needs.
    """
    scores: dict[str, float] = {}
    for metric in tally.metrics:
        if metric == "fid":
            scores[metric] = _distance(tally.moments, reference.moments)
        elif metric == "sfid":
            scores[metric] = _distance(tally.spatial, reference.spatial)
        elif metric == "is":
            assert tally.splits is not None
            scores[metric] = tally.splits.score()
    if compared := [metric for metric in tally.metrics if PARTS.get(metric) == "subset"]:
        import torch

        assert reference.subset is not None
        device = tally.extractor.device
        samples, real = (torch.from_numpy(f).to(device) for f in (tally.kept(), reference.subset))
        if "kid" in compared:
            scores["kid"] = kernel_distance(samples, real)
        if set(compared) - {"kid"}:
            both = dict(zip(("precision", "recall"), precision_and_recall(samples, real), strict=True))
            scores |= {metric: value for metric, value in both.items() if metric in compared}
    return {metric: scores[metric] for metric in tally.metrics}


def evaluate_images(
    images: ArrayLike | Images,
    reference: str = "digits",
    extractor: str | None = None,
    metrics: Sequence[str] = ("fid",),
    *,
    device: str = "cpu",
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores images, batch by batch.

    Args:
        images: uint8 (N, H, W, C) or (N, C, H, W), or from `open_images`; of the reference's size.
        reference: as for `sddit.metrics.reference.open_reference`.
        extractor: a name as in `sddit.metrics.features`; None is the one that belongs to the reference.
        metrics: names in `METRICS`.
        known: fields of `Protocol` that are known of the images.

    Returns:
        The scores by their names, their 'protocol' in words, and the 'protocol_digest'.

    Raises:
        UsageError: not such images, too few of them, or an extractor or reference that cannot serve; before any work.
        DataError: images or the reference are missing or broken.
    """
    from sddit.metrics.features import check_extractor, get_extractor

    samples = images if isinstance(images, Images) else images_in(np.asarray(images))
    source = open_reference(reference)
    name = extractor or source.default_extractor
    check_metrics(metrics, name, samples.count, source.count)
    check_extractor(name, samples.shape)
    source.check(name, metrics, samples.shape)
    network = get_extractor(name, device, metrics)
    real = source.load(network, metrics)
    tally = Tally(network, metrics)
    first = 0
    for batch in samples.batches(BATCH):
        tally.update(as_tensor(batch), first)
        first += len(batch)
    protocol = Protocol(
        name,
        network.digest,
        real.digest,
        samples.count,
        reference_subset=real.subset_digest,
        reference_images=real.count,
        **(known or {}),
    )
    return {
        **score(tally, real),
        "protocol": protocol.describe(metrics),
        "protocol_digest": protocol.digest,
    }


def _distance(samples: Moments | None, reference: Gaussian | None) -> float:
    assert samples is not None and reference is not None
    return frechet_distance(samples.mean, samples.covariance(), *reference)
