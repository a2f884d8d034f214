"""From images to scores: reference moments, kept in the cache, and the Fréchet distance to them."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sddit.data import Manifest, cache_dir, open_manifest
from sddit.data.shards import Shards
from sddit.errors import UsageError
from sddit.metrics.protocol import Protocol
from sddit.metrics.statistics import Moments, frechet_distance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from sddit.metrics.features import Extractor

BATCH = 256  # images at once
DEFAULT_EXTRACTORS = {"digits": "digits-cnn"}


def reference_moments(manifest: Manifest, extractor: Extractor) -> Moments:
    """Moments of all images of a data set, from the cache where they were computed before."""
    key = hashlib.sha256(f"{manifest.digest}/{extractor.digest}".encode()).hexdigest()[:24]
    path = cache_dir() / "reference" / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return Moments.from_array(file["moments"])
    except (OSError, ValueError, KeyError):  # not there, or torn: compute it
        pass
    shards = Shards(manifest)
    moments = Moments()
    for lo in range(0, len(shards), BATCH):
        images, _ = shards.read(np.arange(lo, min(lo + BATCH, len(shards))))
        moments.update(extractor(_tensor(images)))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}-{uuid.uuid4().hex[:8]}.npz")
    np.savez(part, moments=moments.to_array())
    part.replace(path)
    return moments


def score(moments: Moments, reference: Moments) -> dict[str, float]:
    """FID of samples against a reference, by its name in MLflow."""
    distance = frechet_distance(moments.mean, moments.covariance(), reference.mean, reference.covariance())
    return {"eval/fid": distance}


def evaluate_images(images: ArrayLike, reference: str = "digits", extractor: str | None = None) -> dict[str, Any]:
    """Scores uint8 images (N, H, W, C) or (N, C, H, W) against a data set, a built-in name or a prepared folder.

    Returns 'fid' and its 'protocol' in words and as a digest.

    Raises:
        UsageError: not uint8 images of the reference's shape, fewer than two, or no extractor is named where the
            reference has none of its own.
    """
    from sddit.metrics.features import check_extractor, get_extractor

    manifest = open_manifest(reference)
    name = extractor or DEFAULT_EXTRACTORS.get(manifest.name, "inception-v3-compat")
    check_extractor(name, manifest.shape)
    array = _channels_first(np.asarray(images), manifest.shape)
    network = get_extractor(name)
    moments = Moments()
    for lo in range(0, len(array), BATCH):
        moments.update(network(_tensor(array[lo : lo + BATCH])))
    distance = score(moments, reference_moments(manifest, network))["eval/fid"]
    protocol = Protocol(name, network.digest, manifest.digest, len(array), reference_images=manifest.count)
    return {"fid": distance, "protocol": protocol.describe(), "protocol_digest": protocol.digest}


def _channels_first(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = shape
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < 2:
        raise UsageError(
            f"The images are {images.dtype} of shape {images.shape}, but must be uint8 (N, H, W, C) with N at least 2."
        )
    if images.shape[1:] == (height, width, channels):
        return images.transpose(0, 3, 1, 2)
    if images.shape[1:] == shape:
        return images
    raise UsageError(
        f"The images are of shape {images.shape[1:]}, but the reference has {height}×{width} pixels of {channels} "
        "channels. Score them against a reference of their own size."
    )


def _tensor(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images))
