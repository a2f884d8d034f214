"""The parts of a diffusion transformer, and the law from which each draws its initial weights (methods.md §1.3).

Letters: B batch, C channels, H, W sides of the input, p patch side, N = (H/p)(W/p) tokens, D width of the tokens,
c condition (B, width of the encoder). Tokens run row by row; the vector of a patch is (row, column, channel).

A layer declares `laws`, parameter name → (kind, scale), and draws nothing itself: `keyed_init_` makes every weight a
function of (seed, parameter name), so networks that share a part start from the same weights there.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddit import seeding
from sddit.models import masking

Law = tuple[str, float]  # ('zeros', _), ('normal', standard deviation), ('uniform', half-width) or ('as it is', _)
ZEROS: Law = ("zeros", 0.0)
AS_IT_IS: Law = ("as it is", 0.0)  # positional codes that are trained from the fixed ones on

TIME_FREQUENCIES = 128
LN_EPS = 1e-6


# ----------------------------------------------------------------------------------------------------- initial weights


def xavier(fan_in: int, fan_out: int) -> Law:
    """Uniform with variance 2 / (fan_in + fan_out)."""
    return ("uniform", math.sqrt(6 / (fan_in + fan_out)))


@torch.no_grad()
def keyed_init_(module: nn.Module, seed: int) -> None:
    """Draws every trainable parameter of `module` from the stream 'init/<name>' by the law its layer declares.

    Names are relative to `module`. Frozen parameters (positional codes) keep their values.
    """
    for prefix, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad and not parameter.is_meta:
                _draw_(parameter, layer.laws[name], seed, f"init/{prefix}.{name}" if prefix else f"init/{name}")


def _draw_(parameter: nn.Parameter, law: Law, seed: int, stream: str) -> None:
    kind, scale = law
    if kind == "as it is":
        return
    size = (parameter.numel(),)
    if kind == "zeros":
        parameter.zero_()
        return
    if kind == "normal":
        values = seeding.normal(seed, stream, 0, 0, 1, size) * np.float32(scale)
    else:
        values = ((2 * seeding.uniform(seed, stream, 0, 0, 1, size) - 1) * scale).astype(np.float32)
    parameter.copy_(torch.from_numpy(values).view(parameter.shape))


class Linear(nn.Linear):
    """`nn.Linear` that starts at zero until `keyed_init_` draws its weight by `law` (default Xavier-uniform)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, law: Law | None = None) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.laws: dict[str, Law] = {"weight": law or xavier(in_features, out_features), "bias": ZEROS}

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


# ------------------------------------------------------------------------------------------------------------- tokens


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, N, p·p·C)."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, shape: tuple[int, int, int]) -> Tensor:
    """(B, N, p·p·C) → (B, C, H, W): the inverse of `patchify`; `shape` is (C, H, W)."""
    c, h, w = shape
    x = tokens.view(-1, h // patch, w // patch, patch, patch, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, c, h, w)


def sincos_2d(width: int, rows: int, columns: int) -> Tensor:
    """Fixed positional code, (rows·columns, width) float32, made in float64.

    First half of the width codes the column, second half the row; in each half all sines come before all cosines.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    row, column = np.indices((rows, columns), dtype=np.float64).reshape(2, -1, 1)
    code = np.concatenate([f(i * frequencies) for i in (column, row) for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(code.astype(np.float32))


def position_code(width: int, grid: tuple[int, int], *, trained: bool = False) -> nn.Parameter:
    """`sincos_2d` as a parameter: counted and saved with the network, as in the published code, also if not trained."""
    return nn.Parameter(sincos_2d(width, *grid).to(torch.get_default_device()), requires_grad=trained)


# ---------------------------------------------------------------------------------------------------------- condition


class TimestepEmbedder(nn.Module):
    """Noise level, any float per image, (B,) → (B, D): a sinusoid of 128 frequencies, cosines first, then an MLP."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # In float32 as published: at t = 999 the last bit of a frequency is 1e-5 of the output.
        k = torch.arange(TIME_FREQUENCIES, dtype=torch.float32)
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * k / TIME_FREQUENCIES), persistent=False)
        self.hidden = Linear(2 * TIME_FREQUENCIES, width, law=("normal", 0.02))
        self.out = Linear(width, width, law=("normal", 0.02))

    def forward(self, noise: Tensor) -> Tensor:
        angles = noise.float()[:, None] * self.frequencies
        return self.out(F.silu(self.hidden(torch.cat([angles.cos(), angles.sin()], dim=1))))


class ClassEmbedder(nn.Module):
    """Label (B,) int64 → (B, D); the null class has index `num_classes`.

    With `null_row` it is a learnt row like the others (DiT, MDT). Without, it is the zero vector: a bias-free Linear
    on the one-hot, stored here as its columns (MaskDiT, SD-DiT). All start from N(0, 0.02²).
    """

    def __init__(self, num_classes: int, width: int, *, null_row: bool) -> None:
        super().__init__()
        self.num_classes, self.null_row = num_classes, null_row
        self.table = nn.Parameter(torch.zeros(num_classes + null_row, width))
        self.laws: dict[str, Law] = {"table": ("normal", 0.02)}

    def forward(self, y: Tensor) -> Tensor:
        if self.null_row:
            return F.embedding(y, self.table)
        known = (y < self.num_classes).to(self.table.dtype)
        return F.embedding(y.clamp(max=self.num_classes - 1), self.table) * known[:, None]


# ------------------------------------------------------------------------------------------------------------- blocks


