"""Weight files of other projects: tensors by name and plain configuration, and never a line of their code."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sddit.checkpoints.names import Project
from sddit.errors import CheckpointError

AVERAGES = ("ema", "model", "state_dict")  # where training scripts put weights, the preferred first
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, MaskDiT's preconditioner
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Weights:
    """Tensors by their names in the file, on the CPU and perhaps still on disk (memory-mapped)."""

    path: Path
    tensors: dict[str, Tensor]
    group: str | None = None  # 'ema', 'model', …, where the file has several
    config: dict[str, Any] = field(default_factory=dict)  # of a folder: its config.json
    scheduler: dict[str, Any] = field(default_factory=dict)  # of a diffusers pipeline


def read_weights(path: Path, project: Project) -> Weights:
    """A .pt or .safetensors file; of 'diffusers' and 'sddit' the folder that one holds with its config.json.

    Raises:
        CheckpointError: it is not there, damaged, more than tensors and plain values, or not of that form.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give the file or folder that holds the weights.")
    if project == "diffusers":
        return _read_diffusers(path)
    if project == "sddit":
        folder = _require_folder(path, "what `sddit export --format safetensors` wrote")
        return Weights(folder, read_tensors(folder / "model.safetensors"), config=_read_json(folder / "config.json"))
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder. Give the .pt or .safetensors file, or use --from diffusers.")
    content: Mapping[str, Any] = read_tensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    group = next((k for k in AVERAGES if isinstance(content.get(k), Mapping)), None)
    return Weights(path, _only_tensors(path, content[group] if group else content), group)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist, so {path.parent} is not complete.") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}. Get it again.") from None


def _read_diffusers(path: Path) -> Weights:
    folder = _require_folder(path, "a pipeline's folder or its transformer's")
    pipeline = folder if (folder / "transformer").is_dir() else None
    folder = folder / "transformer" if pipeline else folder
    config = _read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):  # the latter as of older versions
        raise CheckpointError(f"{folder} holds a {kind}, not a DiTTransformer2DModel, and cannot be imported.")
    if (folder / f"{DIFFUSERS_WEIGHTS}.safetensors").exists():
        tensors = read_tensors(folder / f"{DIFFUSERS_WEIGHTS}.safetensors")
    elif (legacy := folder / f"{DIFFUSERS_WEIGHTS}.bin").exists():
        tensors = _only_tensors(legacy, _unpickle(legacy))
    else:
        raise CheckpointError(
            f"{folder} has neither {DIFFUSERS_WEIGHTS}.safetensors nor {DIFFUSERS_WEIGHTS}.bin. Weights in several "
            "files or of another variant must be saved again: "
            "DiTTransformer2DModel.from_pretrained(...).save_pretrained(FOLDER, max_shard_size='100GB')."
        )
    scheduler = pipeline / "scheduler" / "scheduler_config.json" if pipeline else None
    return Weights(path, tensors, config=config, scheduler=_read_json(scheduler) if scheduler else {})


def _require_folder(path: Path, what: str) -> Path:
    if path.is_dir():
        return path
    raise CheckpointError(f"{path} is a file. Give the folder it is in: {what}, with its config.json.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist, so {path.parent} is not complete.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no table of names and values.")
    return content


def _unpickle(path: Path) -> Mapping[str, Any]:
    """What torch.save wrote, as far as it is tensors and plain values: torch's own reader runs nothing else."""
    try:
        # The training scripts of DiT and MaskDiT add their command line, which is a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} is more than weights: reading it would run {found[1]}. Nothing was run. "
                "Get the weights as .safetensors, or save their state_dict alone."
            ) from None
        raise _damaged(path) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception:  # what torch raises for a damaged file depends on where the damage is
        raise _damaged(path) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name.")
    return content


def _damaged(path: Path) -> CheckpointError:
    """Without torch's own words, which advise to unpickle the file after all."""
    return CheckpointError(f"{path} is damaged or nothing that torch.save wrote. Get it again.")


def _only_tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without the prefix that wrappers of a network give all names."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"{path} holds no weights alone: {name!r} is a {type(value).__name__}, not a dense tensor."
            )
    tensors = dict(content)
    while prefix := next((p for p in WRAPPERS if tensors and all(k.startswith(p) for k in tensors)), None):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors
