"""Training steps without a loop: batches as it makes them, and networks whose every weight matters."""

import torch

from sddit import seeding
from sddit.methods.base import Batch, Losses, Method


def make_batch(method: Method, size: int = 16, *, first: int = 0, step: int = 0, seed: int = 0) -> Batch:
    """Positions first … first + size - 1 of the global batch; the images are a function of the position too."""

    def draw(kind: str, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = getattr(seeding, kind)(seed, stream, step, first, first + size, shape)
        return torch.from_numpy(values).float()

    draws = {stream: draw(kind, stream, shape) for stream, (kind, shape) in method.draws().items()}
    y = (draw("uniform", "test/labels", ()) * method.num_classes).long()
    return Batch(0.5 * draw("normal", "test/images", method.shape), y, draws)


def scramble_(module: torch.nn.Module, std: float = 0.1) -> None:
    """Weights of which none is zero, each a function of its name: a network as after some training."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy(seeding.normal(1, name, 0, 0, 1, (p.numel(),))).view(p.shape) * std)


def run_step(method: Method, batches: list[Batch], step: int = 0) -> list[Losses]:
    """Everything before the optimiser; gradients are those of the mean over the micro-batches."""
    method.zero_grad()
    losses = []
    for batch, context in zip(batches, method.begin_step(batches, step), strict=True):
        losses.append(method(batch, context, step))
        (losses[-1].total / len(batches)).backward()
    method.after_backward(step)
    return losses


def moved_at_update(method: Method, updates: int = 3) -> dict[str, int]:
    """Trainable parameter → the first update (from 1) whose gradient is not zero."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    first: dict[str, int] = {}
    for update in range(1, updates + 1):
        run_step(method, [make_batch(method, step=update)], update)
        for name, p in method.named_parameters():
            if p.grad is not None and p.grad.abs().max() > 0:
                first.setdefault(name, update)
        optimizer.step()
        method.after_optimizer(update)
        method.end_step(update)
    return first


def is_gate(name: str) -> bool:
    return "blocks." in name and ".modulation." in name
