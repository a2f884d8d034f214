"""The command ``sddit``: one experiment at a time, on this machine, without Ray. Sweeps have scripts of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sddit import presets
from sddit.config import parse_assignment
from sddit.environment import check_environment
from sddit.errors import UsageError, run_script


@dataclass(frozen=True)
class Train:
    """Train one experiment, or go on with it, and record it in MLflow. The same command again resumes."""

    preset: str = "digits"
    """Base experiment: digits, cifar10, imagenet256."""
    method: str = "sddit"
    size: str = "S/2"
    steps: int | None = None
    """Optimiser steps; more than before extends the run."""
    name: str = "train"
    """The MLflow experiment it is recorded under."""
    tracking_uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    storage: str = "runs"
    """Folder or URI for checkpoints."""
    dry_run: bool = False
    """Print every field with its value and source, parameters, FLOPs and memory, and stop."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """section.field=value, repeatable."""

    def run(self) -> None:
        changes = dict(parse_assignment(text) for text in self.set)
        if self.steps:
            changes["train.steps"] = self.steps
        method = changes.pop("method.name", self.method)
        experiment = presets.preset(self.preset)(size=self.size, method=method).replace(changes)
        if self.dry_run:
            from sddit.api import data_shape
            from sddit.describe import describe

            print(describe(self.preset, self.size, method, changes, *data_shape(experiment)))
            return
        from sddit.api import train

        result = train(experiment, name=self.name, tracking_uri=self.tracking_uri, storage=self.storage)
        scores = ", ".join(f"{key} {value:.4f}" for key, value in result.metrics.items())
        print(f"Step {result.step}: {scores}\nCheckpoint: {result.checkpoint}\nMLflow run: {result.run_id}")


@dataclass(frozen=True)
class Sample:
    """Make images with a checkpoint: an .npz with arr_0, uint8 (N, H, W, C), as the ADM suite reads it."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or URI, e.g. runs/train/<identity>/step-00000600."""
    out: Path
    """The .npz to write, or a .png for a grid."""
    count: int = 100
    """Images; their classes run through 0, 1, 2, …"""
    seed: int = 0

    def run(self) -> None:
        if self.out.suffix not in (".npz", ".png"):
            raise UsageError(f"--out {self.out} must end in .npz (images) or .png (a grid).")
        if self.count < 1:
            raise UsageError(f"--count is {self.count}, but must be at least 1.")
        import numpy as np

        from sddit import api
        from sddit.training.store import read_checkpoint

        num_classes = int(read_checkpoint(self.checkpoint).values["num_classes"])
        images = api.sample(self.checkpoint, [i % num_classes for i in range(self.count)], seed=self.seed)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.out.suffix == ".npz":
            np.savez_compressed(self.out, arr_0=images)
        else:
            from PIL import Image

            from sddit.training.evaluation import make_grid

            grid = make_grid(images)
            Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(self.out)
        print(self.out)


@dataclass(frozen=True)
class Evaluate:
    """Score images against a reference set, with the protocol it was done by. Prints JSON."""

    samples: tyro.conf.Positional[str]
    """An .npz with arr_0 (uint8 N, H, W, C), a folder of images, or a checkpoint, sampled as its experiment says."""
    reference: str = "digits"
    """A data set (a built-in name or a prepared folder), a folder of images, an .npz with arr_0 or with the statistics
    of the ADM suite, or what `sddit reference` built."""
    extractor: str | None = None
    """Feature network; default: the one that belongs to the reference."""
    metrics: str | None = None
    """Of fid,sfid,is,precision,recall,kid; default: fid, or nothing with --final."""
    final: str | None = None
    """Of probe,copying,denoising,seeds: the diagnostics of a checkpoint, on the data it was trained on."""
    test_path: str | None = None
    """Held-out images for --final, a prepared folder; default: what the checkpoint's experiment held out."""

    def run(self) -> None:
        from sddit import api

        if self.final and not api.is_checkpoint(self.samples):
            raise UsageError(f"--final needs a checkpoint, but {self.samples} holds images. Leave --final out.")
        found: dict[str, Any] = {}
        if self.metrics or not self.final:
            found = api.evaluate(self.samples, self.reference, self.extractor, _names(self.metrics or "fid"))
        if self.final:
            found["final"] = api.diagnose(self.samples, _names(self.final), self.test_path)
        print(json.dumps(found, indent=1))


