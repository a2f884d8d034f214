"""Which tokens the encoder sees, and how tokens leave and re-enter the sequence (methods.md §12.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sddit.errors import UsageError


class Mask(NamedTuple):
    """One random mask for each image."""

    ids_keep: Tensor  # (B, K) int64, the visible tokens, in random order
    ids_restore: Tensor  # (B, N) int64, where each token stands in the shuffled sequence
    removed: Tensor  # (B, N) float32, 1 = removed, the polarity of all published code


def keep_count(num_tokens: int, mask_ratio: float) -> int:
    """Visible tokens: int(N (1 - M)), truncated in floating point as published (256 at M = 0.7 keeps 76)."""
    keep = int(num_tokens * (1 - mask_ratio))
    if keep < 1:
        raise UsageError(
            f"mask_ratio {mask_ratio:g} leaves none of {num_tokens} tokens visible. "
            f"Use at most {1 - 1 / num_tokens:g}, or a smaller patch."
        )
    return keep


def random_mask(noise: Tensor, keep: int) -> Mask:
    """Keeps the `keep` tokens with the smallest noise; `noise` (B, N) is uniform."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Mask(ids_shuffle[:, :keep], ids_restore, (ids_restore >= keep).float())


def gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens at `ids`: (B, N, D), (B, K) → (B, K, D)."""
    b, n, d = tokens.shape
    rows = ids + n * torch.arange(b, device=ids.device)[:, None]  # whole rows: faster than `torch.gather`
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(b, -1, d)


def scatter(into: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """`into` (B, N, D) with `tokens` (B, K, D) in the places `ids` (B, K)."""
    return into.scatter(1, ids[:, :, None].expand(-1, -1, into.shape[2]), tokens.to(into.dtype))
