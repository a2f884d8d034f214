"""What an experiment costs: multiply-adds, parameters, bytes; with a measured speed, seconds. Free of torch.

Counts follow methods.md §1.5 (matrix products and attention; norms and activations are left out). A pass with gradient
costs three times its forward pass, one without costs one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from sddit.config import MDT, DiT, Experiment, MaskDiT, SDDiT

Shape = tuple[int, int, int]


SAVED_PER_TOKEN = 20  # widths that one block keeps of each token for its backward pass, with fused attention


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
    """Tokens that the student keeps: int(N (1 - M)), truncated in floating point as the published code does.

    Of a mask ratio that is drawn in a range, its middle; of one that follows a schedule, its start.
    """
    low = getattr(experiment.method, "mask_ratio", 0.0)
    high = getattr(experiment.method, "mask_ratio_max", None)
    return int(num_tokens(experiment, shape) * (1 - (low if high is None else (low + high) / 2)))


def block(tokens: float, width: int, condition: int) -> float:
    """Multiply-adds of one adaLN-Zero block."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width * condition


def modulated_linear(tokens: float, width: int, out: int, condition: int) -> float:
    """Multiply-adds of the final layer, or of the bridge."""
    return tokens * width * out + 2 * width * condition


def forward_cost(experiment: Experiment, shape: Shape) -> ForwardCost:
    """Multiply-adds per image of the experiment's method on (C, H, W) inputs."""
    depth, width, _ = experiment.model.dims
    n, k, method = num_tokens(experiment, shape), visible_tokens(experiment, shape), experiment.method
    vector = experiment.model.patch**2 * shape[0]
    outputs = vector * experiment.diffusion.outputs
    embed = n * vector * width + 256 * width + width**2

    if isinstance(method, DiT):
        passes = embed + depth * block(n, width, width) + modulated_linear(n, width, outputs, width)
        return ForwardCost(passes, 0.0, passes)

    if isinstance(method, MDT):
        halves = (depth - method.decoder_layers) // 2 if method.version == "v2" else 0
        encoder_blocks = 2 * halves if method.version == "v2" else depth - method.decoder_layers
        join = 2 * width**2 * (method.version == "v2")  # per token of a block that is joined with another input
        decoder = method.decoder_layers * (block(n, width, width) + n * join)
        decoder += modulated_linear(n, width, outputs, width)
        full, masked = (embed + encoder_blocks * block(t, width, width) + halves * t * join + decoder for t in (n, k))
        return ForwardCost(full + masked + block(n, width, width), 0.0, full)

    parts = _decoder_parts(experiment)
    depth, dec = parts.encoder_blocks, parts.width

    def decoder_cost(slots: int, crossing: int) -> float:
        bridge = modulated_linear(crossing, width, dec, width) if parts.bridge else 0
        cost = bridge + parts.blocks * block(slots, dec, width)
        return cost + modulated_linear(slots, dec, outputs, width) + parts.cls_embed * width**2

    def encoder_cost(tokens: int) -> float:
        return embed + depth * block(tokens, width, width)

    if isinstance(method, MaskDiT):
        return ForwardCost(encoder_cost(k) + decoder_cost(n, k), 0.0, encoder_cost(n) + decoder_cost(n, n))

    extra = int(method.cls_in_decoder == "forwarded")
    slots = k if method.masked_slots == "nothing" else n
    crossing = n if method.masked_slots == "noisy" else k
    inference = encoder_cost(n + method.cls_at_inference) + decoder_cost(n + extra, n + extra)
    student = encoder_cost(k + 1) + decoder_cost(slots + extra, crossing + extra)
    if not method.discriminates:
        return ForwardCost(student, 0.0, inference)
    head, seen = head_weights(method, width), n if method.teacher_tokens == "all" else k
    return ForwardCost(student + (k + 1) * head, encoder_cost(seen + 1) + (seen + 1) * head, inference)


