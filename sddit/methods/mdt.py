"""MDT: the diffusion loss of a full pass plus that of a masked pass, summed (arXiv 2303.14389; methods.md §4, §5)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sddit import seeding
from sddit.config import MDT as MDTConfig
from sddit.config import Experiment
from sddit.methods.base import Batch, Draws, Losses, Method
from sddit.models import build_network, masking
from sddit.models.layers import Encoder


class MDTMethod(Method):
    def __init__(self, experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(experiment, shape, num_classes)
        assert isinstance(experiment.method, MDTConfig)
        self.options = options = experiment.method
        self.network = network = build_network(experiment, shape, num_classes)
        assert isinstance(network, Encoder)
        self.num_tokens = network.num_tokens
        masking.keep_count(self.num_tokens, options.mask_ratio_max or options.mask_ratio)  # says now if none is left

    def draws(self) -> Draws:
        """Both passes share the image, its noise level and its label; noise and label drop are their own."""
        draws = super().draws()
        return draws | {"drop2": draws["drop"], "noise2": draws["noise"], "mask": ("uniform", (self.num_tokens,))}

    def mask_ratio(self, step: int) -> float:
        """M at a step: fixed, or one draw for the whole global batch."""
        low, high = self.options.mask_ratio, self.options.mask_ratio_max
        if high is None:
            return low
        return low + (high - low) * float(seeding.uniform(self.experiment.seed, "mask_ratio", step, 0, 1)[0])

    def begin_step(self, batches: list[Batch], step: int) -> list[Any]:
        """The masks of the second pass."""
        keep = masking.keep_count(self.num_tokens, self.mask_ratio(step))
        return [masking.random_mask(batch.draws["mask"], keep) for batch in batches]

    def forward(self, batch: Batch, context: masking.Mask, step: int) -> Losses:
        draws, level = batch.draws, self.process.level(batch.draws)
        full = self._pass(batch, level, draws["noise"], draws["drop"])
        masked = self._pass(batch, level, draws["noise2"], draws["drop2"], context)
        per_image = full + masked
        parts = {"generative": full.detach().mean(), "masked": masked.detach().mean()}
        return Losses(per_image.mean(), per_image.detach(), parts)

    def _pass(self, batch: Batch, level: Tensor, eps: Tensor, drop: Tensor, mask: masking.Mask | None = None) -> Tensor:
        """The loss of each image over all tokens, (B,)."""
        output = self.predict(self.network, batch.x0, eps, level, self.drop_labels(batch.y, drop), mask)
        return self.process.error(output, batch.x0, eps, level).mean(dim=(1, 2, 3))
