"""The command ``sddit``: one experiment, data, weights, checks. Sweeps have scripts of their own."""

from __future__ import annotations

import json
import os
import sys
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
    """Base experiment: digits, cifar10, cifar10-latents, imagenet256."""
    method: str = "sddit"
    size: str = "S/2"
    steps: int | None = None
    """Optimiser steps; more than before extends the run."""
    name: str = "train"
    """The MLflow experiment it is recorded under."""
    tracking_uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    storage: str = os.environ.get("SDDIT_STORAGE") or "runs"
    """Folder or URI for checkpoints; default: SDDIT_STORAGE, else runs."""
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
    vae: str | None = None
    """Where the autoencoder of latents is, if not where the checkpoint says: a folder, or a name on the hub."""

    def run(self) -> None:
        if self.out.suffix not in (".npz", ".png"):
            raise UsageError(f"--out {self.out} must end in .npz (images) or .png (a grid).")
        if self.count < 1:
            raise UsageError(f"--count is {self.count}, but must be at least 1.")
        import numpy as np

        from sddit import api
        from sddit.training.store import read_checkpoint

        num_classes = int(read_checkpoint(self.checkpoint).values["num_classes"])
        images = api.sample(self.checkpoint, [i % num_classes for i in range(self.count)], seed=self.seed, vae=self.vae)
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
    """Feature network; default: the one that belongs to the reference (of --final: to the experiment)."""
    metrics: str | None = None
    """Of fid,sfid,is,precision,recall,kid; default: fid, or nothing with --final."""
    final: str | None = None
    """Of probe,copying,denoising,seeds: the diagnostics of a checkpoint, on the data it was trained on."""
    vae: str | None = None
    """Where the autoencoder of a checkpoint's latents is, if not where the checkpoint says."""
    test_path: str | None = None
    """Held-out images for --final, a prepared folder; default: what the checkpoint's experiment held out."""

    def run(self) -> None:
        from sddit import api

        if self.final and not api.is_checkpoint(self.samples):
            raise UsageError(f"--final needs a checkpoint, but {self.samples} holds images. Leave --final out.")
        found: dict[str, Any] = {}
        if self.metrics or not self.final:
            found = api.evaluate(self.samples, self.reference, self.extractor, _names(self.metrics or "fid"), self.vae)
        if self.final:
            found["final"] = api.diagnose(self.samples, _names(self.final), self.test_path, self.extractor)
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
class Prepare:
    """Make a data set of images for training, on all of a Ray cluster. The same command again goes on.

    Decodes, crops and, with --vae, encodes. Written are shards (pixels uint8, or mean and std of latents in half
    precision) and, last, manifest.json; the bytes do not depend on the number of workers. Connects to RAY_ADDRESS,
    else starts Ray on this machine.
    """

    source: tyro.conf.Positional[str]
    """A folder with a subfolder of images for each class, parquet as on the Hugging Face hub (image, label), WebDataset
    tars (.jpg or .png, and .cls), or an .npz (images, labels): a file, a folder, or a pattern in quotes such as
    'data/train-*.parquet'; here, or an address such as s3://bucket/folder."""
    out: str
    """The folder to make, here or s3://…"""
    size: int | None = None
    """Side in pixels of ADM's centre crop; default: images that all have one size are kept as they are."""
    vae: str | None = None
    """Encode with this diffusers AutoencoderKL: a folder, or a name on the hub such as stabilityai/sd-vae-ft-ema."""
    mirrored: bool = False
    """Encode the mirrored images as well, which data.flip needs of latents: twice the size."""
    channels: Literal[1, 3] = 3
    """3 turns grey images into RGB, 1 all into grey."""
    name: str | None = None
    """The data set's name in its manifest; default: that of the folder."""
    max_unreadable: float = 0.001
    """Fraction of the images that may be unreadable; they are listed in unreadable.txt and left out."""
    workers: int | None = None
    """Shards made at once, at most; default: one for each CPU, or each GPU that encodes."""
    gpus: int | None = None
    """GPUs that encode; default: all of the cluster now. An autoscaling one starts nodes for more; 0: on CPUs."""

    def run(self) -> None:
        from dataclasses import asdict

        from sddit.orchestration.prepare import prepare

        prepare(**asdict(self))


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


@dataclass(frozen=True)
class Serve:
    """Run the tracking server of a cluster: MLflow's own over sqlite, its database copied to storage and restored."""

    data: Path
    """The folder of the database, on a disk of this machine."""
    artifacts: str | None = None
    """Folder or URI for figures and sample grids; default: artifacts in the folder of the database."""
    backup: str | None = None
    """Folder or URI that the database is copied to each minute and at the end, and restored from at the start."""
    database: str | None = None
    """The URI of a database server, e.g. postgresql://user@host/mlflow, which is then not copied."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0: on all addresses, for whom a firewall or security group lets through."""
    port: int = 5000
    names: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A name by which others reach this machine, beside its addresses; repeatable."""
    workers: int = 1
    """Processes that answer."""
    every: float = 60.0
    """Seconds between copies."""
    detach: bool = False
    """Return when it answers, and go on in the background, in place of one that serves the folder already."""
    stop: bool = False
    """End the one that serves the folder, after a last copy; if none runs, copy at once."""

    def run(self) -> None:
        from sddit import serve

        if self.stop:
            print(serve.stop(self.data))
            return
        if self.database and self.backup:
            raise UsageError("--backup copies a sqlite file, so it cannot be used with --database. Leave one out.")
        if self.every <= 0 or self.workers < 1:
            raise UsageError(f"--every {self.every:g} and --workers {self.workers} must be above 0.")
        server = serve.Server(
            self.data, self.artifacts or str(self.data / "artifacts"), self.backup, self.database, self.host,
            self.port, self.names, self.workers, self.every,
        )  # fmt: skip
        if self.detach:
            server.start([word for word in sys.argv[2:] if word != "--detach"])
        else:
            server.run()


@dataclass(frozen=True)
class Doctor:
    """Look, before anything is spent, whether an experiment could run here, or on every node of RAY_ADDRESS: code,
    libraries, devices, clocks, storage, record, data, weights, room. One line each, with what to do."""

    preset: str = "digits"
    """Base experiment: digits, cifar10, cifar10-latents, imagenet256."""
    method: str = "sddit"
    size: str = "S/2"
    workers: int = 1
    """Workers per cell, anywhere in the cluster."""
    tracking_uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    storage: str = os.environ.get("SDDIT_STORAGE") or "runs"
    """Folder or URI for checkpoints; default: SDDIT_STORAGE, else runs."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """section.field=value, repeatable."""

    def run(self) -> None:
        changes = {"resources.workers": self.workers, **dict(parse_assignment(text) for text in self.set)}
        method = changes.pop("method.name", self.method)
        experiment = presets.preset(self.preset)(size=self.size, method=method).replace(changes)
        from sddit.orchestration import doctor

        doctor.run(experiment, storage=self.storage, tracking_uri=self.tracking_uri)


def main() -> None:
    """The command's entry point; exits."""
    commands: dict[str, Any] = {"train": Train, "sample": Sample, "evaluate": Evaluate, "reference": Reference}
    commands |= {"prepare": Prepare, "import": Import, "export": Export, "compare": Compare, "status": Status}
    commands |= {"doctor": Doctor, "serve": Serve}
    command = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)

    def run() -> None:
        check_environment()
        command.run()

    run_script(run)
