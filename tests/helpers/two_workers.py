"""SD-DiT's step on one worker or two. As a script it is one worker of two: ``python two_workers.py RANK FOLDER``.

Leaves in FOLDER what the step gave on this rank; `test_sddit.py` compares it with a worker that does all in one.
"""

import contextlib
import sys
from typing import Any

import torch
from gloo import worker
from steps import make_batch, scramble_
from torch.nn.parallel import DistributedDataParallel

from sddit import presets
from sddit.methods.sddit import SDDiTMethod

BASE = {"centring": "ema", "tau_teacher": 0.07, "tau_teacher_warmup_steps": 20, "mask_ratio": 0.25}


def untouched(**changes: Any) -> SDDiTMethod:
    fields = {k if "." in k else f"method.{k}": v for k, v in (BASE | changes).items()}
    return SDDiTMethod(presets.digits().replace(fields), (1, 8, 8), 10)


def build(**changes: Any) -> SDDiTMethod:
    """As after some training, with a teacher that follows the student but lags."""
    method = untouched(**changes)
    scramble_(method.network)
    if method.options.lambda_d:
        scramble_(method.heads)
        with torch.no_grad():
            torch._foreach_lerp_(method._teacher_parameters, method._student_parameters, 0.7)
    return method


WORLDS: list[dict[str, Any]] = [
    {"centring": "ema"},
    {"centring": "sinkhorn"},
    {"centring": "ema", "centre_per_position": True, "teacher_tokens": "visible"},
    {"centring": "sinkhorn", "centre_per_position": True},
]


def step_of(method: SDDiTMethod, model: torch.nn.Module, sizes: list[int], first: int) -> dict[str, Any]:
    """What a step gives, on micro-batches of these sizes from position `first` on."""
    firsts = [first + sum(sizes[:i]) for i in range(len(sizes))]
    batches = [make_batch(method, size, first=lo) for size, lo in zip(sizes, firsts, strict=True)]
    contexts = method.begin_step(batches, 3)
    per_image = []
    for i, (batch, context) in enumerate(zip(batches, contexts, strict=True)):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or model is method else model.no_sync():  # type: ignore[operator]
            losses = model(batch, context, 3)
            (losses.total / len(batches)).backward()
        per_image.append(losses.per_image)
    method.end_step(3)
    information = method.diagnostics()
    return {
        "targets": torch.cat([context.targets for context in contexts]),
        "per_image": torch.cat(per_image),
        "gradients": {name: p.grad for name, p in method.named_parameters() if p.grad is not None},
        "centres": dict(method.named_buffers()),
        "information": information,
    }


if __name__ == "__main__":
    folder = sys.argv[2]
    with worker(init_method=f"file://{folder}/store", rank=int(sys.argv[1]), world_size=2) as rank:
        results = []
        for changes in WORLDS:
            method = build(**changes)
            model = DistributedDataParallel(method, broadcast_buffers=False)  # without a search for unused parameters
            results.append(step_of(method, model, sizes=[4, 4], first=8 * rank))
        torch.save(results, f"{folder}/rank-{rank}.pt")
