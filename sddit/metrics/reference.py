"""What samples are scored against: statistics of real images, computed once for each extractor and kept in the cache.

    <cache>/reference/<key>.npz    key: of the images' digest and the extractor's
        moments    of the features, for FID (`Moments.to_array`)
        spatial    of the spatial layer, for sFID
        subset     float32 (n, d): features of at most 10,000 of the images, for precision, recall and KID
        about      JSON: what it was built from
    <cache>/reference/<key>-noise-<samples>.json    the FID that so many real images have (`noise_floor`)

A file has what was asked for so far, and grows. The ADM suite's published files (`mu`, `sigma`, `mu_s`, `sigma_s`,
`arr_0`) serve as they are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sddit import seeding
from sddit.config import Experiment
from sddit.data import DATASETS, Manifest, cache_dir, open_manifest
from sddit.data.manifest import MANIFEST
from sddit.data.shards import Shards
from sddit.errors import DataError, UsageError
from sddit.metrics.features import DIGITS_CNN, INCEPTION, check_named_by_file
from sddit.metrics.images import Images, Shape, has_images, npz_arrays, open_images
from sddit.metrics.protocol import METRICS
from sddit.metrics.statistics import Moments, frechet_distance

if TYPE_CHECKING:
    from torch import Tensor

    from sddit.metrics.features import Extractor

log = logging.getLogger(__name__)
BATCH = 256  # images at once
DRAWS = 5  # behind the noise floor
SUBSET = 10_000  # images behind precision, recall and KID, as in the ADM suite's files
DEFAULT_EXTRACTORS = {"digits": DIGITS_CNN}  # by the data set's name; INCEPTION for all others
# What a metric needs of a reference; the Inception score needs none.
PARTS = {"fid": "moments", "sfid": "spatial", "precision": "subset", "recall": "subset", "kid": "subset"}


class Gaussian(NamedTuple):
    """What a Fréchet distance sees of a set."""

    mean: np.ndarray  # (d,)
    covariance: np.ndarray  # (d, d)


@dataclass(frozen=True)
class Reference:
    """Statistics of a reference set; None is what was not asked for."""

    digest: str  # of the images, or of the statistics where there is nothing else
    count: int | None  # images behind the moments
    moments: Gaussian | None = None
    spatial: Gaussian | None = None
    subset: np.ndarray | None = None  # float32 (n, d)
    subset_digest: str | None = None  # of the images behind `subset`, where `digest` does not stand for them


@dataclass(frozen=True)
class Source:
    """A reference of which no image has been read yet: `check` what it can serve, then `load`."""

    name: str  # for messages
    images: Images | None = None
    digest: str | None = None  # of a data set: its manifest knows it
    read: Callable[[np.ndarray], np.ndarray] | None = None  # images at sorted indices, where not all need be read
    statistics: Mapping[str, Gaussian] = field(default_factory=dict)  # of Inception: by part
    built: Path | None = None  # a file that `sddit reference` made ...
    about: Mapping[str, Any] = field(default_factory=dict)  # ... and what it says of itself

    @property
    def shape(self) -> Shape | None:
        """(C, H, W) of the images, where there are any."""
        if self.built:
            channels, height, width = self.about["shape"]
            return channels, height, width
        return self.images.shape if self.images else None

    @property
    def count(self) -> int | None:
        """How many images there are, or were."""
        return self.about["images"] if self.built else self.images.count if self.images else None

    @functools.cached_property
    def images_digest(self) -> str:
        """Of a data set its manifest knows it; the images of others are read for it."""
        assert self.images is not None
        return self.digest or _digest_of(self.images)

    @property
    def content_digest(self) -> str:
        """What `load` calls it, whichever the extractor."""
        if self.built:
            return str(self.about["digest"])
        if self.statistics:
            return _statistics_digest(self.statistics["moments"])
        return self.images_digest

    @property
    def default_extractor(self) -> str:
        """Raises UsageError as `check_named_by_file`."""
        if not self.built:
            return DEFAULT_EXTRACTORS.get(self.name, INCEPTION)
        check_named_by_file(self.about["extractor"], self.name)
        return self.about["extractor"]

    def check(self, extractor: str, metrics: Sequence[str], shape: Shape | None = None) -> None:
        """Whether it can serve these metrics, with this extractor, for images of `shape` (C, H, W). Free of torch.

        Raises:
            UsageError: it cannot.
        """
        if shape and self.shape and shape != self.shape:
            sizes = [f"{height}×{width} with {channels} channels" for channels, height, width in (shape, self.shape)]
            raise UsageError(
                f"The images are {sizes[0]}, but the reference is {sizes[1]}. "
                "Score them against a reference of their own size."
            )
        if self.built and extractor != self.about["extractor"]:
            raise UsageError(
                f"{self.name} was built with {self.about['extractor']}, so it cannot serve {extractor}. "
                f"Use --extractor {self.about['extractor']}, or build another from the images: sddit reference."
            )
        for metric in metrics:
            part = PARTS.get(metric)
            if part is None or (self.images and not self.statistics):
                continue
            label = METRICS[metric].label
            if self.built:
                if part not in self.about["parts"]:
                    raise UsageError(
                        f"{self.name} was built without what {label} needs. Build it again from its images, with "
                        f"sddit reference --metrics {','.join(PARTS)}."
                    )
            elif extractor != INCEPTION:
                if not self.images:
                    raise UsageError(
                        f"{self.name} has statistics of Inception features and no images, so it cannot serve "
                        f"{extractor}. Use the extractor {INCEPTION}, or give images."
                    )
            elif part == "subset" and not self.images:
                raise UsageError(
                    f"{self.name} has no images arr_0, which {label} needs. Leave {metric} out, or give a file that "
                    "has them."
                )
            elif part != "subset" and part not in self.statistics:
                raise UsageError(
                    f"{self.name} has mu and sigma, but no mu_s and sigma_s, which {label} needs. Leave {metric} out, "
                    "or give a file that has them."
                )

    def load(self, extractor: Extractor, metrics: Sequence[str]) -> Reference:
        """The statistics that `metrics` need: from the cache, or computed and put there. `check` has passed.

        Raises:
            UsageError: it was built with other weights, or holds statistics of other features.
            DataError: images that cannot be read.
        """
        parts = {PARTS[metric] for metric in metrics if metric in PARTS}
        if self.built:
            if extractor.digest != self.about["extractor_digest"]:
                raise UsageError(
                    f"{self.name} was built with other weights of {extractor.name}. Build it again: sddit reference."
                )
            return _reference(npz_arrays(self.built, *parts), self.about["digest"], self.about["images"])
        given = self.statistics if extractor.name == INCEPTION else {}
        for part, statistics in given.items():
            width = extractor.dims.get("spatial" if part == "spatial" else "features")
            if part in parts and len(statistics.mean) != width:
                raise UsageError(
                    f"{self.name} has statistics of width {len(statistics.mean)}, but {extractor.name} gives {width}. "
                    "Make both with the same extractor."
                )
        computed = parts - set(given)
        if not given or computed:
            assert self.images is not None
            images_digest = self.images_digest
            found = _cached(self.images, images_digest, extractor, computed)
        if not given:
            return _reference(found, images_digest, self.images.count if self.images else None)
        moments = given["moments"]
        return Reference(
            _statistics_digest(moments),
            None,
            moments,
            given.get("spatial"),
            found["subset"] if computed else None,
            images_digest if computed else None,
        )


def open_reference(reference: str | Path) -> Source:
    """What lies at `reference`.

    Args:
        reference: a built-in data set, a prepared folder, a folder of images, an `.npz` with images `arr_0` or with
            statistics of Inception features, or what `sddit reference` built: its path, or its bare name in the cache.

    Raises:
        DataError: there is nothing, or it is broken.
    """
    path = Path(reference).expanduser()
    built = cache_dir() / "reference" / f"{path.name.removesuffix('.npz')}.npz"
    if str(reference) not in DATASETS and not path.exists() and path.name == str(reference) and built.exists():
        path = built
    if str(reference) in DATASETS or not path.exists() or (path.is_dir() and (path / MANIFEST).exists()):
        return of_manifest(open_manifest(reference))  # says what is wrong, too
    if path.suffix != ".npz":
        return Source(str(path), open_images(path))
    small = npz_arrays(path, "about", "mu", "sigma", "mu_s", "sigma_s")
    if "about" in small:
        return Source(str(path), built=path, about=_about(path, small["about"]))
    statistics = {
        part: _gaussian(path, mean, covariance, small)
        for part, mean, covariance in (("moments", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
        if mean in small and covariance in small
    }
    if "moments" not in statistics:
        return Source(str(path), open_images(path))
    return Source(str(path), open_images(path) if has_images(path) else None, statistics=statistics)


def reference_of(experiment: Experiment, manifest: Manifest) -> Source:
    """What the evaluations of an experiment on these data are scored against: `eval.reference`, else the data.

    Raises:
        UsageError: the data are latents, and nothing else is named.
        DataError: as `open_reference`.
    """
    if experiment.eval.reference is not None:
        return open_reference(experiment.eval.reference)
    return of_manifest(manifest)


def content_digest(experiment: Experiment, manifest: Manifest) -> str:
    """What an identity knows of an experiment's data: the content of the training set and, where they are given, of the
    test set and of the reference.

    Raises:
        DataError, UsageError: as `open_manifest` of the test set and `reference_of`.
    """
    digest = manifest.digest
    if experiment.data.test_path is not None:
        digest += f"+{open_manifest(experiment.data.test_path).digest}"
    if experiment.eval.reference is not None:
        path = Path(experiment.eval.reference).expanduser()
        changed = path.stat().st_mtime_ns if path.exists() else None
        digest += f"@{_reference_digest(experiment.eval.reference, changed)}"
    return digest


@functools.lru_cache(maxsize=8)
def _reference_digest(reference: str, changed: int | None) -> str:
    """`changed` is part of the key: a plan of many cells reads a folder of images once."""
    return open_reference(reference).content_digest


def of_manifest(manifest: Manifest) -> Source:
    """A data set as a reference.

    Raises:
        UsageError: it holds latents.
    """
    if manifest.vae:
        raise UsageError(
            f"{manifest.folder} holds latents, but a reference is made of pixels. Set eval.reference to the same "
            "images prepared without --vae, or to an .npz with their statistics."
        )
    shards = Shards(manifest)

    def read(indices: np.ndarray) -> np.ndarray:
        return shards.read(indices)[0]

    def batches(size: int) -> Iterator[np.ndarray]:
        for lo in range(0, len(shards), size):
            yield read(np.arange(lo, min(lo + size, len(shards))))

    images = Images(manifest.name, manifest.count, manifest.shape, batches)
    return Source(manifest.name, images, manifest.digest, read)


def build_reference(source: Source, extractor: Extractor, metrics: Sequence[str]) -> dict[str, Any]:
    """Makes sure that the cache has what `metrics` need of the images of `source`, and says what it has.

    Returns:
        'path', 'bytes', and what the file says of itself: 'source', 'digest', 'images', 'shape', 'extractor', 'parts' …

    Raises:
        UsageError: there is nothing to build.
        DataError: the images cannot be read, or the cache cannot be written.
    """
    parts = {PARTS[metric] for metric in metrics if metric in PARTS}
    if extractor.name == INCEPTION:
        parts -= set(source.statistics)
    if source.images is None or not parts:
        raise UsageError(f"There is nothing to build of {source.name} for these metrics. Use it as it is.")
    digest = source.images_digest
    path = _path(digest, extractor)
    kept = _cached(source.images, digest, extractor, parts)
    try:  # again, so that it says what it is: an older version may have kept it
        about = _keep(path, _others(path, parts) | kept, source.images, digest, extractor)
    except OSError as error:
        raise DataError(f"Cannot write to {path.parent}: {error}. Set SDDIT_CACHE to a folder that can be.") from error
    return {**about, "path": str(path), "bytes": path.stat().st_size}


# ------------------------------------------------------------------------------------------------------ the noise floor


def noise_floor(source: Source, extractor: Extractor, samples: int) -> dict[str, Any]:
    """FID of `samples` real images, drawn with replacement, against all images of `source`: what a sampler would get
    that is as good as the data, since FID falls with the number of samples.

    The draws depend on nothing but the number of images and of samples. Kept in the cache beside the statistics.
    Memory: one batch, and d² numbers for each draw. Only images that are drawn go through the extractor.

    Returns:
        'mean' and 'sd' over the draws, and 'draws', how many there are.

    Raises:
        UsageError: there are only statistics of the images, or fewer than two samples.
        DataError: images that cannot be read.
    """
    if source.images is None or source.statistics:
        raise UsageError(f"{source.name} does not hold all images of the reference. Draw from a data set or a folder.")
    digest = source.images_digest
    path = _path(digest, extractor)
    path = path.with_name(f"{path.stem}-noise-{samples}.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or torn: compute it
        kept = json.loads(path.read_text())
        if kept["draws"] == DRAWS:
            return {"mean": float(kept["mean"]), "sd": float(kept["sd"]), "draws": DRAWS}
    real = source.load(extractor, ["fid"]).moments
    assert real is not None
    drawn = [np.sort(_draw(i, samples, source.images.count)) for i in range(DRAWS)]
    moments = [Moments(extractor.dim) for _ in drawn]
    for indices, images in _read(source, np.unique(drawn)):
        features = extractor(as_tensor(images)).cpu().numpy()
        for indices_drawn, seen in zip(drawn, moments, strict=True):
            lo, hi = np.searchsorted(indices_drawn, [indices[0], indices[-1] + 1])
            seen.update(features[np.searchsorted(indices, indices_drawn[lo:hi])])
    scores = [frechet_distance(seen.mean, seen.covariance(), *real) for seen in moments]
    floor = {"mean": float(np.mean(scores)), "sd": float(np.std(scores, ddof=1)), "draws": DRAWS}
    try:
        _replace(path, lambda part: part.write_text(json.dumps(floor)))
    except OSError as error:
        log.warning("The noise floor was not kept in %s: %s. Set SDDIT_CACHE to keep it.", path.parent, error)
    return floor


def _draw(draw: int, samples: int, count: int) -> np.ndarray:
    return np.minimum((seeding.uniform(0, "noise-floor", draw, 0, samples) * count).astype(np.int64), count - 1)


def _read(source: Source, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images at `wanted` indices (sorted), batch by batch, each with its indices."""
    assert source.images is not None
    if source.read:
        for lo in range(0, len(wanted), BATCH):
            indices = wanted[lo : lo + BATCH]
            yield indices, source.read(indices)
        return
    first = 0
    for batch in source.images.batches(BATCH):
        indices = wanted[(wanted >= first) & (wanted < first + len(batch))]
        if len(indices):
            yield indices, batch[indices - first]
        first += len(batch)


