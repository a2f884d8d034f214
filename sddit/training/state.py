"""All that a training run carries from step to step, and its form as tensors in a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sddit.config import Experiment, Train
from sddit.errors import CheckpointError
from sddit.methods.base import Method
from sddit.training.store import SAMPLING, TRAINING

COUNTER = "optimizer-step"


class SamplingEMA:
    """The averaged network: an exact copy at the start, then θ̄ ← β θ̄ + (1 − β) θ after every step.

    β is `config.Train.ema_beta`.
    """

    def __init__(self, network: nn.Module, train: Train) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.train = train
        names = {name for name, p in network.named_parameters() if p.requires_grad}
        self._source: list[Tensor] = [p for name, p in network.named_parameters() if name in names]
        self._average: list[Tensor] = [p for name, p in self.network.named_parameters() if name in names]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update `step` = 1, 2, …"""
        torch._foreach_lerp_(self._average, self._source, 1 - self.train.ema_beta(step))


@dataclass
class Clocks:
    """What a run has cost so far, over all its starts."""

    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    device_seconds: float = 0.0  # both, times the workers of the time

    def add(self, *, train: float = 0.0, evaluation: float = 0.0, workers: int) -> None:
        self.train_seconds += train
        self.eval_seconds += evaluation
        self.device_seconds += (train + evaluation) * workers


@dataclass
class TrainState:
    """Method (network, head, teacher, centres), optimiser, sampling EMA, step and clocks."""

    method: Method
    optimizer: torch.optim.Optimizer
    ema: SamplingEMA
    step: int = 0
    clocks: Clocks = field(default_factory=Clocks)

    @classmethod
    def create(cls, experiment: Experiment, method: Method, device: torch.device) -> TrainState:
        method.to(device).train()
        train = experiment.train
        return cls(method, build_optimizer(method, train), SamplingEMA(method.network, train))

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint: 'sampling' (averaged network) and 'training' (the rest)."""
        training = {f"method/{k}": v for k, v in self.method.state_dict().items()}
        for name, parameter in self._trainable().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                training[f"optimizer/{name}/{key}"] = value
        if (count := self.optimizer.param_groups[0].get("step")) is not None:  # Adan counts once for all
            training[COUNTER] = torch.tensor(count)
        return {SAMPLING: dict(self.ema.network.state_dict()), TRAINING: training}

    def restore(self, step: int, values: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes back to what `groups` gave, bit for bit.

        Raises:
            CheckpointError: names or shapes of the tensors are not those of this experiment.
        """
        training = groups[TRAINING]
        try:
            self.method.load_state_dict(_under("method/", training))
            self.ema.network.load_state_dict(groups[SAMPLING])
        except RuntimeError as error:
            raise CheckpointError(f"The checkpoint at step {step} is of another network: {error}") from error
        for name, parameter in self._trainable().items():
            if state := _under(f"optimizer/{name}/", training):
                # AdamW's own step counter stays where the fused kernel wants it: beside its parameter.
                self.optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
        if COUNTER in training:
            self.optimizer.param_groups[0]["step"] = int(training[COUNTER])
        self.step = step
        self.clocks = Clocks(**values["clocks"])

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.method.named_parameters() if p.requires_grad}


def build_optimizer(method: Method, train: Train) -> torch.optim.Optimizer:
    """AdamW, or Adan (arXiv 2208.06677) as MDTv2 uses it, on the method's trainable parameters."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    if train.optimizer == "adan":
        from timm.optim import Adan  # seconds to import

        return Adan(parameters, lr=train.lr, eps=train.eps, weight_decay=train.weight_decay)
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(
        parameters, lr=train.lr, betas=betas, eps=train.eps, weight_decay=train.weight_decay, fused=True
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
