"""What a method is to the training loop: a module whose forward pass is its loss, and a few hooks around a step.

The loop calls, in every optimiser step and in this order (architecture.md §1.1):

    contexts = method.begin_step(batches, step)            # once, all micro-batches of this worker, no gradient
    losses = method(batch, context, step)                  # once a micro-batch; losses.total is back-propagated
    method.after_backward(step)                            # gradients complete: freeze, clip ...
    optimiser.step()
    method.after_optimizer(step)                           # the teacher follows the student
    (sampling EMA of method.network)
    method.end_step(step)                                  # centres
    method.diagnostics()                                   # only where the loop logs: what is known about the step

Methods know torch and torch.distributed, nothing of Ray, MLflow or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sddit.config import Experiment
from sddit.diffusion import build_process
from sddit.models.layers import Encoder
from sddit.models.masking import Mask

Draws = dict[str, tuple[str, tuple[int, ...]]]  # stream name → ('uniform' | 'normal', shape of one position)


@dataclass
class Batch:
    """A slice of the global batch, on the worker's device."""

    x0: Tensor  # (B, C, H, W) clean images or latents, float32
    y: Tensor  # (B,) int64 labels, before any label drop
    draws: dict[str, Tensor]  # raw draws by stream name, (B, *shape) float32: what `Method.draws` asked for


@dataclass
class Losses:
    """What one micro-batch costs; means over its images."""

    total: Tensor  # scalar, fp32, to be back-propagated
    per_image: Tensor  # (B,) fp32, detached: what an image adds, which tells where a non-finite total comes from
    parts: dict[str, Tensor] = field(default_factory=dict)  # 'generative' and the method's own: scalars, detached


class Method(nn.Module):
    """Base of all methods. Trainable parameters are those of the module with ``requires_grad``.

    `network` is the generator that is averaged, sampled from and exported: ``network(x, noise, y) -> F``.
    Whatever else a resumed run needs (teacher, centres) is a submodule or a persistent buffer of the method.
    """

    network: nn.Module
    # From what the network sees to images near [-1, 1]; whoever reads the data sets it where those are latents.
    decode: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    def __init__(self, experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> None:
        """`shape` is (C, H, W) as the network sees it; `num_classes` is also the null class's index."""
        super().__init__()
        self.experiment = experiment
        self.shape, self.num_classes = shape, num_classes
        self.process = build_process(experiment.diffusion)

    def draws(self) -> Draws:
        """The random numbers that a step needs for each position of the global batch; these are every method's."""
        return {"drop": ("uniform", ()), **self.process.draws, "noise": ("normal", self.shape)}

    def begin_step(self, batches: list[Batch], step: int) -> list[Any]:
        """Work before the gradient over all micro-batches of this worker; one context for each."""
        return [None] * len(batches)

    def forward(self, batch: Batch, context: Any, step: int) -> Losses:
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Changes gradients once they are complete, before clipping and the optimiser."""

    def after_optimizer(self, step: int) -> None:
        """Follows the parameters just updated, e.g. a teacher."""

    def end_step(self, step: int) -> None:
        """Last of a step: centres."""

    def diagnostics(self) -> dict[str, Tensor]:
        """Detached scalars about the step just ended, over the global batch, by metric name without 'train/'.

        Every worker calls it, where the loop logs.
        """
        return {}

    def drop_labels(self, y: Tensor, draw: Tensor) -> Tensor:
        """Labels (B,), the null class where the draw (B,) says so (`method.class_dropout`)."""
        return torch.where(draw < self.experiment.method.class_dropout, self.num_classes, y)

    def predict(
        self, network: nn.Module, x0: Tensor, eps: Tensor, level: Tensor, y: Tensor, mask: Mask | None = None
    ) -> Tensor:
        """F of `network` for x0 noised to `level` (B,) by eps; with a mask, from its visible tokens."""
        inputs = self.process.network_input(x0, eps, level), self.process.condition(level), y
        return network(*inputs) if mask is None else network(*inputs, mask)

    # ------------------------------------------------------------------------------------- what is asked afterwards

    @torch.no_grad()
    def features(self, network: nn.Module, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """What the encoder says of images x0 (B, C, H, W) at noise σ (B,): its patch tokens' mean, (B, D) float32.

        All tokens are visible, and no label is given, so that it cannot leak into a probe.
        """
        assert isinstance(network, Encoder)
        level = self.process.level_of(sigma)
        tokens = network.embed(self.process.network_input(x0, eps, level))
        y = torch.full((len(x0),), self.num_classes, device=x0.device)
        encoded = network.encode(tokens, network.condition(self.process.condition(level), y))
        return encoded[:, -network.num_tokens :].float().mean(dim=1)

    @torch.no_grad()
    def denoising_error(self, network: nn.Module, x0: Tensor, eps: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """The generative loss of each image (B,) at noise σ (B,), with all tokens visible."""
        level = self.process.level_of(sigma)
        output = self.predict(network, x0, eps, level, y)
        return self.process.error(output, x0, eps, level).mean(dim=(1, 2, 3))
