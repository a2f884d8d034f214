"""Self-distillation between two views: head, targets, cross-entropy, and what the targets know (methods.md §6, §9).

Letters: T tokens, K prototypes, z logits (cosine similarities to the prototypes), τ temperatures, P_T = targets from
the teacher. From the cosines on all is float32, also under autocast. Sums run over the tokens of all workers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sddit.config import SDDiT
from sddit.models.layers import Linear, layer_norm


class ProjectionHead(nn.Module):
    """Encoder tokens (..., D) → logits (..., K): LN, an MLP with GELU, then cosines with learnt prototypes.

    iBOT's head. Its gain of the weight normalisation is fixed at 1, so there is no tensor for it here. Under autocast
    the MLP computes as the encoder does whose tokens it sees; cosines and all that follows are float32.
    """

    def __init__(self, method: SDDiT, width: int) -> None:
        super().__init__()
        sizes = [width, *[method.head_hidden] * (method.head_layers - 1), method.head_bottleneck]
        # iBOT truncates its normal at ±2, a hundred standard deviations: never.
        law = ("normal", 0.02) if method.head_init == "trunc_normal" else None
        self.mlp = nn.ModuleList(Linear(a, b, law=law) for a, b in pairwise(sizes))
        # torch's default law of a Linear, which iBOT leaves to this layer. Only directions count.
        uniform = ("uniform", 1 / math.sqrt(sizes[-1]))
        self.prototypes = Linear(sizes[-1], method.num_prototypes, bias=False, law=uniform)

    def forward(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """z/τ: the temperature goes to the short vectors, since a pass over all logits costs more than a layer."""
        x = layer_norm(tokens.float())
        for i, layer in enumerate(self.mlp):
            x = layer(F.gelu(x) if i else x)
        with torch.autocast(tokens.device.type, enabled=False):
            x = F.normalize(x.float(), dim=-1) / temperature
            return F.linear(x, F.normalize(self.prototypes.weight, dim=-1))


class Heads(nn.ModuleDict):
    """One head for [CLS] and patches, or one for each: (B, 1 + N, D) → (B, 1 + N, K), [CLS] first."""

    def __init__(self, method: SDDiT, width: int) -> None:
        names = ["shared"] if method.head_shared else ["cls", "patch"]
        super().__init__({name: ProjectionHead(method, width) for name in names})

    def forward(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        if "shared" in self:
            return self["shared"](tokens, temperature)
        parts = self["cls"](tokens[:, :1], temperature), self["patch"](tokens[:, 1:], temperature)
        return torch.cat(parts, dim=1)


class Targets(nn.Module):
    """Teacher logits of one kind of token, (T, K), to P_T: centred, sharpened. Keeps the centre, where there is one.

    A token may belong to a group, its position, which then has its own centre (or is balanced on its own); by default
    all are one group. The centre used is the one at the start of the step; `update` moves it.
    """

    centre: Tensor  # (G, K), with centring 'ema'

    def __init__(self, method: SDDiT, num_groups: int = 1) -> None:
        super().__init__()
        self.kind, self.momentum, self.iterations = method.centring, method.centre_momentum, method.sinkhorn_iterations
        self.num_groups = num_groups
        self.pending: list[Tensor] = []  # sums (G, K) and counts (G, 1) of the step's logits
        if self.kind == "ema":
            self.register_buffer("centre", torch.zeros(num_groups, method.num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, groups: Tensor | None = None) -> Tensor:
        """P_T (T, K) of all teacher tokens of this worker, all micro-batches together. `groups` (T,) int64."""
        if self.kind == "sinkhorn":
            return sinkhorn(logits / temperature, self.iterations, groups, self.num_groups)
        self.observe(logits, groups)
        return torch.softmax(self.centre_(logits.clone(), temperature, groups), dim=1)

    @torch.no_grad()
    def observe(self, logits: Tensor, groups: Tensor | None = None) -> None:
        """Counts all tokens (..., K) of this worker, in `groups` (...), into the step's mean."""
        if self.kind == "ema":
            ones = logits.new_ones(logits[..., :1].shape)
            self.pending = sum_over_workers(*(group_sum(v, groups, self.num_groups) for v in (logits, ones)))

    @torch.no_grad()
    def centre_(self, logits: Tensor, temperature: float, groups: Tensor | None = None) -> Tensor:
        """(z - c)/τ of tokens (..., K), in place: at K = 8192 every further copy costs as much as a layer."""
        if self.kind == "ema":
            logits.sub_(self.centre[0] if groups is None else self.centre[groups])
        return logits.div_(temperature)

    @torch.no_grad()
    def update(self) -> None:
        """c ← m c + (1 - m) mean of the step's logits; a position that no token had keeps its centre."""
        if self.pending:
            (sums, counts), self.pending = self.pending, []
            mean = torch.where(counts > 0, sums / counts.clamp(min=1), self.centre)
            self.centre.lerp_(mean, 1 - self.momentum)


def sinkhorn(scores: Tensor, iterations: int, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """Sinkhorn-Knopp on z/τ (T, K), as SwAV and DINOv2: prototypes evenly used (in each group), rows sum to 1.

    Starts from each prototype's greatest score over all workers, which the first normalisation cancels.
    """
    top = scores.amax(dim=0)
    if _workers() > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX)
    tiny = torch.finfo(scores.dtype).tiny
    p = (scores - top).exp_()
    for _ in range(iterations):
        (used,) = sum_over_workers(group_sum(p, groups, num_groups))
        p /= (used if groups is None else used[groups]).clamp_(min=tiny)
        p /= p.sum(dim=1, keepdim=True).clamp_(min=tiny)
    return p


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """-Σ_k P_T[k] ln softmax(z/τ)[k] of each token: scores z/τ (..., K), P_T (..., K) → (...), in nats."""
    ce = F.cross_entropy(scores.flatten(0, -2), targets.flatten(0, -2), reduction="none")
    return ce.view(scores.shape[:-1])


@torch.no_grad()
def information(*targets: Tensor) -> list[Tensor]:
    """I = H(mean P_T) - mean H(P_T) in nats for each (T, K), over all workers (methods.md §8.4(7)).

    Near 0 the targets say nothing: uniform for every token, or the same prototype for all.
    """
    sums = sum_over_workers(
        *(v for p in targets for v in (p.sum(dim=0), torch.special.entr(p).sum(), p.new_full((), len(p))))
    )
    triples = zip(sums[::3], sums[1::3], sums[2::3], strict=True)
    return [torch.special.entr(total / count).sum() - entropy / count for total, entropy, count in triples]


def ramp(start: float, end: float, step: int, steps: int) -> float:
    """Linear from `start` at step 0 to `end` at `steps`, then constant."""
    return end if step >= steps else start + (end - start) * step / steps


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at `steps`, then constant."""
    return end - (end - start) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def group_sum(values: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """Sums of the vectors in (..., K) by group: (G, K)."""
    if groups is None:
        while values.ndim > 1:  # one dimension at a time: over two of a slice the CPU takes twenty times as long
            values = values.sum(dim=-2)
        return values[None]
    zeros = values.new_zeros(num_groups, values.shape[-1])
    return zeros.index_add_(0, groups.flatten(), values.flatten(0, -2))


def sum_over_workers(*tensors: Tensor) -> list[Tensor]:
    """Each summed over the process group in one exchange; without one, as they are."""
    if _workers() == 1:
        return list(tensors)
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
