"""What would make an evaluation fail, found before anything is trained or sampled. Free of torch, for the driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sddit.config import Experiment
from sddit.data import Manifest, open_manifest
from sddit.data.sampler import check_flip, num_trained_on
from sddit.data.subset import check_data, num_used
from sddit.data.vae import check_vae
from sddit.errors import UsageError, did_you_mean
from sddit.metrics.features import check_extractor, check_layers
from sddit.metrics.protocol import METRICS
from sddit.metrics.reference import PARTS, reference_of

FINAL = ("probe", "copying", "denoising", "seeds")
NEED_HELD_OUT = ("probe", "copying", "denoising")


def check_metrics(metrics: Sequence[str], extractor: str, samples: int | None, reference_images: int | None) -> None:
    """Whether so many samples and reference images (None: unknown) are enough, and the extractor gives what is seen.

    Raises:
        UsageError: naming the metric, and what it needs.
    """
    check_names(metrics, METRICS, "metric")
    check_layers(extractor, metrics)
    for metric in metrics:
        needs = METRICS[metric]
        for count, what, remedy in (
            (samples, "samples", "Raise eval.samples, or give more images"),
            (reference_images if metric in PARTS else None, "reference images", "Give a larger reference"),
        ):
            if count is not None and count < needs.images:
                raise UsageError(
                    f"{needs.label} needs at least {needs.images} images; there are {count} {what}. {remedy}: a "
                    "thousand give a usable score."
                )


def check_evaluation(experiment: Experiment, manifest: Manifest) -> None:
    """Whether an experiment can be trained on these data and its evaluations be done: size, classes, decoder,
    extractor, reference, metrics, final diagnostics.

    Raises:
        UsageError: they cannot.
        DataError: `data.test_path` is no data set, or `eval.reference` is nothing.
    """
    options = experiment.eval
    check_data(experiment, manifest)
    check_flip(manifest, experiment.data.flip)
    check_extractor(options.extractor, manifest.image_shape)
    reference = reference_of(experiment, manifest)
    reference.check(options.extractor, options.metrics, manifest.image_shape)
    check_metrics(options.metrics, options.extractor, options.samples, reference.count)
    if manifest.vae:
        check_vae(manifest.vae, experiment.data.vae)
    check_held_out(experiment, manifest)


def check_held_out(experiment: Experiment, manifest: Manifest) -> None:
    """Whether there are held-out images for the final diagnostics that need them. Raises as `check_evaluation`."""
    data = experiment.data
    num_trained_on(num_used(manifest, data), data.hold_out)
    asked = [name for name in experiment.eval.final if name in NEED_HELD_OUT]
    if data.test_path:
        test = open_manifest(data.test_path)
        if (test.shape, test.num_classes) != (manifest.shape, manifest.num_classes):
            raise UsageError(
                f"data.test_path has images {test.shape} (C, H, W) of {test.num_classes} classes, but the data have "
                f"{manifest.shape} of {manifest.num_classes}. Prepare both alike."
            )
    elif asked and not data.hold_out:
        raise UsageError(
            f"{', '.join(asked)} (eval.final) cannot be done without images that were not trained on. Set "
            "data.hold_out to a fraction of the data before training, or data.test_path to a prepared data set."
        )


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Whether all names are known, and there is one.

    Raises:
        UsageError: with the nearest known name.
    """
    names, known = list(names), list(known)
    if not names:
        raise UsageError(f"No {what} is named. {did_you_mean('', known)}")
    for name in names:
        if name not in known:
            raise UsageError(f"Unknown {what} {name!r}. {did_you_mean(name, known)}")