def layer_norm(x: Tensor) -> Tensor:
    """Over the last dimension, without learnt scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift; x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, layer_norm(x), 1 + scale)


class RelativePositionBias(nn.Module):
    """A learnt number for each head and each offset between two tokens (BEiT, arXiv 2106.08254; three rows unused)."""

    offsets: Tensor

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        rows, columns = grid
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, heads))
        self.laws: dict[str, Law] = {"table": ("normal", 0.02)}
        row, column = torch.tensor(np.indices(grid).reshape(2, -1))
        down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
        self.register_buffer("offsets", down * (2 * columns - 1) + right, persistent=False)

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """(1, h, N, N), or (B, h, K, K) among the tokens `ids` (B, K) of each image."""
        offsets = self.offsets[None] if ids is None else self.offsets[ids[:, :, None], ids[:, None, :]]
        # A row for each head: twice as fast, both ways, as rows of heads.
        bias = self.table.t().index_select(1, offsets.flatten())
        return bias.view(-1, *offsets.shape).transpose(0, 1)


class Attention(nn.Module):
    """Multi-head self-attention with biases, no dropout; with `grid`, also with a bias by relative position."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.position = RelativePositionBias(grid, heads) if grid else None

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        bias = None if self.position is None else self.position(ids).to(q.dtype)
        # On a CPU the fused kernel has no form for a bias that is trained: what stands in for it computes in float32,
        # ten times slower under bf16. And without a bias it takes twice as long under bf16 as the plain products.
        products = x.device.type == "cpu" and (bias is not None or q.dtype is torch.bfloat16)
        mixed = _attention(q, k, v, bias) if products else F.scaled_dot_product_attention(q, k, v, bias)
        return self.out(mixed.transpose(1, 2).reshape(b, n, d))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As the fused kernel, with the scores (B, h, N, N) in memory."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3))
    if bias is not None:
        scores = scores + bias
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v)


class MLP(nn.Module):
    """Two layers with GELU (tanh approximation), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = Linear(width, 4 * width)
        self.out = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero block. `condition` is the width of c, which a decoder takes from its encoder.

    With `grid`, its attention has a bias by relative position; with `skip`, its input is first joined with another.
    """

    def __init__(
        self, width: int, heads: int, condition: int, *, grid: tuple[int, int] | None = None, skip: bool = False
    ) -> None:
        super().__init__()
        self.skip = Linear(2 * width, width) if skip else None
        self.attention = Attention(width, heads, grid)
        self.mlp = MLP(width)
        self.modulation = Linear(condition, 6 * width, law=ZEROS)

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """x and skip (B, N, D); c (B, condition), already through SiLU, which all blocks share; ids (B, N)."""
        if self.skip is not None:
            assert skip is not None
            x = self.skip(torch.cat([x, skip], dim=2))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, gate1, self.attention(modulate(x, shift1, scale1), ids))
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2)))


class ModulatedLinear(nn.Module):
    """LN → modulate → Linear, all zero at the start: the final layer, and the bridge from encoder to decoder."""

    def __init__(self, width: int, out: int, condition: int) -> None:
        super().__init__()
        self.modulation = Linear(condition, 2 * width, law=ZEROS)
        self.linear = Linear(width, out, law=ZEROS)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(modulate(x, shift, scale))


class Encoder(nn.Module):
    """Embedders and a stack of blocks: all of DiT but its final layer, and what the teacher of SD-DiT copies.

    With `cls_std`, a learnt [CLS] token drawn from N(0, cls_std²) comes first; its positional code is zero. The
    positional codes are fixed, or with `trained_positions` start from the fixed ones.
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
        null_row: bool,
        cls_std: float | None = None,
        trained_positions: bool = False,
    ) -> None:
        super().__init__()
        channels, height, columns = shape
        self.shape, self.patch, self.width = shape, patch, width
        self.grid = (height // patch, columns // patch)
        self.num_tokens = self.grid[0] * self.grid[1]
        # The published strided convolution, as a Linear on patch vectors.
        self.patch_embed = Linear(patch * patch * channels, width)
        self.pos_embed = position_code(width, self.grid, trained=trained_positions)
        self.time_embed = TimestepEmbedder(width)
        self.class_embed = ClassEmbedder(num_classes, width, null_row=null_row)
        self.blocks = nn.ModuleList(Block(width, heads, width) for _ in range(depth))
        self.cls = None if cls_std is None else nn.Parameter(torch.zeros(width))
        self.laws: dict[str, Law] = {"cls": ("normal", cls_std or 0.0), "pos_embed": AS_IT_IS}

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → tokens with their positional code, (B, N, D)."""
        return self.patch_embed(patchify(x, self.patch)) + self.pos_embed

    def condition(self, noise: Tensor, y: Tensor) -> Tensor:
        """c, (B, D): time plus class embedding."""
        return self.time_embed(noise) + self.class_embed(y)

    def encode(self, tokens: Tensor, c: Tensor, ids_keep: Tensor | None = None, *, cls: bool = True) -> Tensor:
        """The blocks on [CLS], where there is one and it is wanted, and the visible tokens: (B, 1 + K, D).

        `ids_keep` (B, K) chooses the visible of `tokens` (B, N, D) and gives their order; None keeps all in place.
        """
        if ids_keep is not None:
            tokens = masking.gather(tokens, ids_keep)
        if cls and self.cls is not None:
            tokens = torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], dim=1)
        c = F.silu(c)
        for block in self.blocks:
            tokens = block(tokens, c)
        return tokens
