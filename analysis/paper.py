"""Tables 1 and 2 of the SD-DiT paper as data, and what must be known to read them. No other file holds these numbers.

Source: SD-DiT (Zhu et al., CVPR 2024, arXiv 2403.17004), Tables 1 and 2 with their cost columns, as methods.md §10
gives them from the authors' slides. Class-conditional ImageNet at 256², scores of 50,000 samples, no guidance. The
paper prints steps and batch size; images, epochs and compute follow from these, and compute from `sddit.cost`.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis import style
from sddit import presets
from sddit.config import Experiment
from sddit.cost import Shape, training_flops_per_image

IMAGES = 1_281_167  # in the training set of ImageNet-1k
LATENT: Shape = (4, 32, 32)  # of a 256×256 image
PROTOCOL = "Inception, N=50,000"

# --------------------------------------------------------------------------------------------- notes on single values

SDDIT = (
    "Sampler, its number of steps, VAE decoder and weight averaging of SD-DiT are not stated in the paper; its compute "
    "is that of this project's reading of the method."
)
MDT = "MDT is version 1."
CURVE = (
    "The DiT and MaskDiT curves of the paper's XL figure are taken from the MaskDiT paper, so that this value may stem "
    "from MaskDiT's own setting."
)
FINE_TUNED = (
    "Not comparable with rows of batch 256: batch 1024, followed by an unmasking fine-tune of 37,500 steps, which the "
    "steps and compute shown leave out."
)
VQGAN = (
    "Our source has 78.3 in the column sFID; elsewhere 78.3 is VQGAN's IS, so that the value has probably slipped by "
    "one column."
)

# ----------------------------------------------------------------------------------------------- notes on all of them

SOURCE = (
    "Published values: SD-DiT (Zhu et al., CVPR 2024, arXiv 2403.17004), class-conditional ImageNet at 256×256, 50,000 "
    "samples. That they are without guidance is not printed but follows from DiT's FID of 9.62. Numbers of seeds and "
    "intervals are not given."
)
GUIDED_ELSEWHERE = (
    "With guidance, published elsewhere and not to be set beside these: DiT 2.27 (scale 1.5), MaskDiT 2.28 (1.5), "
    "MDT v1 1.79 and v2 1.58 (power-cosine 3.8), SD-DiT 3.23 (Table 4 of REPA)."
)


@dataclass(frozen=True)
class Published:
    """A row as printed; None where the paper has no value."""

    model: str
    steps: int | None  # optimiser steps
    batch: int | None  # global
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    notes: tuple[str, ...] = ()
    not_comparable: str = ""  # with the other rows of its table

    @property
    def method(self) -> str | None:
        """The method's name in this project, which does not have them all."""
        names = {shown: name for name, shown in style.METHOD_NAMES.items()}
        return names.get(self.model.rpartition("-")[0])

    @property
    def size(self) -> str | None:
        return self.model.rpartition("-")[2] if self.method else None

    @property
    def scores(self) -> dict[str, float | None]:
        """By their names in `eval.metrics`."""
        return {
            "fid": self.fid,
            "sfid": self.sfid,
            "is": self.inception_score,
            "precision": self.precision,
            "recall": self.recall,
        }

    @property
    def images(self) -> int | None:
        """Images seen in training."""
        return self.steps * self.batch if self.steps and self.batch else None

    @property
    def epochs(self) -> float | None:
        return self.images / IMAGES if self.images else None

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole training; None for a method that this project does not have."""
        return self.images * self._flops_per_image(self.method) if self.images and self.method else None

    @property
    def relative_cost(self) -> float | None:
        """Training FLOPs of one image, those of DiT of the same size being 1."""
        return self._flops_per_image(self.method) / self._flops_per_image("dit") if self.method else None

    def _flops_per_image(self, method: str | None) -> float:
        experiment: Experiment = presets.imagenet256(str(self.size), str(method))
        return training_flops_per_image(experiment, LATENT)


TABLE_1 = (  # convergence
    Published("DiT-S/2", 400_000, 256, 68.40),
    Published("MDT-S/2", 400_000, 256, 53.46, notes=(MDT,)),
    Published("SD-DiT-S/2", 400_000, 256, 48.39, notes=(SDDIT,)),
    Published("DiT-B/2", 400_000, 256, 43.47),
    Published("MDT-B/2", 400_000, 256, 34.33, notes=(MDT,)),
    Published("SD-DiT-B/2", 400_000, 256, 28.62, notes=(SDDIT,)),
    Published("DiT-XL/2", 7_000_000, 256, 9.62),
    Published("MaskDiT-XL/2", 1_300_000, 256, 12.15, notes=(CURVE,)),
    Published("MDT-XL/2", 1_300_000, 256, 9.60, notes=(MDT,)),
    Published("SD-DiT-XL/2", 1_100_000, 256, 9.66, notes=(SDDIT,)),
    Published("SD-DiT-XL/2", 1_300_000, 256, 9.01, notes=(SDDIT,)),
)

TABLE_2 = (  # system level: FID, sFID, IS, precision, recall
    Published("VQGAN", None, None, 15.78, 78.3, notes=(VQGAN,)),
    Published("BigGAN-deep", None, None, 6.95, 7.36, 171.4, 0.87, 0.28),
    Published("StyleGAN", None, None, 2.30, 4.02, 265.12, 0.78, 0.53),
    Published("I-DDPM", None, None, 12.26, None, None, 0.70, 0.62),
    Published("CDM", None, None, 4.88, None, 158.71),
    Published("ADM", 1_980_000, 256, 10.94, 6.02, 100.98, 0.69, 0.63),
    Published("ADM-U", None, None, 7.49, 5.13, 127.49, 0.72, 0.63),
    Published("LDM-8", 4_800_000, 64, 15.51, None, 79.03, 0.65, 0.63),
    Published("LDM-4", 178_000, 1200, 10.56, None, 103.49, 0.71, 0.62),
    Published("MaskGIT", 1_387_000, 256, 6.18, None, 182.1, 0.80, 0.51),
    Published("MaskDiT-XL/2", 2_000_000, 1024, 5.69, 10.34, 177.99, 0.74, 0.60, not_comparable=FINE_TUNED),
    Published("DiT-XL/2", 7_000_000, 256, 9.62, 6.85, 121.50, 0.67, 0.67),
    Published("MDT-XL/2", 2_500_000, 256, 7.41, 4.95, 121.22, 0.72, 0.64, notes=(MDT,)),
    Published("SD-DiT-XL/2", 2_400_000, 256, 7.21, 5.17, 144.68, 0.72, 0.61, notes=(SDDIT,)),
)