# ---------------------------------------------------------------------------------------------------------- the cache


def _cached(images: Images, digest: str, extractor: Extractor, parts: set[str]) -> dict[str, np.ndarray]:
    """These parts of the statistics of the images that `digest` stands for: from the cache, or computed and put there.

    Parts that are computed now join those in the file.
    """
    path = _path(digest, extractor)
    try:
        kept = npz_arrays(path, *parts)
    except DataError:  # not there, or torn: compute it
        kept = {}
    if parts - set(kept):
        kept |= _compute(images, extractor, parts - set(kept))
        try:
            _keep(path, _others(path, parts) | kept, images, digest, extractor)
        except OSError as error:  # a full or read-only cache costs time, not the result
            log.warning(
                "Reference statistics were not kept in %s: %s. Set SDDIT_CACHE to keep them.", path.parent, error
            )
    return kept


def _others(path: Path, parts: set[str]) -> dict[str, np.ndarray]:
    """What a file of the cache has beside `parts`."""
    with contextlib.suppress(DataError):
        return npz_arrays(path, *(set(PARTS.values()) - parts))
    return {}


def _path(digest: str, extractor: Extractor) -> Path:
    key = hashlib.sha256(f"{digest}/{extractor.digest}".encode()).hexdigest()[:24]
    return cache_dir() / "reference" / f"{key}.npz"


