"""The experiment that weights imply: its size, its shape and its method's switches, from the tensors alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sddit import presets
from sddit.checkpoints.names import PROJECTS, Project, recognise
from sddit.checkpoints.reading import Weights
from sddit.config import SIZE_GRIDS, Experiment
from sddit.errors import CheckpointError, UsageError

PATCHES = (1, 2, 4, 8)
MASKDIT_DECODER = (512, 16)  # width and heads, fixed in its code; heads cannot be read off weights
SHOWN = 8

# What tells the sizes, with its number of dimensions.
_TELLING: dict[Project, dict[str, int]] = {
    "dit": {"x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "pos_embed": 3,
            "final_layer.linear.weight": 2},
    "diffusers": {"pos_embed.proj.weight": 4, "proj_out_2.weight": 2,
                  "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": 2},
}  # fmt: skip
_TELLING["mdt"] = _TELLING["dit"] | {"sideblocks.0.attn.rel_pos_bias.relative_position_bias_table": 2}
_TELLING["maskdit"] = _TELLING["dit"] | {"decoder_pos_embed": 3}


@dataclass(frozen=True)
class Implied:
    experiment: Experiment
    shape: tuple[int, int, int]  # (C, H, W)
    num_classes: int


def imply(weights: Weights, project: Project, decoder_layers: int | None = None) -> Implied:
    """What the weights of `project` say; `decoder_layers` is what those of MDT version 1 do not (2, as published).

    Raises:
        UsageError: the weights are another project's, or `decoder_layers` contradicts them.
        CheckpointError: they are of no size known here.
    """
    _require_project(weights, project)
    if decoder_layers is not None and (project != "mdt" or _count(weights.tensors, "de_blocks")):
        raise UsageError("--decoder-layers is for MDT version 1 alone: all other weights tell it themselves.")
    if project == "sddit":
        return _as_exported(weights)
    sizes = _read_sizes(weights, project)
    if project == "diffusers":
        changes = _diffusers_changes(weights, sizes)
        return _build(weights, "dit", sizes, [_count(weights.tensors, "transformer_blocks")], changes, outputs=2)
    if project == "maskdit":
        changes = _maskdit_changes(weights)
        return _build(weights, "maskdit", sizes, [_count(weights.tensors, "blocks")], changes, outputs=1)
    if project == "mdt":
        depths, changes = _mdt_changes(weights.tensors, decoder_layers)
        heads = weights.tensors["sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"].shape[1]
        return _build(weights, "mdt", sizes, depths, changes, outputs=2, heads=heads)
    return _build(weights, "dit", sizes, [_count(weights.tensors, "blocks")], {}, outputs=2)


def listed(names: Iterable[str]) -> str:
    """Names in their order, the first few of many.

    >>> listed("abcdefghij")
    'a, b, c, d, e, f, g, h and 2 more'
    """
    names = list(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


@dataclass(frozen=True)
class _Sizes:
    width: int
    patch: int
    channels: int
    side: int  # of the latents
    num_classes: int
    outputs: int  # channels that come out


def _require_project(weights: Weights, project: Project) -> None:
    found = recognise(weights.tensors)
    if found is None:
        raise CheckpointError(
            f"{weights.path} holds no weights that are known here: it has {listed(weights.tensors) or 'no tensors'}. "
            f"Known: {', '.join(PROJECTS.values())}."
        )
    if found != project:
        hint = f"Use --from {found}." if found != "sddit" else "Give its folder with --from sddit."
        raise UsageError(f"{weights.path} holds weights of {PROJECTS[found]}, not of {PROJECTS[project]}. {hint}")


def _read_sizes(weights: Weights, project: Project) -> _Sizes:
    tensors, telling = weights.tensors, _TELLING[project]
    if missing := [name for name in telling if name not in tensors]:
        raise CheckpointError(f"{weights.path} lacks {listed(missing)}, so its sizes are not known.")
    for name, dimensions in telling.items():
        if tensors[name].ndim != dimensions:
            raise CheckpointError(
                f"{name} in {weights.path} is {tuple(tensors[name].shape)}, but must have {dimensions} dimensions."
            )
    diffusers = project == "diffusers"
    convolution = tensors["pos_embed.proj.weight" if diffusers else "x_embedder.proj.weight"]
    width, channels, patch, columns = convolution.shape
    if patch != columns or patch not in PATCHES:
        raise CheckpointError(f"{weights.path} is for patches of {patch}×{columns}, but known are {PATCHES} a side.")
    if diffusers:
        side = _integer(weights, "sample_size")
        classes = tensors["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"].shape[0] - 1
    else:
        num_tokens = tensors["pos_embed"].shape[1]
        side = math.isqrt(num_tokens) * patch
        if (side // patch) ** 2 != num_tokens:
            raise CheckpointError(f"pos_embed in {weights.path} has {num_tokens} positions, which are no square grid.")
        table = tensors["y_embedder.embedding_table.weight"]
        classes = table.shape[1] if project == "maskdit" else table.shape[0] - 1  # a row for the null class
    outputs = tensors["proj_out_2.weight" if diffusers else "final_layer.linear.weight"].shape[0] / patch**2
    if classes < 1 or outputs != int(outputs):
        raise CheckpointError(f"{weights.path} has {classes} classes and {outputs:g} channels of output.")
    return _Sizes(width, patch, channels, side, classes, int(outputs))


def _build(
    weights: Weights,
    method: str,
    sizes: _Sizes,
    depths: list[int],
    changes: Mapping[str, Any],
    *,
    outputs: int,
    heads: int | None = None,
) -> Implied:
    """`depths` are those that the number of blocks allows, the likelier first; `heads`, where known, must agree."""
    if sizes.outputs != outputs * sizes.channels:
        expected = "noise and variance of each" if outputs == 2 else "one for each"
        raise CheckpointError(
            f"{weights.path} puts out {sizes.outputs} channels for {sizes.channels}, but {method} is imported with "
            f"{outputs * sizes.channels}: {expected}, as published."
        )
    grid, letter, known = _size(weights, depths, sizes.width)
    if heads is not None and heads != known:
        raise CheckpointError(f"{weights.path} has {heads} attention heads, but size {letter} has {known}.")
    shape = (sizes.channels, sizes.side, sizes.side)
    experiment = presets.imagenet256(f"{letter}/{sizes.patch}", method).replace(
        {"model.grid": grid, "data.shape": shape, "data.num_classes": sizes.num_classes, **changes}
    )
    return Implied(experiment, shape, sizes.num_classes)


def _size(weights: Weights, depths: list[int], width: int) -> tuple[str, str, int]:
    """(grid, letter, heads) of a network of one of these depths."""
    for depth in depths:
        for grid, rows in SIZE_GRIDS.items():
            for letter, (d, w, heads) in rows.items():
                if (d, w) == (depth, width):
                    return grid, letter, heads
    known = "; ".join(
        f"{grid}: " + ", ".join(f"{letter} {d}×{w}" for letter, (d, w, _) in rows.items())
        for grid, rows in SIZE_GRIDS.items()
    )
    raise CheckpointError(
        f"{weights.path} has {depths[0]} blocks of width {width}, which is no known size. Known, as blocks×width: "
        f"{known}."
    )


def _count(names: Iterable[str], stack: str) -> int:
    """Blocks of a stack, by the largest index; names of missing ones are told later."""
    indices = [name.split(".")[1] for name in names if name.startswith(f"{stack}.")]
    return 1 + max((int(i) for i in indices if i.isdecimal()), default=-1)


def _maskdit_changes(weights: Weights) -> dict[str, Any]:
    tensors, (width, heads) = weights.tensors, MASKDIT_DECODER
    if tensors["decoder_pos_embed"].shape[2] != width:
        raise CheckpointError(
            f"The decoder in {weights.path} is {tensors['decoder_pos_embed'].shape[2]} wide, but MaskDiT's is {width}, "
            f"with {heads} heads, whatever the size."
        )
    changes: dict[str, Any] = {
        "model.decoder_depth": max(1, _count(tensors, "decoder_blocks")),
        "model.decoder_width": width,
        "model.decoder_heads": heads,
    }
    if "mask_token" not in tensors:  # it has one only where it reconstructs
        changes["method.lambda_mae"] = 0.0
    return changes


def _mdt_changes(tensors: Mapping[str, Tensor], decoder_layers: int | None) -> tuple[list[int], dict[str, Any]]:
    """Possible depths, and the fields that make the version."""
    decoder = _count(tensors, "de_blocks")
    if not decoder:
        return [_count(tensors, "blocks")], {"method.decoder_layers": decoder_layers or 2}
    total = _count(tensors, "en_inblocks") + _count(tensors, "en_outblocks") + decoder
    changes = {
        "method.version": "v2",
        "method.decoder_layers": decoder,
        "method.mask_ratio_max": 0.5,
        "diffusion.min_snr_gamma": 5.0,
        "train.optimizer": "adan",
        "train.grad_clip": 1.0,
    }
    return [total, total + 1], changes  # an odd encoder has lost a block


def _diffusers_changes(weights: Weights, sizes: _Sizes) -> dict[str, Any]:
    config = weights.config
    fixed = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"{weights.path} has {name} {config[name]!r}, but DiT has {value!r}.")
    depth = _count(weights.tensors, "transformer_blocks")
    _, letter, heads = _size(weights, [depth], sizes.width)
    if (given := _integer(weights, "num_attention_heads")) != heads:
        raise CheckpointError(f"{weights.path} has {given} attention heads, but size {letter} has {heads}.")
    scheduler = weights.scheduler
    if not scheduler:
        return {}
    schedule, trained = scheduler.get("beta_schedule", "linear"), scheduler.get("trained_betas")
    prediction = scheduler.get("prediction_type", "epsilon")
    if (schedule, prediction, trained) != ("linear", "epsilon", None):
        raise CheckpointError(
            f"{weights.path} was trained to predict {prediction!r} on a {'given' if trained else schedule} schedule of "
            "noise, but known is 'epsilon' on a linear one."
        )
    fields = {"num_train_timesteps": "timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
    return {f"diffusion.{ours}": scheduler[name] for name, ours in fields.items() if name in scheduler}


def _integer(weights: Weights, name: str) -> int:
    value = weights.config.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json of {weights.path} has {name} {value!r}, but must have a positive integer.")
    return value


def _as_exported(weights: Weights) -> Implied:
    try:
        c, h, w = (int(n) for n in weights.config["shape"])
        return Implied(Experiment.parse(weights.config["experiment"]), (c, h, w), int(weights.config["num_classes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json in {weights.path} is not what `sddit export` writes: {error}.") from None
