"""The command ``sddit``: one experiment at a time, on this machine, without Ray. Sweeps have scripts of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sddit import presets
from sddit.config import flatten, parse_assignment
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
    """Print the resolved experiment and stop."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """section.field=value, repeatable."""

    def run(self) -> None:
        changes = dict(parse_assignment(text) for text in self.set)
        if self.steps:
            changes["train.steps"] = self.steps
        method = changes.pop("method.name", self.method)
        experiment = presets.preset(self.preset)(size=self.size, method=method).replace(changes)
        if self.dry_run:
            for field, value in flatten(experiment.model_dump(mode="json")).items():
                print(f"{field} = {json.dumps(value)}")
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
    """Score images against a reference set: FID, with the protocol it was made by."""

    samples: tyro.conf.Positional[str]
    """An .npz with arr_0 (uint8 N, H, W, C), a folder of images, or a checkpoint, sampled as its experiment says."""
    reference: str = "digits"
    """A data set: a built-in name or a prepared folder."""
    extractor: str | None = None
    """Feature network; default: the one that belongs to the reference."""

    def run(self) -> None:
        from sddit import api

        print(json.dumps(api.evaluate(api.read_images(self.samples), self.reference, self.extractor), indent=1))


def main() -> None:
    """The command's entry point; exits."""
    commands: dict[str, Any] = {"train": Train, "sample": Sample, "evaluate": Evaluate}
    command = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)

    def run() -> None:
        check_environment()
        command.run()

    run_script(run)