def _keep(
    path: Path, arrays: Mapping[str, np.ndarray], images: Images, digest: str, extractor: Extractor
) -> dict[str, Any]:
    """Writes a file of the cache in one go. Returns what it says of itself."""
    about = {
        "source": images.name,
        "digest": digest,
        "images": images.count,
        "shape": list(images.shape),
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
        "parts": sorted(arrays),
    }
    _replace(path, lambda part: np.savez(part, about=np.array(json.dumps(about)), **arrays))  # type: ignore[arg-type]
    return about


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of the cache in one go, or leaves it as it was and raises OSError."""
    part = path.with_suffix(f".{os.getpid()}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _compute(images: Images, extractor: Extractor, parts: set[str]) -> dict[str, np.ndarray]:
    """One pass over the images. Memory: d² numbers for each of the moments, and the features of the subset."""
    chosen = subset_indices(images.count)
    moments, spatial = Moments(extractor.dim), Moments(extractor.dims.get("spatial", 0))
    subset: list[np.ndarray] = []
    first = 0
    for batch in images.batches(BATCH):
        rows = chosen[(chosen >= first) & (chosen < first + len(batch))] - first
        first += len(batch)
        if parts == {"subset"}:
            batch, rows = batch[rows], np.arange(len(rows))
        if not len(batch):
            continue
        layers = extractor.layers(as_tensor(batch))
        if "moments" in parts:
            moments.update(layers["features"])
        if "spatial" in parts:
            spatial.update(layers["spatial"])
        if "subset" in parts:
            subset.append(layers["features"].cpu().numpy()[rows])
    found = {"moments": moments.to_array(), "spatial": spatial.to_array()}
    if "subset" in parts:
        found["subset"] = np.concatenate(subset)
    return {part: found[part] for part in parts}


def subset_indices(count: int) -> np.ndarray:
    """Which of `count` images are behind precision, recall and KID: all, or 10,000 by a fixed permutation, in order."""
    if count <= SUBSET:
        return np.arange(count)
    return np.sort(seeding.permuted("reference", np.arange(SUBSET), count))


def as_tensor(images: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.array(images, order="C"))  # a copy: what was read may be read-only


def _reference(arrays: Mapping[str, np.ndarray], digest: str, count: int | None) -> Reference:
    gaussians = {}
    for part in ("moments", "spatial"):
        if part in arrays:
            moments = Moments.from_array(arrays[part])
            gaussians[part] = Gaussian(moments.mean, moments.covariance())
    return Reference(digest, count, gaussians.get("moments"), gaussians.get("spatial"), arrays.get("subset"))


def _gaussian(path: Path, mean: str, covariance: str, arrays: Mapping[str, np.ndarray]) -> Gaussian:
    mu, sigma = arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise DataError(
            f"{path} holds {mean} {mu.shape} and {covariance} {sigma.shape}, but they must be (d,) and (d, d)."
        )
    return Gaussian(mu, sigma)


def _about(path: Path, text: np.ndarray) -> dict[str, Any]:
    try:
        about = json.loads(str(text))
        about["shape"], about["images"], about["digest"], about["extractor"], about["extractor_digest"], about["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what sddit reference built: {error!r}. Build it again.") from error
    return about


def _statistics_digest(moments: Gaussian) -> str:
    return hashlib.sha256(moments.mean.tobytes() + moments.covariance.tobytes()).hexdigest()


def _digest_of(images: Images) -> str:
    """sha256 of the images' values, whatever file they came from."""
    digest = hashlib.sha256(repr(images.shape).encode())
    for batch in images.batches(BATCH):
        digest.update(np.ascontiguousarray(batch).data)
    return digest.hexdigest()
