"""What two scores must share to be drawn together (architecture.md §2). Free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from sddit.config import Experiment

ROUNDING = "trunc(clip(127.5 x + 128))"  # to uint8, as EDM and DiT write images


@dataclass(frozen=True)
class Metric:
    """What a score is called, which layer of the extractor it sees, and how many images of each set it needs."""

    label: str
    layer: str
    images: int


# By their names in `eval.metrics`. A radius to the third neighbour takes four points.
METRICS: dict[str, Metric] = {
    "fid": Metric("FID", "features", 2),
    "sfid": Metric("sFID", "spatial", 2),
    "is": Metric("IS", "logits", 1),
    "precision": Metric("precision", "features", 4),
    "recall": Metric("recall", "features", 4),
    "kid": Metric("KID", "features", 2),
}


@dataclass(frozen=True)
class Protocol:
    """How a score was made. What is not known of images that somebody else made is None.

    Sampler, guidance rule and EMA rate belong to the method, not here: comparing them is what an ablation does.
    """

    extractor: str  # a name known to `sddit.metrics.features`
    extractor_digest: str  # of its weights
    reference: str  # digest of the real images, or of their statistics
    samples: int
    seed: int | None = None  # eval.seed: which noise and labels
    labels: str | None = None  # 'uniform' or 'cyclic'
    decoder: str | None = None  # from latents to pixels: a digest; 'none' for pixels
    rounding: str | None = None  # from real numbers to uint8
    guided: bool | None = None
    weights: str | None = None  # 'ema' or 'raw'
    reference_subset: str | None = None  # digest of the images behind precision, recall, KID, if not `reference`
    reference_images: int | None = field(default=None, compare=False)  # implied by `reference`, so not in the digest

    @classmethod
    def from_experiment(
        cls,
        experiment: Experiment,
        reference_digest: str,
        extractor_digest: str,
        *,
        decoder: str = "none",
        reference_images: int | None = None,
    ) -> Protocol:
        """The protocol of `experiment`'s own evaluations, for data in pixels unless a decoder's digest is given."""
        options = experiment.eval
        return cls(
            extractor=options.extractor,
            extractor_digest=extractor_digest,
            reference=reference_digest,
            samples=options.samples,
            seed=options.seed,
            labels=options.labels,
            decoder=decoder,
            rounding=ROUNDING,
            guided=options.guidance != 1,
            weights=options.weights,
            reference_images=reference_images,
        )

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits; equal digests mean that two scores may share an axis."""
        # What is None is left out, so a field added later leaves recorded digests as they are.
        content = {k: v for k, v in asdict(self).items() if v is not None and k != "reference_images"}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def describe(self, metrics: Sequence[str] = ("fid",)) -> str:
        """One line for a caption; what is not known is left out."""
        images = f"{self.reference_images:,} images" if self.reference_images else f"reference {self.reference[:12]}"
        guided = {None: None, True: "guided", False: "no guidance"}[self.guided]
        labels = ", ".join(METRICS[metric].label for metric in metrics)
        parts = [
            f"{labels} on {self.extractor} features, {self.samples:,} samples against {images}",
            self.labels and f"{self.labels} labels",
            guided,
            self.weights and {"ema": "averaged weights", "raw": "raw weights"}[self.weights],
            self.decoder and self.decoder != "none" and f"decoder {self.decoder[:12]}",
            None if self.seed is None else f"evaluation seed {self.seed}",
        ]
        return ", ".join(part for part in parts if part)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Protocol:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))
