"""What the workers of one cell say to each other; with one worker, nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean over the workers of scalars that each computed on an equal share."""
    stacked = torch.stack([v.detach().float() for v in values.values()]).double()
    if world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any worker, so that all of them stop at the same step."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def share(count: int) -> tuple[int, int]:
    """Which of `count` things this worker does: lo … hi - 1, a contiguous part, in the order of the ranks."""
    return count * rank() // world_size(), count * (rank() + 1) // world_size()


def gather(array: np.ndarray, device: torch.device, *, everywhere: bool = False) -> list[np.ndarray]:
    """The arrays of all workers in the order of the ranks, on rank 0 (or `everywhere`); nothing on the others.

    They may differ in length. A worker that gets them holds them twice for a moment.
    """
    if world_size() == 1:
        return [array]
    mine = torch.from_numpy(array).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=device))
    longest = max(int(length) for length in lengths)
    padded = mine.new_zeros((longest, *mine.shape[1:]))
    padded[: len(mine)] = mine
    shares = [torch.empty_like(padded) for _ in range(world_size())] if everywhere or rank() == 0 else []
    if everywhere:
        dist.all_gather(shares, padded)
    else:
        dist.gather(padded, shares or None)
    return [s[: int(n)].cpu().numpy() for s, n in zip(shares, lengths, strict=bool(shares))]


def minimum(array: np.ndarray, device: torch.device) -> np.ndarray:
    """The elementwise minimum over the workers, on every one."""
    if world_size() == 1:
        return array
    values = torch.from_numpy(array).to(device)
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values.cpu().numpy()


def broadcast_values(values: Any) -> Any:
    """Rank 0's plain values on every worker."""
    if world_size() == 1:
        return values
    box = [values]
    dist.broadcast_object_list(box, src=0)
    return box[0]
