"""What an experiment is and what it costs, in words, before anything runs. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sddit import cost, presets
from sddit.config import Experiment


def describe(preset: str, size: str, method: str, changes: Mapping[str, Any], shape: cost.Shape, classes: int) -> str:
    """Every field of a preset under `changes` with its value and source, then parameters, FLOPs and memory.

    `shape` is (C, H, W) as the network sees it.
    """
    rows = [
        (field, json.dumps(value), source) for field, value, source in presets.explain(preset, size, method, changes)
    ]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    fields = [f"{field:<{widths[0]}} = {value:<{widths[1]}}  # {source}" for field, value, source in rows]
    experiment = presets.preset(preset)(size, method).replace(changes)
    return "\n".join([*fields, "", *costs(experiment, shape, classes)])


def costs(experiment: Experiment, shape: cost.Shape, classes: int) -> Iterator[str]:
    """Parameters, multiply-adds and memory, a line each."""
    generator, head = cost.num_parameters(experiment, shape, classes)
    forward = cost.forward_cost(experiment, shape)
    train, sample = cost.training_flops_per_image(experiment, shape), cost.sampling_flops_per_image(experiment, shape)
    state, activations = cost.training_bytes(experiment, shape, classes)
    (sampler, steps), workers, options = experiment.solver, experiment.resources.workers, experiment.train
    images = options.micro_batch or options.batch_size // workers

    heads = f", {head:,} in the projection head" if head else ""
    yield f"Parameters       {generator:,} in the generator{heads}"
    without = f", {_giga(forward.without_gradient)} without" if forward.without_gradient else ""
    yield f"Forward passes   {_giga(forward.with_gradient)} multiply-adds with gradient{without}, per image and step"
    yield f"Training         {_giga(train)} FLOPs per image, {_giga(train * options.batch_size)} per step"
    yield f"Sampling         {_giga(sample)} FLOPs per image: {sampler}, {steps} steps"
    yield (
        f"Memory           {_gib(state + activations)} per GPU: {_gib(state)} of parameters, optimiser and averages, "
        f"{_gib(activations)} of activations at {images} images ({options.precision}, {workers} "
        f"worker{'s' if workers > 1 else ''}; train.micro_batch lowers the latter)"
    )
    yield f"Checkpoint       {_gib(cost.checkpoint_bytes(experiment, shape, classes))}"


def _giga(count: float) -> str:
    return f"{count / 1e9:,.2f} G" if count < 1e12 else f"{count / 1e12:,.2f} T"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
