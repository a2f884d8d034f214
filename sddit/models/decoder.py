"""Encoder, bridge and decoder: what MaskDiT and SD-DiT share (MaskDiT, arXiv 2306.09305; methods.md §3.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddit.models import masking
from sddit.models.layers import Block, Encoder, ModulatedLinear, position_code


class EncoderDecoder(Encoder):
    """An `Encoder` on the visible tokens, and a decoder of `decoder_width` that takes its condition from it.

    Without `bridge` the decoder is a stack of further blocks on the same tokens, without a positional code of its own.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        depth: int,
        width: int,
        heads: int,
        patch: int,
        *,
        decoder_depth: int = 8,
        decoder_width: int = 512,
        decoder_heads: int = 16,
        bridge: bool = True,
        out_channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(shape, num_classes, depth, width, heads, patch, null_row=False, **options)
        self.out_shape = (out_channels or shape[0], *shape[1:])
        self.decoder_width = decoder_width
        self.bridge = ModulatedLinear(width, decoder_width, width) if bridge else None
        self.decoder_pos_embed = position_code(decoder_width, self.grid) if bridge else None
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads, width) for _ in range(decoder_depth))
        self.final = ModulatedLinear(decoder_width, patch * patch * self.out_shape[0], width)

    def cross(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Tokens of the encoder (B, K, D) as the decoder takes them, (B, K, decoder_width)."""
        return tokens if self.bridge is None else self.bridge(tokens, F.silu(c))

    def run_decoder(self, slots: Tensor, c: Tensor, ids: Tensor | None = None, first: Tensor | None = None) -> Tensor:
        """Patch vectors (B, K, p·p·out) from the slots (B, K, decoder_width) at the positions `ids` (B, K).

        `first` (B, 1, decoder_width), where given, comes before them, without a positional code, and is dropped.
        """
        if self.decoder_pos_embed is not None:
            slots = slots + (self.decoder_pos_embed if ids is None else self.decoder_pos_embed[ids])
        if first is not None:
            slots = torch.cat([first, slots], dim=1)
        c = F.silu(c)
        for block in self.decoder_blocks:
            slots = block(slots, c)
        return self.final(slots if first is None else slots[:, 1:], c)

    def filled(self, tokens: Tensor, ids_keep: Tensor, fill: Tensor | None = None) -> Tensor:
        """(B, N, ·) with `tokens` (B, K, ·) in their places, and `fill` (·,) or (N, ·), or zeros, in all others."""
        shape = (len(tokens), self.num_tokens, tokens.shape[2])
        into = tokens.new_zeros(shape) if fill is None else fill.to(tokens.dtype).expand(shape)
        return masking.scatter(into, ids_keep, tokens)
