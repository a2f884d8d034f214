"""The generator of SD-DiT: an encoder of visible tokens and [CLS], a bridge, a decoder of all tokens (methods.md §6.3).

The substrate is MaskDiT's (arXiv 2306.09305), without its mask token: where the encoder saw nothing, the decoder
receives by default the patch embedding of the noisy input itself.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from sddit.models import masking
from sddit.models.decoder import EncoderDecoder
from sddit.models.layers import Linear, layer_norm, unpatchify


class SDDiT(EncoderDecoder):
    """The switches are those of `config.SDDiT`."""

    def __init__(
        self,
        *args: Any,
        cls_init_std: float = 0.02,
        masked_slots: Literal["noisy", "zeros", "nothing"] = "noisy",
        cls_in_decoder: Literal["removed", "forwarded", "embedded"] = "removed",
        cls_at_inference: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(*args, cls_std=cls_init_std, **options)
        self.masked_slots, self.cls_in_decoder = masked_slots, cls_in_decoder
        self.cls_at_inference = cls_at_inference
        embedded = cls_in_decoder == "embedded"
        self.cls_embed = Linear(self.width, self.width, law=("normal", 0.02)) if embedded else None

    def forward(self, x: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        """Raw output F, (B, out_channels, H, W), all tokens visible: the graph of inference. Arguments as in `DiT`."""
        tokens, c = self.embed(x), self.condition(noise, y)
        return self.decode(self.encode(tokens, c, cls=self.cls_at_inference), tokens, c)

    def decode(self, encoded: Tensor, tokens: Tensor, c: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """F from the encoder's output and the embedded noisy input `tokens` (B, N, D).

        `encoded` starts with [CLS], unless it is as long as what was visible. What is not decoded is 0.
        """
        visible = self.num_tokens if ids_keep is None else ids_keep.shape[1]
        cls, encoded = encoded[:, :-visible], encoded[:, -visible:]
        if self.cls_embed is not None:
            c = c + self.cls_embed(layer_norm(cls[:, 0]))
        first = self.cross(cls, c) if self.cls_in_decoder == "forwarded" else None

        if ids_keep is None or self.masked_slots == "nothing":
            patches = self.run_decoder(self.cross(encoded, c), c, ids_keep, first)
            if ids_keep is not None:
                patches = self.filled(patches, ids_keep)
        elif self.masked_slots == "noisy":
            patches = self.run_decoder(self.cross(masking.scatter(tokens, ids_keep, encoded), c), c, first=first)
        else:  # zeros enter behind the bridge, where MaskDiT's mask token does; without one, a position alone
            fill = self.pos_embed if self.bridge is None else None
            patches = self.run_decoder(self.filled(self.cross(encoded, c), ids_keep, fill), c, first=first)
        return unpatchify(patches, self.patch, self.out_shape)
