"""What the workers of one cell say to each other; with one worker, nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sddit.metrics.statistics import Moments


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


def merge_moments(moments: Moments, device: torch.device) -> Moments:
    """The moments of all workers' features, merged in the order of the ranks: the same on every worker."""
    if world_size() == 1:
        return moments
    flat = torch.from_numpy(moments.to_array()).to(device)
    shares = [torch.empty_like(flat) for _ in range(world_size())]
    dist.all_gather(shares, flat)
    total = Moments()
    for share in shares:
        total.merge(Moments.from_array(share.cpu().numpy()))
    return total


def broadcast_values(values: Any) -> Any:
    """Rank 0's plain values on every worker."""
    if world_size() == 1:
        return values
    box = [values]
    dist.broadcast_object_list(box, src=0)
    return box[0]
