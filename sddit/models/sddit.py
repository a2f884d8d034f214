"""The generator of SD-DiT: an encoder of visible tokens and [CLS], a bridge, a decoder of all tokens (methods.md §6.3).

The substrate is MaskDiT's (arXiv 2306.09305), without its mask token: where the encoder saw nothing, the decoder
receives the patch embedding of the noisy input itself.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from sddit.models import masking
from sddit.models.layers import Block, Encoder, ModulatedLinear, frozen, sincos_2d, unpatchify


class SDDiT(Encoder):
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
        cls_init_std: float = 0.02,
        masked_slots: Literal["noisy", "zeros"] = "noisy",
    ) -> None:
        super().__init__(shape, num_classes, depth, width, heads, patch, null_row=False, cls_std=cls_init_std)
        self.masked_slots = masked_slots
        self.bridge = ModulatedLinear(width, decoder_width, width)
        self.decoder_pos_embed = frozen(sincos_2d(decoder_width, *self.grid))
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads, width) for _ in range(decoder_depth))
        self.final = ModulatedLinear(decoder_width, patch * patch * shape[0], width)

    def forward(self, x: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        """Raw output F, (B, C, H, W), with all tokens visible: the graph of inference. Arguments as in `DiT`."""
        tokens, c = self.embed(x), self.condition(noise, y)
        return self.decode(self.encode(tokens, c), tokens, c)

    def decode(self, encoded: Tensor, tokens: Tensor, c: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """F from the encoder's output ([CLS] first, dropped here) and the embedded noisy input `tokens` (B, N, D)."""
        visible = encoded[:, 1:]
        if ids_keep is None:
            slots = self.bridge(visible, c)
        elif self.masked_slots == "noisy":
            slots = self.bridge(masking.scatter(tokens, ids_keep, visible), c)
        else:  # zeros enter behind the bridge, where MaskDiT's mask token does
            visible = self.bridge(visible, c)
            zeros = visible.new_zeros(len(visible), self.num_tokens, visible.shape[2])
            slots = masking.scatter(zeros, ids_keep, visible)
        slots = slots + self.decoder_pos_embed
        for block in self.decoder_blocks:
            slots = block(slots, c)
        return unpatchify(self.final(slots, c), self.patch, self.shape)
