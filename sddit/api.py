"""The functions of ``import sddit``: train, sample and evaluate on this machine, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sddit.config import Experiment
from sddit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import ArrayLike

    from sddit.data.manifest import Manifest


@dataclass(frozen=True)
class TrainResult:
    """How a training ended: its last checkpoint, the step reached, the last evaluation, and its run in MLflow."""

    checkpoint: str
    step: int
    metrics: dict[str, float]
    run_id: str
    identity: str


def train(
    experiment: Experiment, *, name: str = "train", tracking_uri: str | None = None, storage: str | Path = "runs"
) -> TrainResult:
    """Trains an experiment in this process, or goes on with it, and records it in MLflow under `name`.

    Raises:
        UsageError: the experiment cannot be run here.
        SdditError: it could not be finished; what is done is kept, and the same call goes on.
    """
    import torch

    from sddit import results
    from sddit.cell import CellSpec, run_cell
    from sddit.data import open_manifest
    from sddit.metrics.features import check_extractor
    from sddit.tracking import SweepRecord, resolve_uri
    from sddit.training.store import CheckpointStore

    if experiment.resources.workers > 1:
        raise UsageError("sddit.train uses this process alone. Use a sweep with --workers for more.")
    manifest = open_manifest(experiment.data.path)
    check_extractor(experiment.eval.extractor, manifest.shape)
    identity = experiment.identity(manifest.digest)
    root = str(storage) if "://" in str(storage) else str(Path(storage).absolute())
    folder = f"{root}/{name}/{identity}"
    CheckpointStore(folder).check_writable()
    uri = resolve_uri(tracking_uri)
    record = SweepRecord(uri, name)
    known = results.load_cells(name, uri)
    mine = known[known["identity"] == identity]["run_id"].tolist()
    run_id = record.start_cell(
        experiment,
        identity=identity,
        data_digest=manifest.digest,
        label=experiment.model.size.replace("/", "_"),
        run_id=mine[0] if mine else None,
    )
    owner = record.claim(run_id)
    try:
        spec = CellSpec(experiment.model_dump(mode="json"), identity, folder, uri, run_id, run_id, owner.token)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = run_cell(spec, lambda step, metrics: None, device=device)
        record.end_cell(run_id, "done")
    except Exception as error:
        record.end_cell(run_id, "failed", error=str(error))
        raise
    finally:
        owner.release()
    metrics = {k: v for k, v in result.items() if k.startswith("eval/")}
    return TrainResult(result["checkpoint"], result["step"], metrics, run_id, identity)


def sample(checkpoint: str | Path, classes: Sequence[int] | np.ndarray, seed: int = 0) -> np.ndarray:
    """Images of a checkpoint, uint8 (N, H, W, C): one for each entry of `classes`, by the experiment's own sampler.

    Image i depends on (seed, i) and its class alone.

    Raises:
        CheckpointError: there is none, or it is corrupt.
        UsageError: a class does not exist.
    """
    import numpy as np
    import torch

    from sddit.methods import build_method
    from sddit.training import evaluation

    experiment, shape, num_classes, tensors = _read(checkpoint)
    method = build_method(experiment, shape, num_classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.network.load_state_dict(tensors)
    method.to(device).eval()
    images = evaluation.sample(method, method.network, np.asarray(classes, dtype=np.int64), 0, seed, device)
    return evaluation.to_nhwc(images)


def evaluate(images: ArrayLike, reference: str = "digits", extractor: str | None = None) -> dict[str, Any]:
    """Scores uint8 images (N, H, W, C) against a reference set: a dictionary with 'fid' and its 'protocol'."""
    from sddit.metrics.fidelity import evaluate_images

    return evaluate_images(images, reference, extractor)


def read_images(source: str | Path) -> np.ndarray:
    """Images to score, uint8 (N, H, W, C) or (N, C, H, W): an .npz with arr_0, a folder of images, or a checkpoint,
    which is sampled as its experiment says.

    Raises:
        CheckpointError, DataError: none of these, or broken.
    """
    import numpy as np

    from sddit.metrics.images import image_batches
    from sddit.training.evaluation import labels_of

    path = Path(source)
    if path.suffix == ".npz" or (path.is_dir() and not (path / "manifest.json").exists()):
        return np.concatenate(list(image_batches(path)))
    experiment, _, num_classes, _ = _read(source)
    return sample(source, labels_of(experiment, num_classes, 0, experiment.eval.samples), experiment.eval.seed)


def build_network(experiment: Experiment) -> torch.nn.Module:
    """The trainable generator of an experiment, with its initial weights: ``net(x, noise, y) -> F``.

    x (B, C, H, W) as the network sees it; noise (B,) is ln(sigma)/4; y (B,) int64, the null class is num_classes.
    Shape and classes come from the data's manifest, or from `data.shape` and `data.num_classes` without data.
    """
    from sddit.models import build_network as build

    shape, num_classes = _shape(experiment)
    return build(experiment, shape, num_classes)


def load_network(checkpoint: str | Path) -> torch.nn.Module:
    """The network of a checkpoint in evaluation mode with the sampling weights."""
    from sddit.models import build_network as build

    experiment, shape, num_classes, tensors = _read(checkpoint)
    network = build(experiment, shape, num_classes)
    network.load_state_dict(tensors)
    return network.eval()


def _shape(experiment: Experiment) -> tuple[tuple[int, int, int], int]:
    from sddit.data import open_manifest
    from sddit.errors import DataError

    try:
        manifest: Manifest = open_manifest(experiment.data.path)
    except DataError:
        if experiment.data.shape is None or experiment.data.num_classes is None:
            raise
        return experiment.data.shape, experiment.data.num_classes
    return manifest.shape, manifest.num_classes


def _read(checkpoint: str | Path) -> tuple[Experiment, tuple[int, int, int], int, dict[str, torch.Tensor]]:
    from sddit.training.store import SAMPLING, read_checkpoint

    found = read_checkpoint(checkpoint)
    try:
        experiment = Experiment.parse(found.values["experiment"])
        c, h, w = (int(n) for n in found.values["shape"])
        num_classes = int(found.values["num_classes"])
    except (KeyError, TypeError, ValueError) as error:
        reason = json.dumps(str(error))
        raise CheckpointError(f"{checkpoint} is not a checkpoint of this project: {reason}.") from None
    return experiment, (c, h, w), num_classes, found.load(SAMPLING)
