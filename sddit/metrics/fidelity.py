"""From images to scores: reference moments, kept in the cache, and the Fréchet distance to them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sddit.data import DATASETS, Manifest, cache_dir, open_manifest
from sddit.data.manifest import MANIFEST
from sddit.data.shards import Shards
from sddit.errors import DataError, UsageError
from sddit.metrics.images import channels_first, image_batches, npz_statistics
from sddit.metrics.protocol import Protocol
from sddit.metrics.statistics import Moments, frechet_distance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    from sddit.metrics.features import Extractor

log = logging.getLogger(__name__)
BATCH = 256  # images at once
INCEPTION = "inception-v3-compat"
DEFAULT_EXTRACTORS = {"digits": "digits-cnn"}  # by the data set's name; INCEPTION for all others
Batches = Iterable[np.ndarray]  # of uint8 (b, C, H, W)


def reference_moments(manifest: Manifest, extractor: Extractor) -> Moments:
    """Moments of all images of a data set, from the cache where they were computed before."""
    return _cached_moments(manifest.digest, extractor, lambda: _shard_batches(manifest))


def score(moments: Moments, reference: Moments) -> dict[str, float]:
    """FID of samples against a reference, by its name in MLflow.

    Raises:
        UsageError: fewer than two samples.
    """
    distance = frechet_distance(moments.mean, moments.covariance(), reference.mean, reference.covariance())
    return {"eval/fid": distance}


def evaluate_images(images: ArrayLike, reference: str = "digits", extractor: str | None = None) -> dict[str, Any]:
    """Scores uint8 images (N, H, W, C) or (N, C, H, W).

    Args:
        images: at least two, of the reference's size.
        reference: a built-in data set, a prepared folder, a folder of images, or an `.npz` with images `arr_0`, or with
            `mu` and `sigma` of Inception features (as the ADM suite's reference files).
        extractor: a name as in `sddit.metrics.features`; None is the one that belongs to the reference.

    Returns:
        'fid', its 'protocol' in words, and the 'protocol_digest'.

    Raises:
        UsageError: not such images, or an extractor that is not there or cannot see them.
        DataError: the reference is missing or broken.
    """
    from sddit.metrics.features import check_extractor, get_extractor

    array = channels_first(np.asarray(images))
    if len(array) < 2:
        raise UsageError(f"An FID needs at least 2 images; there are {len(array)}. A thousand give a usable one.")
    source = _find_reference(reference)
    default = DEFAULT_EXTRACTORS.get(source.name, INCEPTION) if isinstance(source, Manifest) else INCEPTION
    name = extractor or default
    check_extractor(name, array.shape[1:])
    network = get_extractor(name)
    real = _read_reference(source, network, array.shape[1:])
    moments = _moments((array[lo : lo + BATCH] for lo in range(0, len(array), BATCH)), network)
    distance = frechet_distance(moments.mean, moments.covariance(), real.mean, real.covariance)
    protocol = Protocol(name, network.digest, real.digest, len(array), reference_images=real.count)
    return {"fid": distance, "protocol": protocol.describe(), "protocol_digest": protocol.digest}


@dataclass(frozen=True)
class _Reference:
    mean: np.ndarray  # (d,)
    covariance: np.ndarray  # (d, d)
    digest: str  # of the images, or of the statistics where there is nothing else
    count: int | None


def _find_reference(reference: str) -> Manifest | Path:
    """A data set, or the path of an `.npz` or of a folder of images."""
    path = Path(reference).expanduser()
    if reference not in DATASETS and path.exists() and (path.suffix == ".npz" or not (path / MANIFEST).exists()):
        return path
    return open_manifest(reference)  # says what is wrong, too


def _read_reference(source: Manifest | Path, extractor: Extractor, shape: tuple[int, ...]) -> _Reference:
    if isinstance(source, Manifest):
        _check_shape(shape, source.shape)
        moments = reference_moments(source, extractor)
        return _Reference(moments.mean, moments.covariance(), source.digest, moments.count)
    statistics = npz_statistics(source) if source.suffix == ".npz" else None
    if statistics and extractor.name == INCEPTION:
        mean, covariance = statistics
        digest = hashlib.sha256(mean.tobytes() + covariance.tobytes()).hexdigest()
        return _Reference(mean, covariance, digest, None)
    try:
        digest = _digest_images(image_batches(source, BATCH), shape)
    except DataError as error:
        if statistics is None:
            raise
        raise UsageError(
            f"{source} has statistics of Inception features and no images, so it cannot serve {extractor.name}. "
            f"Use the extractor {INCEPTION}, or give images."
        ) from error
    moments = _cached_moments(digest, extractor, lambda: image_batches(source, BATCH))
    return _Reference(moments.mean, moments.covariance(), digest, moments.count)


def _check_shape(shape: tuple[int, ...], reference: tuple[int, ...]) -> None:
    if shape != reference:
        sizes = [f"{height}×{width} with {channels} channels" for channels, height, width in (shape, reference)]
        raise UsageError(
            f"The images are {sizes[0]}, but the reference is {sizes[1]}. "
            "Score them against a reference of their own size."
        )


def _digest_images(batches: Batches, shape: tuple[int, ...]) -> str:
    """sha256 of the images' values, whatever file they came from."""
    digest = hashlib.sha256(repr(shape).encode())
    for batch in batches:
        _check_shape(shape, batch.shape[1:])
        digest.update(np.ascontiguousarray(batch).data)
    return digest.hexdigest()


def _cached_moments(digest: str, extractor: Extractor, batches: Callable[[], Batches]) -> Moments:
    """Moments of the images that `digest` stands for: from the cache, or computed and put there."""
    key = hashlib.sha256(f"{digest}/{extractor.digest}".encode()).hexdigest()[:24]
    path = cache_dir() / "reference" / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return Moments.from_array(file["moments"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or torn: compute it
        pass
    moments = _moments(batches(), extractor)
    part = path.with_suffix(f".{os.getpid()}-{uuid.uuid4().hex[:8]}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, moments=moments.to_array())
        part.replace(path)
    except OSError as error:  # a full or read-only cache costs time, not the result
        log.warning("Reference statistics were not kept in %s: %s. Set SDDIT_CACHE to keep them.", path.parent, error)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return moments


def _shard_batches(manifest: Manifest) -> Batches:
    shards = Shards(manifest)
    for lo in range(0, len(shards), BATCH):
        yield shards.read(np.arange(lo, min(lo + BATCH, len(shards))))[0]


def _moments(batches: Batches, extractor: Extractor) -> Moments:
    moments = Moments(extractor.dim)
    for batch in batches:
        moments.update(extractor(_tensor(batch)))
    return moments


def _tensor(images: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.array(images, order="C"))  # a copy: what was read may be read-only
