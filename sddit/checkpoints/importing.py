"""`sddit import`: weights of other projects into a checkpoint that is sampled and evaluated like our own.

Everything is checked before anything is written, and nothing is overwritten.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sddit.checkpoints.implied import Implied, imply, listed
from sddit.checkpoints.names import Project, Source, sources, to_ours, to_theirs
from sddit.checkpoints.reading import Weights, read_weights
from sddit.errors import CheckpointError, UsageError
from sddit.models import build_network
from sddit.models.layers import RelativePositionBias, sincos_2d
from sddit.training.store import SAMPLING, CheckpointStore

# The published averages include the fixed positional codes, which 10,000 updates in float32 move by up to 1.7e-4
# (measured) and then no further. Codes of another kind differ by about 1.
CODE_TOLERANCE = 1e-3
LARGEST = 4096  # side of a latent; a configuration may ask for any positional code
INDEX = ".relative_position_index"  # a table that MDT stores although it follows from the grid
DIFFUSERS_CODE = "pos_embed.pos_embed"  # as some versions of diffusers stored it


def import_checkpoint(
    path: Path,
    project: Project,
    out: Path,
    *,
    decoder_layers: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Implied:
    """Writes the weights in `path` as the checkpoint folder `out`; returns what they imply.

    `settings` are fields of the section `eval`, by their dotted names: how the checkpoint is to be sampled.

    Raises:
        UsageError: `out` exists or cannot be made, the weights are another project's than was said, or a setting is
            none of the evaluation's.
        CheckpointError: the weights are damaged, or not exactly those of a network known here.
    """
    require_new(out)
    if other := [name for name in settings or {} if not name.startswith("eval.")]:
        raise UsageError(f"{listed(other)} cannot be set: weights tell their network. Set fields of eval alone.")
    weights = read_weights(path, project)
    implied = imply(weights, project, decoder_layers)
    implied = replace(implied, experiment=implied.experiment.replace(settings or {}))
    tensors = convert(weights, project, implied)
    values = {
        "experiment": implied.experiment.model_dump(mode="json"),
        "shape": list(implied.shape),
        "num_classes": implied.num_classes,
        "imported": {"from": project, "file": str(path), "weights": weights.group},
    }
    with new_folder(out) as folder:
        written = CheckpointStore(folder).save(0, {SAMPLING: tensors}, values)
        for file in Path(written).iterdir():
            file.rename(folder / file.name)
        Path(written).rmdir()
    return implied


def convert(weights: Weights, project: Project, implied: Implied) -> dict[str, Tensor]:
    """The state_dict of our network, float32.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or not finite, or a fixed table differs.
    """
    experiment, shape = implied.experiment, implied.shape
    if not all(0 < n <= LARGEST for n in shape):
        raise CheckpointError(f"{weights.path} is for images of {shape}, but a side must be in 1 … {LARGEST}.")
    with torch.device("meta"):
        ours = build_network(experiment, shape, implied.num_classes).state_dict()
    where = sources(project, ours, experiment)
    _require_names(weights, where)
    _require_shapes(weights, where, ours, experiment.model.patch)
    rows, columns = (side // experiment.model.patch for side in shape[1:])
    _require_index(weights, (rows, columns))
    tensors = {}
    for name, like in ours.items():
        code = None
        if name in ("pos_embed", "decoder_pos_embed"):
            code = sincos_2d(like.shape[1], rows, columns)
        if name not in where:
            assert code is not None
            _require_code(weights, DIFFUSERS_CODE, code)
            tensors[name] = code
            continue
        tensors[name] = _take(weights, where[name], like.shape)
        if code is not None and project != "sddit" and experiment.method.name != "mdt":  # there it is trained
            _require_code(weights, where[name].names[0], code)
    return tensors


def require_new(out: Path) -> None:
    """That `out` does not exist and can be made.

    Raises:
        UsageError: with the reason.
    """
    if re.match(r"\w+:/", str(out)):  # Path has made one slash of two
        raise UsageError(f"--out {out} is not a local folder. Write to one, and copy it with your storage's own tools.")
    if out.exists() or out.is_symlink():
        raise UsageError(f"--out {out} exists, and nothing is overwritten. Give another folder, or remove this one.")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"--out {out} cannot be made: {above} is no folder that this user may write to.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only once it is complete."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}-"))
        try:
            yield part
            _open_to_others(part)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write {out}: {error.strerror or error}.") from error


def _open_to_others(folder: Path) -> None:
    """The user's usual permissions: mkdtemp and safetensors make what its owner alone can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _require_names(weights: Weights, where: Mapping[str, Source]) -> None:
    wanted = [name for source in where.values() for name in source.names]
    missing = [name for name in wanted if name not in weights.tensors]
    known = {*wanted, DIFFUSERS_CODE}
    unknown = [name for name in weights.tensors if name not in known and not name.endswith(INDEX)]
    if missing or unknown:
        parts = [f"Missing: {listed(missing)}."] if missing else []
        parts += [f"Unknown: {listed(unknown)}."] if unknown else []
        raise CheckpointError(
            f"{weights.path} does not hold exactly the tensors of this network. {' '.join(parts)} "
            "Such weights are of another variant, which cannot be imported."
        )


def _require_shapes(weights: Weights, where: Mapping[str, Source], ours: Mapping[str, Tensor], patch: int) -> None:
    wrong = []
    for name, source in where.items():
        for theirs, like in to_theirs(ours[name], source, patch).items():
            if (given := tuple(weights.tensors[theirs].shape)) != (expected := tuple(like.shape)):
                wrong.append(f"{theirs} is {given}, not {expected}")
    if wrong:
        raise CheckpointError(f"{weights.path} holds tensors of another size than its others imply: {listed(wrong)}.")


def _take(weights: Weights, source: Source, shape: torch.Size) -> Tensor:
    """One of our tensors, float32, in memory of its own."""
    first, *others = (weights.tensors[name] for name in source.names)
    if source.stacked:
        tensor = torch.cat([first, *others])
    else:
        tensor = first
        for name, other in zip(source.names[1:], others, strict=True):
            if not torch.equal(first, other):
                raise CheckpointError(
                    f"{name} in {weights.path} differs from {source.names[0]}. DiT embeds time and class once for all "
                    "blocks, so weights trained with embedders of their own cannot be imported."
                )
    floating = tensor.is_floating_point()
    tensor = tensor.to(torch.float32, copy=True)
    if not floating or not torch.isfinite(tensor).all():
        raise CheckpointError(f"{source.names[0]} in {weights.path} is not made of finite floating-point numbers.")
    return to_ours(tensor, source.layout, shape).contiguous()


def _require_code(weights: Weights, name: str, code: Tensor) -> None:
    """That the fixed positional code, where the file has it, is ours."""
    given = weights.tensors.get(name)
    if given is None:
        return
    expected = code.to(given.dtype).float()
    distance = float("inf") if given.numel() != code.numel() else (given.float().view_as(code) - expected).abs().max()
    if not distance <= CODE_TOLERANCE:  # also if it is not a number
        raise CheckpointError(
            f"{name} in {weights.path} is up to {distance:.2g} from the fixed code of sines and cosines that DiT and "
            "MaskDiT have. Weights with another positional code cannot be imported."
        )


def _require_index(weights: Weights, grid: tuple[int, int]) -> None:
    expected = RelativePositionBias(grid, 1).offsets
    for name, given in weights.tensors.items():
        if name.endswith(INDEX) and (given.shape != expected.shape or bool((given != expected).any())):
            raise CheckpointError(
                f"{name} in {weights.path} numbers the offsets between tokens in another way than MDT."
            )
