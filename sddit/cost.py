"""What an experiment costs: multiply-adds, parameters, bytes; with a measured speed, seconds. Free of torch.

Counts follow methods.md §1.5 (matrix products and attention; norms and activations are left out). A pass with gradient
costs three times its forward pass, one without costs one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from sddit.config import Experiment, SDDiT

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ForwardCost:
    """Multiply-adds of one image's passes in a training step, and of one network evaluation while sampling."""

    with_gradient: float
    without_gradient: float
    inference: float


def num_tokens(experiment: Experiment, shape: Shape) -> int:
    """Tokens N of an image: (H / p) (W / p)."""
    return (shape[1] // experiment.model.patch) * (shape[2] // experiment.model.patch)


def visible_tokens(experiment: Experiment, shape: Shape) -> int:
    """Tokens that the student keeps: int(N (1 - M)), truncated in floating point as the published code does."""
    ratio = getattr(experiment.method, "mask_ratio", 0.0)
    return int(num_tokens(experiment, shape) * (1 - ratio))


def block(tokens: float, width: int, condition: int) -> float:
    """Multiply-adds of one adaLN-Zero block."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width * condition


def forward_cost(experiment: Experiment, shape: Shape) -> ForwardCost:
    """Multiply-adds per image of the experiment's method on (C, H, W) inputs."""
    depth, width, _ = experiment.model.dims
    n, patch = num_tokens(experiment, shape), experiment.model.patch
    vector = patch**2 * shape[0]
    embed = n * vector * width + 256 * width + width**2
    method = experiment.method
    if not isinstance(method, SDDiT):
        passes = embed + depth * block(n, width, width) + n * width * vector + 2 * width * width
        return ForwardCost(passes, 0.0, passes)
    dec = experiment.model.decoder_width
    decoder: float = n * width * dec + 2 * width * width + n * dec * vector + 2 * dec * width
    decoder += experiment.model.decoder_depth * block(n, dec, width)
    encoder = {t: embed + depth * block(t + 1, width, width) for t in (n, visible_tokens(experiment, shape))}
    student, full = encoder[visible_tokens(experiment, shape)], encoder[n]
    if not method.lambda_d:
        return ForwardCost(student + decoder, 0.0, full + decoder)
    teacher_tokens = n if method.teacher_tokens == "all" else visible_tokens(experiment, shape)
    head = head_weights(method, width)
    with_gradient = student + decoder + (visible_tokens(experiment, shape) + 1) * head
    return ForwardCost(with_gradient, encoder[teacher_tokens] + (teacher_tokens + 1) * head, full + decoder)


def head_weights(method: SDDiT, width: int) -> int:
    """Matrix entries of the projection head: multiply-adds per token."""
    sizes = [width, *[method.head_hidden] * (method.head_layers - 1), method.head_bottleneck, method.num_prototypes]
    return sum(a * b for a, b in itertools.pairwise(sizes))


def training_flops_per_image(experiment: Experiment, shape: Shape) -> float:
    """FLOPs (two per multiply-add) of one image in one training step."""
    cost = forward_cost(experiment, shape)
    return 2 * (3 * cost.with_gradient + cost.without_gradient)


def sampling_flops_per_image(experiment: Experiment, shape: Shape) -> float:
    """FLOPs of one sample: Heun evaluates the network 2n - 1 times, twice that with guidance."""
    guided = 2 if experiment.eval.guidance != 1 else 1
    return 2 * forward_cost(experiment, shape).inference * (2 * experiment.eval.sampler_steps - 1) * guided


def num_evaluations(experiment: Experiment, from_step: int = 0) -> int:
    """Evaluations left after `from_step`: on multiples of `eval.every` and on the last step."""
    every, steps = experiment.eval.every, experiment.train.steps
    return max(0, -(-steps // every) - from_step // every) if from_step < steps else 0


@dataclass(frozen=True)
class Speed:
    """What one worker was measured to do: seconds per FLOP of training and of sampling and scoring."""

    training: float
    sampling: float

    def seconds(self, experiment: Experiment, shape: Shape, from_step: int = 0) -> float:
        """Predicted seconds of the rest of a cell, on its workers."""
        steps = max(0, experiment.train.steps - from_step)
        train = steps * experiment.train.batch_size * training_flops_per_image(experiment, shape) * self.training
        sample = experiment.eval.samples * sampling_flops_per_image(experiment, shape) * self.sampling
        return (train + num_evaluations(experiment, from_step) * sample) / experiment.resources.workers


def num_parameters(experiment: Experiment, shape: Shape, num_classes: int) -> tuple[int, int]:
    """(generator, head) trainable parameters, in closed form (methods.md §1.4 and §6.3)."""
    depth, d, _ = experiment.model.dims
    vector = experiment.model.patch**2 * shape[0]
    encoder = depth * (18 * d**2 + 15 * d) + (vector * d + d) + (d**2 + 258 * d)
    method = experiment.method
    if not isinstance(method, SDDiT):
        return encoder + (num_classes + 1) * d + (2 * d**2 + 2 * d) + (d * vector + vector), 0
    w = experiment.model.decoder_width
    bridge = 2 * d**2 + 2 * d + d * w + w
    decoder = experiment.model.decoder_depth * (12 * w**2 + 15 * w + 6 * w * d)
    final = 2 * w * d + 2 * w + w * vector + vector
    generator = encoder + num_classes * d + d + bridge + decoder + final
    if not method.lambda_d:
        return generator, 0
    biases = (method.head_layers - 1) * method.head_hidden + method.head_bottleneck
    return generator, (head_weights(method, d) + biases) * (1 if method.head_shared else 2)


def checkpoint_bytes(experiment: Experiment, shape: Shape, num_classes: int) -> int:
    """Bytes of one checkpoint in fp32: parameters, two optimiser moments, sampling EMA, teacher (encoder and head)."""
    generator, head = num_parameters(experiment, shape, num_classes)
    teacher = 0
    if head:
        depth, d, _ = experiment.model.dims
        teacher = depth * (18 * d**2 + 15 * d) + head + num_classes * d
    return 4 * (4 * generator + 3 * head + teacher)


def worker_bytes(experiment: Experiment, shape: Shape, num_classes: int) -> int:
    """Host memory of one worker on a CPU: its process with the libraries, the state, and activations of a batch."""
    per_image = forward_cost(experiment, shape).with_gradient / max(1, experiment.model.dims[1])
    images = experiment.train.micro_batch or experiment.train.batch_size // experiment.resources.workers
    activations = 4 * 4 * per_image / 12 * images
    return int(1.2e9 + 2 * checkpoint_bytes(experiment, shape, num_classes) + activations)
