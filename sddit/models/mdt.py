"""MDT (Gao et al., arXiv 2303.14389): removed tokens are interpolated before a decoder (methods.md §4, §5)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddit.models import masking
from sddit.models.layers import AS_IT_IS, Block, Encoder, ModulatedLinear, position_code, unpatchify


class MDT(Encoder):
    """The blocks of DiT with a bias by relative position, the last `decoder_layers` of them as decoder.

    Version 2 joins the encoder's second half with its first by long skips, and every decoder block with the embedded
    input of all tokens. Of an odd number of encoder blocks it loses one, as published.
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
        decoder_layers: int = 2,
        version: Literal["v1", "v2"] = "v1",
        out_channels: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes, 0, width, heads, patch, null_row=True, trained_positions=True)
        self.out_shape = (out_channels or 2 * shape[0], *shape[1:])
        long_skips = version == "v2"

        def stack(count: int, skip: bool = False) -> list[Block]:
            return [Block(width, heads, width, grid=self.grid, skip=skip) for _ in range(count)]

        encoder = depth - decoder_layers
        self.half_depth = encoder // 2 if long_skips else 0
        self.blocks.extend(stack(self.half_depth) + stack(self.half_depth, skip=True) if long_skips else stack(encoder))
        self.side_block = stack(1)[0]
        self.decoder_blocks = nn.ModuleList(stack(decoder_layers, skip=long_skips))
        self.decoder_pos_embed = position_code(width, self.grid, trained=True)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.laws |= {"decoder_pos_embed": AS_IT_IS, "mask_token": ("normal", 0.02)}
        self.final = ModulatedLinear(width, patch * patch * self.out_shape[0], width)

    def encode(self, tokens: Tensor, c: Tensor, ids_keep: Tensor | None = None, *, cls: bool = True) -> Tensor:
        """The encoder's blocks on the visible tokens, (B, K, D); `ids_keep` as in `Encoder.encode`."""
        if ids_keep is not None:
            tokens = masking.gather(tokens, ids_keep)
        c = F.silu(c)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, c, skips.pop() if block.skip is not None else None, ids_keep)
            if i < self.half_depth:
                skips.append(tokens)
        return tokens

    def forward(self, x: Tensor, noise: Tensor, y: Tensor, mask: masking.Mask | None = None) -> Tensor:
        """Raw output F, (B, out_channels, H, W); with `mask`, from its visible tokens alone. Arguments as in `DiT`."""
        embedded, c = self.embed(x), self.condition(noise, y)
        tokens = self.encode(embedded, c, mask.ids_keep if mask else None)
        c = F.silu(c)
        if mask:
            everywhere = self.mask_token.to(tokens.dtype).expand(len(tokens), self.num_tokens, -1)
            tokens = masking.scatter(everywhere, mask.ids_keep, tokens) + self.decoder_pos_embed
            # The side block speaks where a token was removed, and nowhere else.
            tokens = torch.where(mask.removed[:, :, None] > 0, self.side_block(tokens, c), tokens)
        else:
            tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens, c, embedded)
        return unpatchify(self.final(tokens, c), self.patch, self.out_shape)
