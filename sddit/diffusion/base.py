"""What a noise process is to a method and to a sampler, whatever the formulation.

Letters: x0 clean image (B, C, H, W), eps unit noise, level the noise level of each image (B,) in the process's own unit
(σ under EDM, the step index t under IDDPM), F raw output of the network: C channels under EDM, 2C under IDDPM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Process(nn.Module, ABC):
    """A module for the sake of its tables, which follow it to a device and are no part of a checkpoint."""

    draws: dict[str, tuple[str, tuple[int, ...]]]  # what `level` needs, as in `Method.draws`

    @abstractmethod
    def level(self, draws: Mapping[str, Tensor]) -> Tensor:
        """The levels of a training step from its raw draws."""

    @abstractmethod
    def level_of(self, sigma: Tensor) -> Tensor:
        """The level whose noise is nearest to σ (B,), noise std over signal."""

    @abstractmethod
    def sigma(self, level: Tensor) -> Tensor:
        """Noise std over signal at a level: the same scale for every process."""

    @abstractmethod
    def noisy(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The noised image as the process defines it: x0 + σ eps, or √ᾱ x0 + √(1 - ᾱ) eps."""

    @abstractmethod
    def network_input(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The noised image, scaled as the network sees it."""

    @abstractmethod
    def condition(self, level: Tensor) -> Tensor:
        """What the network's time embedder sees, float32: ln(σ)/4, or t."""

    @abstractmethod
    def error(self, output: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """(B, C, H, W), float32; the generative loss of an image is its mean."""

    @abstractmethod
    def denoised(self, output: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The clean image that F stands for, (B, C, H, W), float32."""

    @abstractmethod
    def confidence(self, level: Tensor) -> Tensor:
        """(B,), at most 1: what an error of `denoised` is weighed with where nothing else bounds it."""

    @abstractmethod
    def evaluate(self, network: nn.Module, x: Tensor, level: Tensor, y: Tensor) -> Tensor:
        """What a solver asks for at x (B, C, H, W), in the dtype of x: D under EDM, F under IDDPM.

        The network runs in the dtype of its parameters.
        """
