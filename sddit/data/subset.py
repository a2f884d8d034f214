"""Which images of a data set an experiment uses, and whether they can be trained on at all. Free of torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from sddit import seeding
from sddit.config import Data, Experiment
from sddit.data.manifest import Manifest
from sddit.data.shards import Shards
from sddit.errors import DataError, UsageError

_SHOWN = 5  # classes that a message names
_REMEMBERED = 4  # lists of labels or images


def subset(shards: Shards, data: Data) -> np.ndarray | None:
    """The images of `data.max_images` or `data.per_class`, by their indices int64 (k,), ascending; None is all of them.

    Both follow one fixed order of the data, whatever the seed, so a larger subset holds every smaller one. `per_class`
    reads all labels once.

    Raises:
        UsageError: there are not so many.
    """
    count = len(shards)
    chosen = num_used(shards.manifest, data)
    if data.per_class is None:
        return None if chosen == count else np.sort(seeding.permuted("subset", np.arange(chosen), count))
    return _once((shards.manifest.digest, data.per_class), lambda: _first_of_each_class(shards, data.per_class or 0))


def _first_of_each_class(shards: Shards, per_class: int) -> np.ndarray:
    order = seeding.permuted("subset", np.arange(len(shards)), len(shards))
    labels = _labels(shards)[order]
    counts = np.bincount(labels, minlength=shards.manifest.num_classes)
    if (counts < per_class).any():
        raise UsageError(
            f"data.per_class is {per_class:,}, but there are fewer images of {_named(shards.manifest, counts)}. "
            f"Use at most {counts.min():,}."
        )
    by_class = np.argsort(labels, kind="stable")  # places in the fixed order, class by class
    firsts = np.cumsum(counts) - counts
    return np.sort(order[by_class[(firsts[:, None] + np.arange(per_class)).ravel()]])


def num_used(manifest: Manifest, data: Data) -> int:
    """How many images an experiment uses, those that `data.hold_out` sets aside included.

    Raises:
        UsageError: more than there are.
    """
    if data.max_images is not None and data.max_images > manifest.count:
        raise UsageError(
            f"data.max_images is {data.max_images:,}, but {manifest.folder} has {manifest.count:,} images. Use fewer, "
            "or leave it out for all of them."
        )
    if data.per_class is not None:
        return data.per_class * manifest.num_classes
    return data.max_images or manifest.count


def check_data(experiment: Experiment, manifest: Manifest) -> None:
    """Whether an experiment can be trained on these data: they are what was written, of its size, with images of all
    classes, and enough of them.

    Reads the labels once in this process; of data on this machine, all files the first time (`Manifest.verify_once`).

    Raises:
        UsageError: they are of another size, or fewer than asked for.
        DataError: a class has no images, or a file is not what the manifest says.
    """
    data, model, shape = experiment.data, experiment.model, manifest.shape
    if data.shape not in (None, shape):
        raise UsageError(
            f"The data at {manifest.folder} are {_sides(shape)} (C × H × W), but this experiment is for "
            f"{_sides(data.shape)}. Prepare them in that size, choose the preset for theirs, or train on them as they "
            "are with --set data.shape=null."
        )
    if shape[1] % model.patch or shape[2] % model.patch:
        raise UsageError(
            f"model.size {model.size!r} has patches of {model.patch}×{model.patch}, which do not divide the data at "
            f"{manifest.folder}, {_sides(shape)} (C × H × W). Use a patch that divides both sides, e.g. "
            f"'{model.size.partition('/')[0]}/1'."
        )
    shards = Shards(manifest)
    manifest.verify_once()
    labels = _labels(shards)
    counts = np.bincount(labels, minlength=manifest.num_classes)
    if not counts.all():
        raise DataError(
            f"The data at {manifest.folder} have no image of {_named(manifest, counts)}: samples of it would come from "
            "a label that was never trained. Prepare the data again without it, or with its images."
        )
    chosen = subset(shards, data)
    if chosen is not None and not (counts := np.bincount(labels[chosen], minlength=manifest.num_classes)).all():
        warnings.warn(
            f"data.max_images {data.max_images} leaves no image of {_named(manifest, counts)}: samples of it will come "
            "from a label that was never trained. data.per_class takes as many of each.",
            stacklevel=2,
        )


def _labels(shards: Shards) -> np.ndarray:
    """All labels, int64 (n,)."""
    return _once((shards.manifest.digest,), shards.labels)


_made: dict[tuple, np.ndarray] = {}  # what all cells of a sweep share


def _once(key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
    if key not in _made:
        made = make()
        while len(_made) >= _REMEMBERED:
            _made.pop(next(iter(_made)))
        _made[key] = made
    return _made[key]


def _named(manifest: Manifest, counts: np.ndarray) -> str:
    """The classes with the fewest images, for a message."""
    fewest = np.flatnonzero(counts == counts.min())
    names = [f"{c} ({manifest.classes[c]})" if manifest.classes else str(c) for c in fewest[:_SHOWN].tolist()]
    more = f" and {len(fewest) - _SHOWN:,} more" if len(fewest) > _SHOWN else ""
    return f"class{'es' * (len(fewest) > 1)} {', '.join(names)}{more}"


def _sides(shape: tuple[int, int, int] | None) -> str:
    return " × ".join(map(str, shape or ()))
