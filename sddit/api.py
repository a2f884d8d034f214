"""The functions of ``import sddit``: train, sample and evaluate on this machine, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sddit.config import Experiment
from sddit.errors import CheckpointError, SupersededError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import ArrayLike

    from sddit.checkpoints.exporting import Form
    from sddit.checkpoints.names import Project
    from sddit.data.manifest import Manifest, VaeInfo
    from sddit.methods.base import Method
    from sddit.metrics.images import Images


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
    from sddit.metrics.check import check_evaluation
    from sddit.metrics.reference import content_digest
    from sddit.tracking import SweepRecord, resolve_uri
    from sddit.training.store import CheckpointStore

    if experiment.resources.workers > 1:
        raise UsageError("sddit.train uses this process alone. Use a sweep with --workers for more.")
    manifest = open_manifest(experiment.data.path)
    check_evaluation(experiment, manifest)
    identity = experiment.identity(content_digest(experiment, manifest))
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
    except SupersededError:
        raise  # what another process does with the run is its own
    except Exception as error:
        record.end_cell(run_id, "failed", error=str(error))
        raise
    finally:
        owner.release()
    metrics = {k: v for k, v in result.items() if "/" in k}
    return TrainResult(result["checkpoint"], result["step"], metrics, run_id, identity)


def sample(
    checkpoint: str | Path, classes: Sequence[int] | np.ndarray, seed: int = 0, vae: str | None = None
) -> np.ndarray:
    """Images of a checkpoint, uint8 (N, H, W, C): one for each entry of `classes`, by the experiment's own sampler.

    Image i depends on (seed, i) and its class alone. Latents are decoded by the autoencoder they were made with; `vae`
    says where it is, a folder or a name on the Hugging Face hub, where the checkpoint does not or it has moved.

    Raises:
        CheckpointError: there is none, or it is corrupt.
        UsageError: a class does not exist, or the autoencoder is missing or another.
    """
    import numpy as np

    from sddit.training import evaluation

    labels = np.asarray(classes)
    if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
        raise UsageError(f"Classes must be whole numbers, one for each image; got {labels.dtype} {labels.shape}.")
    method, device = _read_method(checkpoint, {"data.vae": vae} if vae else None)
    images = evaluation.sample(method, method.network, labels.astype(np.int64), 0, seed, device)
    return evaluation.to_nhwc(images)


def evaluate(
    images: ArrayLike | str | Path,
    reference: str = "digits",
    extractor: str | None = None,
    metrics: Sequence[str] = ("fid",),
    vae: str | None = None,
) -> dict[str, Any]:
    """Scores images against a reference set.

    Args:
        images: uint8 (N, H, W, C); or the path of an .npz with arr_0, of a folder of images, or of a checkpoint, which
            is sampled as its experiment says. What has a path is read batch by batch.
        reference: a built-in data set, a prepared folder, a folder of images, an .npz with arr_0 or with the statistics
            of the ADM suite, or what `build_reference` built.
        extractor: the feature network; None is the one that belongs to the reference.
        metrics: of 'fid', 'sfid', 'is', 'precision', 'recall', 'kid'.
        vae: as for `sample`, of a checkpoint that makes latents.

    Returns:
        The scores by these names, 'protocol' and 'protocol_digest'.

    Raises:
        UsageError: images, reference, extractor and metrics do not fit together; said before any work.
        DataError, CheckpointError: something is missing or broken.
    """
    import numpy as np
    import torch

    from sddit.metrics.fidelity import evaluate_images
    from sddit.metrics.images import images_in, open_images

    known: dict[str, Any] = {}
    if not isinstance(images, str | Path):
        samples = images_in(np.asarray(images))
    elif is_checkpoint(images):
        samples, known = _samples_of(images, vae)
    else:
        samples = open_images(Path(images))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return evaluate_images(samples, reference, extractor, metrics, device=device, known=known)


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    vae: str | None = None,
    mirrored: bool = False,
    channels: Literal[1, 3] = 3,
    max_unreadable: float = 0.001,
) -> str:
    """Prepares images for training, with the bytes that ``sddit prepare`` gives; returns `out`, for `data.path`.

    The same call again goes on where one was interrupted, and returns at once when all is done.

    Args:
        source: a folder with a subfolder of images for each class, parquet as on the Hugging Face hub, WebDataset tars,
            or an .npz with images and labels; a file, a folder or a pattern, here or an address such as ``s3://…``.
        out: the folder to make, here or an address.
        size: side in pixels of ADM's centre crop; None keeps images that all have one size as they are.
        vae: encode with this AutoencoderKL, a folder or a name on the Hugging Face hub.
        mirrored: encode the mirrored images as well, which `data.flip` needs of latents.
        channels: 3 makes all images RGB, 1 grey.
        max_unreadable: fraction of the images that may be unreadable; they are listed in unreadable.txt and left out.

    Raises:
        UsageError: arguments that do not fit together, or `out` holds something else.
        DataError: the source is missing, or is not what training data are made of.
        StorageError: a storage cannot be read or written.
    """
    from sddit.data.job import Job
    from sddit.data.prepare import make_shards

    job = Job(
        str(source),
        str(out),
        size=size,
        vae=vae,
        mirrored=mirrored,
        channels=channels,
        max_unreadable=max_unreadable,
    )
    if not job.done:
        job.run(make_shards)
    return str(out)


def build_reference(source: str, extractor: str | None = None, metrics: Sequence[str] | None = None) -> dict[str, Any]:
    """Builds what samples are scored against, once, and keeps it in the cache.

    Args:
        source, extractor: as for `evaluate`.
        metrics: what it shall serve; None is all that the extractor gives.

    Returns:
        'path', 'bytes', 'digest', 'images', 'shape', …

    Raises:
        UsageError, DataError: it cannot be built.
    """
    import torch

    from sddit.metrics import reference
    from sddit.metrics.check import check_metrics
    from sddit.metrics.features import check_extractor, get_extractor, layers_of
    from sddit.metrics.protocol import METRICS

    found = reference.open_reference(source)
    name = extractor or found.default_extractor
    layers = layers_of(name) or {"features"}
    wanted = metrics or [metric for metric in reference.PARTS if METRICS[metric].layer in layers]
    check_extractor(name, found.shape)
    check_metrics(wanted, name, None, found.count)
    found.check(name, wanted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return reference.build_reference(found, get_extractor(name, device, wanted), wanted)


def diagnose(
    checkpoint: str | Path, names: Sequence[str], test_path: str | None = None, extractor: str | None = None
) -> dict[str, float]:
    """The final diagnostics of a checkpoint, as `eval.final` records them: of 'probe', 'copying', 'denoising', 'seeds'.

    Args:
        test_path: a prepared data set of held-out images; None is what its experiment held out.
        extractor: of the features for 'copying' and 'seeds'; None is its experiment's.

    Raises:
        CheckpointError: there is none, or it is corrupt.
        UsageError: there are no held-out images, or the data are not of its kind.
    """
    from sddit.data import open_manifest
    from sddit.data.sampler import BatchSampler
    from sddit.data.shards import Shards
    from sddit.metrics.check import FINAL, check_held_out, check_metrics, check_names
    from sddit.metrics.features import check_named_by_file, get_extractor
    from sddit.metrics.reference import reference_of
    from sddit.training import diagnostics, evaluation

    check_names(names, FINAL, "diagnostic")
    given = {"data.test_path": test_path, "eval.extractor": extractor}
    changes = {"eval.final": tuple(names)} | {name: value for name, value in given.items() if value}
    method, device = _read_method(checkpoint, changes)
    experiment = method.experiment
    options, manifest = experiment.eval, open_manifest(experiment.data.path)
    if (manifest.shape, manifest.num_classes) != (method.shape, method.num_classes):
        raise UsageError(
            f"The data at {experiment.data.path} are {manifest.shape} (C, H, W) of {manifest.num_classes} classes, but "
            f"{checkpoint} was trained on {method.shape} of {method.num_classes}. Put its own data there."
        )
    check_held_out(experiment, manifest)
    sampler = BatchSampler.of(experiment, Shards(manifest), batch_size=1)
    metrics = ("fid",) if "seeds" in names else ()
    network, real, evaluated = None, None, evaluation.Evaluation({})
    if {"copying", "seeds"} & set(names):
        if extractor is None:
            check_named_by_file(options.extractor, checkpoint)
        source = reference_of(experiment, manifest)
        check_metrics(("fid",), options.extractor, options.samples, source.count)
        network = get_extractor(options.extractor, device)
        real = source.load(network, metrics)
        evaluated = evaluation.evaluate(method, method.network, network, real, device, metrics, keep_features=True)
    return diagnostics.diagnose(
        names,
        diagnostics.Setting(
            method,
            method.network,
            network,
            real,
            sampler.training_images(),
            diagnostics.held_out_images(experiment, sampler),
            device,
            evaluated,
        ),
    )


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is taken for a checkpoint's: it is neither an .npz, nor a folder without a manifest."""
    local = Path(path)
    return local.suffix != ".npz" and not (local.is_dir() and not (local / "manifest.json").exists())


