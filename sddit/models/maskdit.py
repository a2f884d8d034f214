"""MaskDiT (Zheng et al., arXiv 2306.09305): an encoder of the visible tokens, a light decoder (methods.md §3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sddit.models.decoder import EncoderDecoder
from sddit.models.layers import unpatchify
from sddit.models.masking import Mask


class MaskDiT(EncoderDecoder):
    """With `mask_token`, a learnt vector stands behind the bridge where the encoder saw nothing; zeros otherwise."""

    def __init__(self, *args: Any, mask_token: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mask_token = nn.Parameter(torch.zeros(self.decoder_width)) if mask_token else None
        self.laws["mask_token"] = ("normal", 0.02)

    def forward(self, x: Tensor, noise: Tensor, y: Tensor, mask: Mask | None = None) -> Tensor:
        """Raw output F, (B, out_channels, H, W). Without `mask` all tokens are visible. Arguments as in `DiT`."""
        c = self.condition(noise, y)
        slots = self.cross(self.encode(self.embed(x), c, mask.ids_keep if mask else None), c)
        if mask:
            slots = self.filled(slots, mask.ids_keep, self.mask_token)
        elif self.training and self.mask_token is not None:
            slots = slots + 0 * self.mask_token  # a gradient, so that workers agree on what is trained
        return unpatchify(self.run_decoder(slots, c), self.patch, self.out_shape)