@dataclass(frozen=True)
class _DecoderParts:
    """What stands behind the encoder of MaskDiT and SD-DiT."""

    encoder_blocks: int
    blocks: int
    width: int
    bridge: bool
    cls_embed: bool


def _decoder_parts(experiment: Experiment) -> _DecoderParts:
    model, method, (depth, width, _) = experiment.model, experiment.method, experiment.model.dims
    kind = method.decoder if isinstance(method, SDDiT) else "light"
    embedded = isinstance(method, SDDiT) and method.cls_in_decoder == "embedded"
    if isinstance(method, SDDiT) and kind == "last_blocks":
        last = model.last_blocks(method.last_blocks)
        return _DecoderParts(depth - last, last, width, False, embedded)
    dec = width if kind == "wide" else model.decoder_width
    return _DecoderParts(depth, model.decoder_depth, dec, True, embedded)


def head_weights(method: SDDiT, width: int) -> int:
    """Matrix entries of the projection head: multiply-adds per token."""
    sizes = [width, *[method.head_hidden] * (method.head_layers - 1), method.head_bottleneck, method.num_prototypes]
    return sum(a * b for a, b in itertools.pairwise(sizes))


def training_flops_per_image(experiment: Experiment, shape: Shape) -> float:
    """FLOPs (two per multiply-add) of one image in one training step."""
    cost = forward_cost(experiment, shape)
    return 2 * (3 * cost.with_gradient + cost.without_gradient)


def sampling_flops_per_image(experiment: Experiment, shape: Shape) -> float:
    """FLOPs of one sample."""
    return 2 * forward_cost(experiment, shape).inference * evaluations(experiment)


def evaluations(experiment: Experiment) -> int:
    """Network evaluations of one sample: Heun's 2n - 1, the others' n; twice that with guidance."""
    sampler, steps = experiment.solver
    guided = 2 if experiment.eval.guidance != 1 else 1
    return guided * (2 * steps - 1 if sampler == "heun" else steps)


