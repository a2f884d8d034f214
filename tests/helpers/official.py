"""Weights under the names and layouts of other projects, and what their networks compute, written from the formulas.

Shapes follow methods.md §1.3, §3.1, §4.1 and §5; names those of the published code. No value is zero.
The forward passes read the files' tensors directly, so that they know nothing of our layouts.
"""

import math

import numpy as np
import torch
from torch import Tensor

DECODER_WIDTH, DECODER_HEADS = 512, 16  # MaskDiT's, whatever the size
LATENTS, CLASSES = (4, 8, 8), 10
S2 = {"width": 64, "depth": 2, "heads": 4, "patch": 2}  # of the tiny grid
L2 = {"width": 96, "depth": 4, "heads": 4, "patch": 2}
S4 = S2 | {"patch": 4}


def code(width: int, side: int) -> Tensor:
    """The fixed positional code, (1, side·side, width)."""
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(side * side), side)
    parts = [f(np.outer(i, omega)) for i in (column, row) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


def relative_index(side: int) -> Tensor:
    """Row of the bias table for each pair of tokens."""
    row, column = np.divmod(np.arange(side * side), side)
    down, right = (np.subtract.outer(i, i) + side - 1 for i in (row, column))
    return torch.from_numpy(down * (2 * side - 1) + right)


class Shapes(dict[str, tuple[int, ...]]):
    """Names to shapes."""

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def block(self, name: str, width: int, condition: int, side: int = 0, heads: int = 0, skip: bool = False) -> None:
        self.linear(f"{name}.attn.qkv", width, 3 * width)
        self.linear(f"{name}.attn.proj", width, width)
        self.linear(f"{name}.mlp.fc1", width, 4 * width)
        self.linear(f"{name}.mlp.fc2", 4 * width, width)
        self.linear(f"{name}.adaLN_modulation.1", condition, 6 * width)
        if side:
            table = f"{name}.attn.rel_pos_bias.relative_position_bias_table"
            self[table] = ((2 * side - 1) ** 2 + 3, heads)
        if skip:
            self.linear(f"{name}.skip_linear", 2 * width, width)


def weights(
    project: str,
    *,
    width: int,
    depth: int,
    heads: int,
    patch: int,
    decoder: int = 1,
    mask_token: bool = True,
    out: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state_dict of 'dit', 'maskdit', 'mdt1' or 'mdt2'; `decoder` is its decoder's blocks."""
    channels, side = LATENTS[0], LATENTS[1] // patch
    s = Shapes()
    s["x_embedder.proj.weight"], s["x_embedder.proj.bias"] = (width, channels, patch, patch), (width,)
    s.linear("t_embedder.mlp.0", 256, width)
    s.linear("t_embedder.mlp.2", width, width)
    table = (width, CLASSES) if project == "maskdit" else (CLASSES + 1, width)
    s["y_embedder.embedding_table.weight"] = table
    last = width
    if project in ("dit", "maskdit"):
        for i in range(depth):
            s.block(f"blocks.{i}", width, width)
    if project == "maskdit":
        s.linear("decoder_layer.linear", width, DECODER_WIDTH)
        s.linear("decoder_layer.adaLN_modulation.1", width, 2 * width)
        for i in range(decoder):
            s.block(f"decoder_blocks.{i}", DECODER_WIDTH, width)
        last = DECODER_WIDTH
    if project == "mdt1":
        for i in range(depth):
            s.block(f"blocks.{i}", width, width, side, heads)
    if project == "mdt2":
        half = (depth - decoder) // 2
        stacks = [("en_inblocks", half, False), ("en_outblocks", half, True), ("de_blocks", decoder, True)]
        for name, count, skip in stacks:
            for i in range(count):
                s.block(f"{name}.{i}", width, width, side, heads, skip)
    if project.startswith("mdt"):
        s.block("sideblocks.0", width, width, side, heads)
        s["pos_embed"] = s["decoder_pos_embed"] = (1, side * side, width)
    if project.startswith("mdt") or (project == "maskdit" and mask_token):
        s["mask_token"] = (1, 1, last)
    s.linear("final_layer.linear", last, patch * patch * (out or (4 if project == "maskdit" else 8)))
    s.linear("final_layer.adaLN_modulation.1", width, 2 * last)

    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.07 for name, shape in s.items()}
    if project in ("dit", "maskdit"):
        state["pos_embed"] = code(width, side)
    if project == "maskdit":
        state["decoder_pos_embed"] = code(DECODER_WIDTH, side)
    for name in [n for n in state if n.endswith("bias_table")]:
        state[name.replace("bias_table", "index")] = relative_index(side)
    return state


def as_diffusers(dit: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The same weights under the names of DiTTransformer2DModel: attention in three, embedders in every block."""
    state = {f"pos_embed.proj.{x}": dit[f"x_embedder.proj.{x}"] for x in ("weight", "bias")}
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        state[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = dit["y_embedder.embedding_table.weight"]
        for x in ("weight", "bias"):
            for j, k in ((1, 0), (2, 2)):
                state[f"{theirs}.norm1.emb.timestep_embedder.linear_{j}.{x}"] = dit[f"t_embedder.mlp.{k}.{x}"]
            state[f"{theirs}.norm1.linear.{x}"] = dit[f"{ours}.adaLN_modulation.1.{x}"]
            for part, value in zip("qkv", dit[f"{ours}.attn.qkv.{x}"].chunk(3), strict=True):
                state[f"{theirs}.attn1.to_{part}.{x}"] = value
            state[f"{theirs}.attn1.to_out.0.{x}"] = dit[f"{ours}.attn.proj.{x}"]
            state[f"{theirs}.ff.net.0.proj.{x}"] = dit[f"{ours}.mlp.fc1.{x}"]
            state[f"{theirs}.ff.net.2.{x}"] = dit[f"{ours}.mlp.fc2.{x}"]
    for x in ("weight", "bias"):
        state[f"proj_out_1.{x}"] = dit[f"final_layer.adaLN_modulation.1.{x}"]
        state[f"proj_out_2.{x}"] = dit[f"final_layer.linear.{x}"]
    return {k: v.clone() for k, v in state.items()}


# ------------------------------------------------------------------------------------------------------ forward passes


class Mask:
    """Ids as the published code has them: keep (B, K), restore (B, N), removed (B, N)."""

    def __init__(self, batch: int, num_tokens: int, keep: int, seed: int = 0) -> None:
        shuffle = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
        self.keep, self.restore = shuffle[:, :keep], shuffle.argsort(1)
        self.removed = torch.ones(batch, num_tokens).scatter(1, self.keep, 0.0)

    def visible(self, x: Tensor) -> Tensor:
        return torch.stack([row[ids] for row, ids in zip(x, self.keep, strict=True)])

    def everywhere(self, x: Tensor, token: Tensor | float) -> Tensor:
        absent = torch.zeros(len(x), self.restore.shape[1] - x.shape[1], x.shape[2]) + token
        whole = torch.cat([x, absent], dim=1)
        return torch.stack([row[ids] for row, ids in zip(whole, self.restore, strict=True)])


class Reference:
    """The network of `project` on its own state_dict `s`; `decoder` is needed for 'mdt1' alone."""

    def __init__(self, project: str, s: dict[str, Tensor], heads: int, patch: int, decoder: int = 1) -> None:
        self.project, self.s, self.heads, self.patch, self.decoder = project, s, heads, patch, decoder

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, mask: Mask | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) as the time embedder takes it, y (B,) with CLASSES for none."""
        s = self.s
        x = torch.nn.functional.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=self.patch)
        x = x.flatten(2).transpose(1, 2) + s["pos_embed"]
        c = self.condition(t, y)
        tokens = getattr(self, f"_{self.project}")(x, c, mask)
        tokens = self.modulated("final_layer", tokens, c)
        b, n, _ = tokens.shape
        side, p = math.isqrt(n), self.patch
        return torch.einsum("nhwpqc->nchpwq", tokens.view(b, side, side, p, p, -1)).reshape(b, -1, side * p, side * p)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        h = silu(self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
        table = self.s["y_embedder.embedding_table.weight"]
        if self.project == "maskdit":
            one_hot = (y[:, None] == torch.arange(CLASSES)).float()  # all zero for the null class
            return self.linear("t_embedder.mlp.2", h) + one_hot @ table.T
        return self.linear("t_embedder.mlp.2", h) + table[y]

    def _dit(self, x: Tensor, c: Tensor, mask: Mask | None) -> Tensor:
        return self.stack("blocks", x, c)

    def _maskdit(self, x: Tensor, c: Tensor, mask: Mask | None) -> Tensor:
        x = self.stack("blocks", x if mask is None else mask.visible(x), c)
        x = self.modulated("decoder_layer", x, c)
        if mask:
            x = mask.everywhere(x, self.s.get("mask_token", 0.0))
        return self.stack("decoder_blocks", x + self.s["decoder_pos_embed"], c, heads=DECODER_HEADS)

    def _mdt1(self, x: Tensor, c: Tensor, mask: Mask | None) -> Tensor:
        encoder = self.count("blocks") - self.decoder
        x = x if mask is None else mask.visible(x)
        for i in range(encoder):
            x = self.block(f"blocks.{i}", x, c, ids=mask and mask.keep)
        x = self.interpolated(x, c, mask)
        for i in range(encoder, encoder + self.decoder):
            x = self.block(f"blocks.{i}", x, c)
        return x

    def _mdt2(self, x: Tensor, c: Tensor, mask: Mask | None) -> Tensor:
        embedded, ids = x, mask and mask.keep
        x, outputs = x if mask is None else mask.visible(x), []
        for i in range(self.count("en_inblocks")):
            x = self.block(f"en_inblocks.{i}", x, c, ids=ids)
            outputs.append(x)
        for i, skip in enumerate(reversed(outputs)):
            x = self.block(f"en_outblocks.{i}", x, c, ids=ids, skip=skip)
        x = self.interpolated(x, c, mask)
        for i in range(self.count("de_blocks")):
            x = self.block(f"de_blocks.{i}", x, c, skip=embedded)
        return x

    def interpolated(self, x: Tensor, c: Tensor, mask: Mask | None) -> Tensor:
        if mask is None:
            return x + self.s["decoder_pos_embed"]
        x = mask.everywhere(x, self.s["mask_token"]) + self.s["decoder_pos_embed"]
        m = mask.removed[:, :, None]
        return m * self.block("sideblocks.0", x, c) + (1 - m) * x

    def count(self, stack: str) -> int:
        return len({k.split(".")[1] for k in self.s if k.startswith(f"{stack}.")})

    def stack(self, name: str, x: Tensor, c: Tensor, heads: int | None = None) -> Tensor:
        for i in range(self.count(name)):
            x = self.block(f"{name}.{i}", x, c, heads)
        return x

    def block(
        self,
        name: str,
        x: Tensor,
        c: Tensor,
        heads: int | None = None,
        ids: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        if skip is not None:
            x = self.linear(f"{name}.skip_linear", torch.cat([x, skip], 2))
        s1, k1, g1, s2, k2, g2 = self.linear(f"{name}.adaLN_modulation.1", silu(c))[:, None].chunk(6, 2)
        x = x + g1 * self.attention(f"{name}.attn", norm(x) * (1 + k1) + s1, heads or self.heads, ids)
        h = self.linear(f"{name}.mlp.fc1", norm(x) * (1 + k2) + s2)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return x + g2 * self.linear(f"{name}.mlp.fc2", h)

    def attention(self, name: str, x: Tensor, heads: int, ids: Tensor | None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.linear(f"{name}.qkv", x).view(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / math.sqrt(d // heads)
        table = self.s.get(f"{name}.rel_pos_bias.relative_position_bias_table")
        if table is not None:
            bias = table[self.s[f"{name}.rel_pos_bias.relative_position_index"]].permute(2, 0, 1)
            scores = scores + (bias if ids is None else torch.stack([bias[:, i][:, :, i] for i in ids]))
        return self.linear(f"{name}.proj", (scores.softmax(3) @ v).transpose(1, 2).reshape(b, n, d))

    def modulated(self, name: str, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.linear(f"{name}.adaLN_modulation.1", silu(c))[:, None].chunk(2, 2)
        return self.linear(f"{name}.linear", norm(x) * (1 + scale) + shift)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
