"""DiT: all tokens, the loss of the diffusion alone (Peebles & Xie, arXiv 2212.09748)."""

from __future__ import annotations

from typing import Any

from sddit.config import Experiment
from sddit.methods.base import Batch, Losses, Method
from sddit.models import build_network


class DiTMethod(Method):
    def __init__(self, experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(experiment, shape, num_classes)
        self.network = build_network(experiment, shape, num_classes)

    def forward(self, batch: Batch, context: Any, step: int) -> Losses:
        x0, eps, level = batch.x0, batch.draws["noise"], self.process.level(batch.draws)
        output = self.predict(self.network, x0, eps, level, self.drop_labels(batch.y, batch.draws["drop"]))
        per_image = self.process.error(output, x0, eps, level).mean(dim=(1, 2, 3))
        total = per_image.mean()
        return Losses(total, per_image.detach(), {"generative": total.detach()})