def num_evaluations(experiment: Experiment, from_step: int = 0) -> int:
    """Evaluations left after `from_step`: on multiples of `eval.every` and on the last step, where other evaluation
    seeds may be asked for too."""
    every, steps = experiment.eval.every, experiment.train.steps
    if from_step >= steps:
        return 0
    more = experiment.eval.final_seeds - 1 if "seeds" in experiment.eval.final else 0
    return -(-steps // every) - from_step // every + more


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
    depth, d, heads = experiment.model.dims
    n, method = num_tokens(experiment, shape), experiment.method
    vector = experiment.model.patch**2 * shape[0]
    outputs = vector * experiment.diffusion.outputs
    block_size, embedders = _block_parameters(d), _embedder_parameters(vector, d)
    final = (2 * d**2 + 2 * d) + (d * outputs + outputs)

    if isinstance(method, DiT):
        return embedders + depth * block_size + (num_classes + 1) * d + final, 0

    if isinstance(method, MDT):
        halves = (depth - method.decoder_layers) // 2
        joined = halves + method.decoder_layers if method.version == "v2" else 0
        blocks = 1 + (2 * halves + method.decoder_layers if method.version == "v2" else depth)
        rows, columns = (side // experiment.model.patch for side in shape[1:])
        table = ((2 * rows - 1) * (2 * columns - 1) + 3) * heads
        positions_and_token = 2 * n * d + d
        generator = embedders + blocks * (block_size + table) + joined * (2 * d**2 + d)
        return generator + (num_classes + 1) * d + final + positions_and_token, 0

    parts = _decoder_parts(experiment)
    w = parts.width
    generator = embedders + parts.encoder_blocks * block_size + num_classes * d
    generator += (2 * d**2 + 2 * d + d * w + w) * parts.bridge + (d**2 + d) * parts.cls_embed
    generator += parts.blocks * (12 * w**2 + 15 * w + 6 * w * d) + (2 * w * d + 2 * w) + (w * outputs + outputs)
    if isinstance(method, MaskDiT):
        return generator + w * (method.lambda_mae > 0), 0
    generator += d  # [CLS]
    if not method.discriminates:
        return generator, 0
    biases = (method.head_layers - 1) * method.head_hidden + method.head_bottleneck
    return generator, (head_weights(method, d) + biases) * (1 if method.head_shared else 2)


def checkpoint_bytes(experiment: Experiment, shape: Shape, num_classes: int) -> int:
    """Bytes of one checkpoint in fp32: parameters, optimiser moments, sampling EMA, teacher (encoder and head)."""
    generator, head = num_parameters(experiment, shape, num_classes)
    return 4 * (
        generator + (1 + _moments(experiment)) * (generator + head) + _teacher(experiment, shape, head, num_classes)
    )


def training_bytes(experiment: Experiment, shape: Shape, num_classes: int) -> tuple[int, int]:
    """(state, activations) of one worker's device in a training step: what must fit beside the library's own.

    State: parameters, gradients, optimiser moments, sampling EMA and teacher in fp32. Activations: what the backward
    pass keeps, in fp32 or half of it under bf16, with fused attention; within a fifth of what was measured on a CPU.
    """
    generator, head = num_parameters(experiment, shape, num_classes)
    trained = (2 + _moments(experiment)) * (generator + head)
    state = 4 * (trained + generator + _teacher(experiment, shape, head, num_classes))
    images = experiment.train.micro_batch or experiment.train.batch_size // experiment.resources.workers
    number = 2 if experiment.train.precision == "bf16" else 4
    return state, int(images * number * saved_numbers(experiment, shape))


def saved_numbers(experiment: Experiment, shape: Shape) -> float:
    """Numbers that autograd keeps of one image's passes with gradient."""
    depth, width, heads = experiment.model.dims
    n, k, method = num_tokens(experiment, shape), visible_tokens(experiment, shape), experiment.method
    per_token = SAVED_PER_TOKEN * width
    if isinstance(method, DiT):
        return depth * n * per_token
    if isinstance(method, MDT):
        encoder_blocks = depth - method.decoder_layers
        both = n * depth + k * encoder_blocks + n * (method.decoder_layers + 1)
        bias = heads * k * k * encoder_blocks  # each image has its own in the masked pass
        return both * per_token + bias
    parts = _decoder_parts(experiment)
    slots = k if isinstance(method, SDDiT) and method.masked_slots == "nothing" else n
    saved = parts.encoder_blocks * k * per_token + parts.blocks * slots * SAVED_PER_TOKEN * parts.width
    if isinstance(method, SDDiT) and method.discriminates:
        saved += (k + 1) * (2 * method.head_hidden * (method.head_layers - 1) + 2 * method.num_prototypes)
    return saved


def worker_bytes(experiment: Experiment, shape: Shape, num_classes: int) -> int:
    """Host memory of one worker on a CPU: its process with the libraries, the state, and activations of a batch."""
    state, activations = training_bytes(experiment, shape, num_classes)
    return int(1.2e9) + state + activations


def _moments(experiment: Experiment) -> int:
    """Numbers that the optimiser keeps of each parameter."""
    return {"adamw": 2, "adan": 4}[experiment.train.optimizer]


def _teacher(experiment: Experiment, shape: Shape, head: int, num_classes: int) -> int:
    """Parameters of SD-DiT's teacher: encoder with embedders and [CLS], and head."""
    if not head:
        return 0
    d, vector = experiment.model.dims[1], experiment.model.patch**2 * shape[0]
    blocks = _decoder_parts(experiment).encoder_blocks * _block_parameters(d)
    return blocks + _embedder_parameters(vector, d) + num_classes * d + d + head


def _block_parameters(width: int) -> int:
    """Of an adaLN-Zero block of the encoder."""
    return 18 * width**2 + 15 * width


def _embedder_parameters(vector: int, width: int) -> int:
    """Of patch and time embedder."""
    return (vector * width + width) + (width**2 + 258 * width)