@dataclass(frozen=True)
class Reference:
    """Build what samples are scored against, once, and keep it in the cache. Prints JSON: digest, images, path, …"""

    source: tyro.conf.Positional[str]
    """A data set (a built-in name or a prepared folder), a folder of images, or an .npz with arr_0."""
    extractor: str | None = None
    """Feature network; default: the one that belongs to the data."""
    metrics: str | None = None
    """What it shall serve, of fid,sfid,precision,recall,kid; default: all that the extractor gives."""

    def run(self) -> None:
        from sddit import api

        metrics = _names(self.metrics) if self.metrics else None
        print(json.dumps(api.build_reference(self.source, self.extractor, metrics), indent=1))


def _names(text: str) -> list[str]:
    """The words of a comma-separated list."""
    return [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class Import:
    """Make a checkpoint of another project's weights. What does not fit exactly is refused by name."""

    file: tyro.conf.Positional[Path]
    """A .pt or .safetensors file; of diffusers a pipeline or transformer folder; of sddit what `export` wrote."""
    source: Annotated[Literal["dit", "maskdit", "mdt", "diffusers", "sddit"], tyro.conf.arg(name="from")]
    """Whose weights they are; both versions of MDT are told apart."""
    out: Path
    """The checkpoint folder to make, e.g. runs/imported/dit-xl-2."""
    decoder_layers: int | None = None
    """Of MDT version 1, which alone does not tell it; default: 2, as published."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """eval.field=value, repeatable: how it is to be sampled, e.g. eval.guidance=1.5"""

    def run(self) -> None:
        from sddit import api
        from sddit.training.store import read_checkpoint

        settings = dict(parse_assignment(text) for text in self.set)
        experiment = api.import_weights(
            self.file, self.source, self.out, decoder_layers=self.decoder_layers, settings=settings
        )
        values = read_checkpoint(self.out).values
        size = f"{experiment.method.name} {experiment.model.size}, {values['num_classes']} classes"
        print(f"{size}, {'×'.join(map(str, values['shape']))}\n{self.out}")
        if self.source == "diffusers":
            print("DiT spaces its time frequencies by 1/128, diffusers by 1/127: right for weights converted from DiT.")


@dataclass(frozen=True)
class Export:
    """Write a checkpoint's sampling weights in a form that others read."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or URI, e.g. runs/train/<identity>/step-00000600."""
    out: Path
    """The folder to make."""
    format: Literal["diffusers", "safetensors"] | None = None
    """Default: diffusers for a DiT on latents of four channels, else safetensors with a config.json."""
    vae: str | None = None
    """The pipeline's VAE: the folder of an AutoencoderKL, or its name on Hugging Face's hub."""

    def run(self) -> None:
        from sddit import api

        form = api.export_weights(self.checkpoint, self.out, form=self.format, vae=self.vae)
        print(f"{self.out} ({form})")
        if form == "diffusers":
            vae = "" if self.vae else " It has no VAE: pass vae=AutoencoderKL.from_pretrained(...), or use --vae."
            print(f"Load it with diffusers.DiTPipeline.from_pretrained; its README.md says what to set first.{vae}")


@dataclass(frozen=True)
class Compare:
    """Compare settings of recorded sweeps with the first named, paired by seed, and say what that allows to say.

    A setting is axis=value[,axis=value], e.g. mask_ratio=0.2 or system=SD-DiT,lr=x1, or the identity of a cell (four
    digits or more), which stands for its setting over all seeds; with SWEEP: before it, of that sweep.
    """

    settings: tyro.conf.Positional[tuple[str, ...]]
    """The baseline, then what is compared with it."""
    sweep: str | None = None
    """The sweep of the settings that name none."""
    tracking_uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    metric: str = "eval/fid"
    """As named in MLflow."""
    step: int | None = None
    """Where to compare; default: the last step, which must be the same for all."""

    def run(self) -> None:
        from sddit.comparison import compare
        from sddit.comparison.report import report

        print(report(compare(self.settings, self.sweep, self.tracking_uri, metric=self.metric, step=self.step)))


@dataclass(frozen=True)
class Status:
    """Show a sweep as its record has it, from any shell or machine: cells, who drives it, what it has cost."""

    name: tyro.conf.Positional[str]
    """The sweep, e.g. mask_ratio."""
    tracking_uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""

    def run(self) -> None:
        from sddit.orchestration.status import show

        show(self.name, self.tracking_uri)


def main() -> None:
    """The command's entry point; exits."""
    commands: dict[str, Any] = {"train": Train, "sample": Sample, "evaluate": Evaluate, "reference": Reference}
    commands |= {"import": Import, "export": Export, "compare": Compare, "status": Status}
    command = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)

    def run() -> None:
        check_environment()
        command.run()

    run_script(run)