def build_network(experiment: Experiment) -> torch.nn.Module:
    """The trainable generator of an experiment, with its initial weights: ``net(x, noise, y) -> F``.

    x (B, C, H, W) as the network sees it; noise (B,) is ln(sigma)/4 under EDM, the original step index under IDDPM;
    y (B,) int64, the null class is num_classes. F has C channels under EDM, 2C under IDDPM (noise, then variance).
    Shape and classes come from the data's manifest, or from `data.shape` and `data.num_classes` without data.
    """
    from sddit.models import build_network as build

    shape, num_classes = data_shape(experiment)
    return build(experiment, shape, num_classes)


def load_network(checkpoint: str | Path) -> torch.nn.Module:
    """The network of a checkpoint in evaluation mode with the sampling weights."""
    from sddit.models import build_network as build

    experiment, shape, num_classes, tensors = _read(checkpoint)
    network = build(experiment, shape, num_classes)
    _load(network, tensors, checkpoint)
    return network.eval()


def _load(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], checkpoint: str | Path) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint} has other weights than its experiment says: {reason}") from None


def _read_method(checkpoint: str | Path, changes: Mapping[str, Any] | None = None) -> tuple[Method, torch.device]:
    """A checkpoint's method with the sampling weights in its network, in evaluation mode, and where it is.

    `changes` are made to its experiment first.
    """
    import torch

    from sddit.data.vae import decoder_of
    from sddit.methods import build_method

    experiment, shape, num_classes, tensors = _read(checkpoint)
    experiment = experiment.replace(changes or {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = _vae_of(checkpoint, experiment, shape)
    method = build_method(experiment, shape, num_classes)
    method.decode = decoder_of(vae, experiment.data.vae, device)
    _load(method.network, tensors, checkpoint)
    return method.to(device).eval(), device


def _vae_of(checkpoint: str | Path, experiment: Experiment, shape: tuple[int, int, int]) -> VaeInfo | None:
    """The autoencoder that a checkpoint's samples are decoded by, None for pixels.

    Raises:
        UsageError: it makes latents, and neither it nor `data.vae` says of which autoencoder.
    """
    from sddit.data.manifest import VaeInfo
    from sddit.data.vae import described
    from sddit.training.store import read_checkpoint

    if values := read_checkpoint(checkpoint).values.get("vae"):
        try:
            return VaeInfo.model_validate(values)
        except ValueError as error:
            raise _not_ours(checkpoint, error) from None
    if experiment.data.vae:
        return described(experiment.data.vae, shape)
    if shape[0] not in (1, 3):
        raise UsageError(
            f"{checkpoint} makes latents {shape} (C, H, W), and does not say of which autoencoder. Name it with --vae, "
            "as in --vae stabilityai/sd-vae-ft-ema."
        )
    return None


def _samples_of(checkpoint: str | Path, vae: str | None) -> tuple[Images, dict[str, Any]]:
    """The samples of a checkpoint as its experiment's own evaluations make them, and what the protocol says of them."""
    from sddit.metrics.images import Images
    from sddit.metrics.protocol import Protocol
    from sddit.training import evaluation

    method, device = _read_method(checkpoint, {"data.vae": vae} if vae else None)
    experiment, options = method.experiment, method.experiment.eval

    def batches(size: int) -> Iterator[np.ndarray]:
        for lo in range(0, options.samples, options.batch_size):  # as in training, whatever was asked
            labels = evaluation.labels_of(
                experiment, method.num_classes, lo, min(lo + options.batch_size, options.samples)
            )
            yield evaluation.sample(method, method.network, labels, lo, options.seed, device).cpu().numpy()

    made_by = _vae_of(checkpoint, experiment, method.shape)
    protocol = Protocol.from_experiment(experiment, "", "", decoder=made_by.digest if made_by else "none")
    known = {name: getattr(protocol, name) for name in ("seed", "labels", "decoder", "rounding", "guided")}
    known["weights"] = "ema"  # what a checkpoint holds for sampling
    shape = made_by.image_shape if made_by else method.shape
    return Images(str(checkpoint), options.samples, shape, batches), known


def import_weights(
    file: str | Path,
    source: Project,
    out: str | Path,
    *,
    decoder_layers: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Experiment:
    """Writes another project's weights as the new checkpoint folder `out`; returns the experiment they imply.

    Args:
        file: a .pt or .safetensors file; of 'diffusers' a pipeline's folder or its transformer's; of 'sddit' what
            `export_weights` wrote.
        source: 'dit', 'maskdit', 'mdt' (either version), 'diffusers' or 'sddit'.
        decoder_layers: of MDT version 1, which does not tell; None is 2, as published.
        settings: fields of the section `eval` by their dotted names, e.g. ``{"eval.guidance": 1.5}``.

    Raises:
        UsageError: `out` exists, or the arguments contradict the weights.
        CheckpointError: the weights are damaged, or not exactly those of a network known here.
    """
    from sddit.checkpoints.importing import import_checkpoint

    found = import_checkpoint(Path(file), source, Path(out), decoder_layers=decoder_layers, settings=settings)
    return found.experiment


def export_weights(
    checkpoint: str | Path, out: str | Path, *, form: Form | None = None, vae: str | None = None
) -> Form:
    """Writes the sampling weights of a checkpoint to the new folder `out`; returns the form.

    Args:
        form: 'diffusers', a folder for ``DiTPipeline.from_pretrained``; 'safetensors', with a config.json, which
            `import_weights` reads; None is 'diffusers' for a DiT on latents as published, else 'safetensors'.
        vae: a folder or a name on Hugging Face's hub, of the AutoencoderKL to put into the pipeline.

    Raises:
        UsageError: `out` exists, diffusers has no such network, or the VAE has other latents.
        CheckpointError: there is no checkpoint, or it is corrupt.
    """
    from sddit.checkpoints.exporting import export_network
    from sddit.checkpoints.implied import Implied

    experiment, shape, num_classes, tensors = _read(checkpoint)
    return export_network(tensors, Implied(experiment, shape, num_classes), Path(out), form=form, vae=vae)


def data_shape(experiment: Experiment) -> tuple[tuple[int, int, int], int]:
    """(C, H, W) and classes of the data, or where they are not at hand what `data.shape` and `num_classes` say."""
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
        raise _not_ours(checkpoint, error) from None
    return experiment, (c, h, w), num_classes, found.load(SAMPLING)


def _not_ours(checkpoint: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{checkpoint} is not a checkpoint of this project: {json.dumps(str(error))}.")
