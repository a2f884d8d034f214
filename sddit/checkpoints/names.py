"""What other projects call our tensors, and how they lay them out.

Read off the published code: DiT (facebookresearch/DiT), MaskDiT (Anima-Lab/MaskDiT), MDT (sail-sg/MDT, branches mdtv1
and main) and diffusers' DiTTransformer2DModel. `PROJECTS` are the forms that can be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sddit.config import MDT, Experiment

Project = Literal["dit", "maskdit", "mdt", "diffusers", "sddit"]
PROJECTS: dict[Project, str] = {
    "dit": "DiT",
    "maskdit": "MaskDiT",
    "mdt": "MDT",
    "diffusers": "diffusers' DiTTransformer2DModel",
    "sddit": "this project",
}
Layout = Literal["as ours", "convolution", "leading ones", "columns"]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors stands in another project's file."""

    names: tuple[str, ...]  # several: equal copies, or with `stacked` its rows from top to bottom
    stacked: bool = False
    layout: Layout = "as ours"


# Regular expressions, tried in turn on our names; all that match apply.
_DIT = (
    (r"^patch_embed\.", "x_embedder.proj."),
    (r"^time_embed\.hidden\.", "t_embedder.mlp.0."),
    (r"^time_embed\.out\.", "t_embedder.mlp.2."),
    (r"^class_embed\.table$", "y_embedder.embedding_table.weight"),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.position\.table$", ".attn.rel_pos_bias.relative_position_bias_table"),
    (r"\.mlp\.hidden\.", ".mlp.fc1."),
    (r"\.mlp\.out\.", ".mlp.fc2."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.skip\.", ".skip_linear."),
    (r"^final\.", "final_layer."),
    (r"^bridge\.", "decoder_layer."),
    (r"^side_block\.", "sideblocks.0."),
)
_DIFFUSERS = (
    (r"^patch_embed\.", "pos_embed.proj."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.attention\.out\.", ".attn1.to_out.0."),
    (r"\.mlp\.hidden\.", ".ff.net.0.proj."),
    (r"\.mlp\.out\.", ".ff.net.2."),
    (r"^final\.modulation\.", "proj_out_1."),
    (r"^final\.linear\.", "proj_out_2."),
    (r"\.modulation\.", ".norm1.linear."),
)
# In diffusers every block holds the embedders anew, and uses its own.
_EMBEDDERS = (
    (r"^time_embed\.hidden\.", "timestep_embedder.linear_1."),
    (r"^time_embed\.out\.", "timestep_embedder.linear_2."),
    (r"^class_embed\.table$", "class_embedder.embedding_table.weight"),
)


def sources(project: Project, names: Iterable[str], experiment: Experiment) -> dict[str, Source]:
    """Where `project` keeps the tensors `names` of the experiment's network; what it does not keep is left out."""
    find = _in_diffusers if project == "diffusers" else _in_dit
    found = {name: Source((name,)) if project == "sddit" else find(name, experiment) for name in names}
    return {name: source for name, source in found.items() if source is not None}


def _in_dit(name: str, experiment: Experiment) -> Source:
    """In the form that DiT began, and MaskDiT and MDT follow."""
    theirs = _renamed(name, _DIT)
    method = experiment.method
    if isinstance(method, MDT):
        theirs = _mdt_block(theirs, method, experiment.model.dims[0])
    layout: Layout = "as ours"
    if name == "patch_embed.weight":
        layout = "convolution"
    elif name in ("pos_embed", "decoder_pos_embed", "mask_token"):
        layout = "leading ones"
    elif name == "class_embed.table" and method.name == "maskdit":
        layout = "columns"
    return Source((theirs,), layout=layout)


def _mdt_block(name: str, method: MDT, depth: int) -> str:
    """Our blocks and decoder_blocks: one list in version 1; in version 2 the halves of the encoder, and the decoder."""
    match = re.match(r"(decoder_)?blocks\.(\d+)\.(.*)", name)
    if not match:
        return name
    decoder, index, rest = match[1], int(match[2]), match[3]
    encoder = depth - method.decoder_layers
    if method.version == "v1":
        return f"blocks.{index + encoder if decoder else index}.{rest}"
    if decoder:
        return f"de_blocks.{index}.{rest}"
    half = encoder // 2
    return f"en_inblocks.{index}.{rest}" if index < half else f"en_outblocks.{index - half}.{rest}"


def _in_diffusers(name: str, experiment: Experiment) -> Source | None:
    if name == "pos_embed":
        return None  # made anew from the configuration
    embedder = _renamed(name, _EMBEDDERS)
    if embedder != name:
        return Source(tuple(f"transformer_blocks.{i}.norm1.emb.{embedder}" for i in range(experiment.model.dims[0])))
    if match := re.fullmatch(r"blocks\.(\d+)\.attention\.qkv\.(weight|bias)", name):
        return Source(tuple(f"transformer_blocks.{match[1]}.attn1.to_{x}.{match[2]}" for x in "qkv"), stacked=True)
    return Source((_renamed(name, _DIFFUSERS),), layout="convolution" if name == "patch_embed.weight" else "as ours")


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def to_theirs(tensor: Tensor, source: Source, patch: int) -> dict[str, Tensor]:
    """One of our tensors by their names, in their layout; views. Also of the device 'meta', for the shapes."""
    if source.layout == "convolution":  # (D, p·p·C), by (row, column, channel) → (D, C, p, p)
        tensor = tensor.view(len(tensor), patch, patch, -1).permute(0, 3, 1, 2)
    elif source.layout == "leading ones":  # (N, D) or (D,) → (1, N, D) or (1, 1, D)
        tensor = tensor.view(*(1,) * (3 - tensor.ndim), *tensor.shape)
    elif source.layout == "columns":
        tensor = tensor.T
    count = len(source.names)
    return dict(zip(source.names, tensor.chunk(count) if source.stacked else [tensor] * count, strict=True))


def to_ours(tensor: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """One of their tensors, stacked where ours is, in our layout; `shape` is ours."""
    if layout == "convolution":
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.T if layout == "columns" else tensor.reshape(shape)


def recognise(names: Collection[str]) -> Project | None:
    """Whose names these are, by what only that project has."""
    if any(name.startswith("transformer_blocks.") for name in names):
        return "diffusers"
    if any(".rel_pos_bias." in name for name in names):
        return "mdt"
    if "x_embedder.proj.weight" in names:
        decoder = ("decoder_layer.", "decoder_blocks.")
        return "maskdit" if any(name.startswith(decoder) for name in names) else "dit"
    return "sddit" if "patch_embed.weight" in names else None
