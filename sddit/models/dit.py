"""DiT (Peebles & Xie, arXiv 2212.09748): one stack of blocks on all tokens (methods.md §2.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sddit.models.layers import Encoder, ModulatedLinear, unpatchify


class DiT(Encoder):
    """`out_channels` is C by default; noise prediction with learnt variance takes 2C."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        depth: int,
        width: int,
        heads: int,
        patch: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes, depth, width, heads, patch, null_row=True)
        self.out_shape = (out_channels or shape[0], *shape[1:])
        self.final = ModulatedLinear(width, patch * patch * self.out_shape[0], width)

    def forward(self, x: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        """Raw output F, (B, out_channels, H, W).

        Args:
            x: (B, C, H, W), scaled as the network sees it (c_in under EDM).
            noise: (B,) ln(σ)/4 under EDM, the original step index under IDDPM.
            y: (B,) int64 labels; `num_classes` is the null class.
        """
        c = self.condition(noise, y)
        tokens = self.final(self.encode(self.embed(x), c), F.silu(c))
        return unpatchify(tokens, self.patch, self.out_shape)
