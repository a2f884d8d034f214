"""The figures of docs/scale.md: what XL/2 costs on 8, 64 and 256 GPUs and a sweep of 200 cells, on paper.

    python -m benchmarks.scale                # print the blocks of figures
    python -m benchmarks.scale --write        # put them into docs/scale.md, between its markers
    python -m benchmarks.scale --measure      # measure this machine anew (some ten minutes), into scale.json
    python -m benchmarks.scale --measure tracking    # one part of it

Counts come from `sddit.cost`, hardware from the assumptions below, the rest from `scale.json`, which
`benchmarks.scale_measured` writes. A test compares the page with what is computed here. Imports no torch.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sddit import cost, presets
from sddit.config import METHOD_CONFIGS, Experiment
from sddit.orchestration.cluster import NESTED_BYTES
from sddit.tracking import SEND_SECONDS

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MEASURED: dict[str, Any] = json.loads(Path(__file__).with_name("scale.json").read_text())
LATENT, CLASSES, IMAGES = (4, 32, 32), 1000, 1_281_167
METHODS, SCALES, BATCH, NODE = tuple(METHOD_CONFIGS), (8, 64, 256), 256, 8
STEPS, EVERY, CELLS, FLEET = 400_000, 50_000, 200, 256  # a run, its evaluations, a sweep, and the GPUs it has
FEATURES, INCEPTION = 2048, 2 * 5.7e9  # width of Inception's features, FLOPs of its forward pass
NESTED_START = 2 * 38.2  # core-seconds of a nested cell's processes: benchmarks/RESULTS.md, on two cores
GRID = (4 * 257, 10 * 257)  # pixels of a recorded grid of 40 samples


@dataclass(frozen=True)
class Hardware:
    """What is assumed; FLOP/s, bytes/s, seconds."""

    bf16: float = 989e12
    fp32: float = 67e12
    mfu: float = 0.35
    fp32_share: float = 0.6
    memory: float = 3.35e12 * 0.8
    nvlink: float = 450e9 * 0.8
    network: float = 50e9 * NODE * 0.75
    cloud: float = 50e9 * NODE * 0.5
    launch: float = 5e-6
    hop: float = 15e-6  # of a collective, times log2 of the GPUs
    host_copy: float = 4e9
    bucket: float = 500e6  # one stream to object storage
    png: float = 1.5  # bytes a pixel
    head_cores: int = 16


HW = Hardware()
ASSUMED = [
    ("GPU", "H100 SXM, 80 GB; 8 a node", "data sheet"),
    ("bf16, dense", f"{HW.bf16 / 1e12:.0f} TFLOP/s", "data sheet"),
    ("fp32 without tensor cores", f"{HW.fp32 / 1e12:.0f} TFLOP/s", "data sheet; nothing here turns TF32 on"),
    ("share of bf16 reached in forward and backward", f"{HW.mfu:.0%}", "{published}"),
    ("share of fp32 reached", f"{HW.fp32_share:.0%}", "a guess"),
    ("memory", "3.35 TB/s, 80% of it reached", "data sheet; the share is a guess"),
    ("NVLink, all-reduce in a node", f"{HW.nvlink / 1e9:.0f} GB/s", "450 GB/s each way, 80% of it"),
    ("network, 400 Gb/s a GPU", f"{HW.network / 1e9:.0f} GB/s a node", "8 × 50 GB/s, 75% of it, all 8 ports in use"),
    ("the same in a cloud, 3.2 Tb/s a node", f"{HW.cloud / 1e9:.0f} GB/s a node", "400 GB/s, 50% of it"),
    ("one operator started by PyTorch", f"{HW.launch * 1e6:.0f} µs", "a guess, without CUDA graphs"),
    ("start of a collective", f"{HW.hop * 1e6:.0f} µs × log₂ GPUs", "a guess"),
    ("GPU to pageable host memory", f"{HW.host_copy / 1e9:.0f} GB/s", "a guess"),
    ("one stream to object storage", f"{HW.bucket / 1e6:.0f} MB/s", "a guess"),
    ("the head node", f"{HW.head_cores} cores", "a guess"),
    ("Inception's forward pass", f"{INCEPTION / 2e9:.1f} G multiply-adds", "its authors"),
    ("a grid of 40 samples as PNG", f"{HW.png} bytes a pixel", "a guess"),
]


def experiment(method: str) -> Experiment:
    """XL/2 at batch 256 in bf16, otherwise as published."""
    return presets.imagenet256("XL/2", method).replace({"train.batch_size": BATCH, "train.precision": "bf16"})


def flops(method: str) -> float:
    """Of a step."""
    return BATCH * cost.training_flops_per_image(experiment(method), LATENT)


def gradient_bytes(method: str) -> int:
    """Of all parameters that are trained, in fp32, as DDP sends them."""
    return 4 * sum(cost.num_parameters(experiment(method), LATENT, CLASSES))


def teacher_parameters(method: str) -> int:
    """Those of a checkpoint that are neither averaged, nor trained, nor AdamW's moments."""
    e = experiment(method)
    generator, head = cost.num_parameters(e, LATENT, CLASSES)
    return cost.checkpoint_bytes(e, LATENT, CLASSES) // 4 - generator - 3 * (generator + head)


def update_bytes(method: str) -> float:
    """Read and written on every GPU in a step whatever its share of the batch: AdamW 7 numbers a parameter, the moving
    average 3, the teacher 3, casts to bf16 and back (4 + 2 bytes, there and back; the teacher's there)."""
    generator, head = cost.num_parameters(experiment(method), LATENT, CLASSES)
    teacher = teacher_parameters(method)
    return 28 * (generator + head) + 12 * generator + 12 * teacher + 12 * (generator + head) + 6 * teacher


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step, by its parts."""

    gpus: int
    compute: float
    launch: float
    update: float
    all_reduce: float
    hidden: float  # of the all-reduce, at most

    @property
    def passes(self) -> float:
        """Forward and backward: bound by arithmetic, or by how fast the host starts operators."""
        return max(self.compute, self.launch)

    @property
    def exposed(self) -> float:
        return self.all_reduce - self.hidden

    @property
    def total(self) -> float:
        return self.passes + self.update + self.exposed


def step(method: str, gpus: int, network: float = HW.network, *, bf16: bool = True) -> Step:
    """On `gpus`, in nodes of eight. The all-reduce can hide behind the backward pass: two thirds of what has a
    gradient; the last bucket cannot."""
    counted = MEASURED["counted"][method]
    rate = HW.bf16 * HW.mfu if bf16 else HW.fp32 * HW.fp32_share
    compute, launch = flops(method) / gpus / rate, counted["operators"] * HW.launch
    forward = cost.forward_cost(experiment(method), LATENT)
    backward = 2 * forward.with_gradient / (3 * forward.with_gradient + forward.without_gradient)
    reduce = ring(gradient_bytes(method), gpus, network) + counted["buckets"] * HW.hop * math.log2(gpus)
    hidden = min(reduce * (1 - 1 / counted["buckets"]), backward * max(compute, launch))
    return Step(gpus, compute, launch, update_bytes(method) / HW.memory, reduce, hidden)


def ring(size: float, gpus: int, network: float) -> float:
    """Seconds of an all-reduce: 2 (p - 1) / p of the bytes pass each GPU; between nodes all ports of a node share
    them, so that the slower of NVLink and network bounds it."""
    return 2 * (gpus - 1) / gpus * size / (HW.nvlink if gpus <= NODE else min(HW.nvlink, network))


def evaluation(method: str, gpus: int, *, bf16: bool = False) -> tuple[float, float]:
    """Seconds of (sampling, decoding and features on all GPUs; the distance, on one core while they wait)."""
    e = experiment(method)
    rate = HW.bf16 * HW.mfu if bf16 else HW.fp32 * HW.fp32_share
    sampling = e.eval.samples * cost.sampling_flops_per_image(e, LATENT) / rate
    scoring = e.eval.samples * (MEASURED["counted"]["vae_decode_flops"] + INCEPTION) / (HW.fp32 * HW.fp32_share)
    return (sampling + scoring) / gpus, MEASURED["statistics_of_samples"]["distance_s"]


def checkpoint_seconds(method: str) -> dict[str, float]:
    """Of one checkpoint to object storage, by its parts, which follow each other."""
    size, host = cost.checkpoint_bytes(experiment(method), LATENT, CLASSES), MEASURED["store"]
    return {
        "copy": size / HW.host_copy,
        "serialise": size / host["serialise_mb_s"] / 1e6,
        "digest": size / host["digest_mb_s"] / 1e6,
        "write": size / HW.bucket,
    }


# ------------------------------------------------------------------------------------------------------------ blocks


def blocks() -> dict[str, list[str]]:
    """The lines of docs/scale.md that hold figures, by the names of their markers."""
    parts = (assumptions, a_step, scaling, arithmetic, methods_at_scale, statistics, checkpoints, data, evaluations,
             sweep, measured, simulated, limits)  # fmt: skip
    return {part.__name__: part() for part in parts}


def assumptions() -> list[str]:
    published = 1024 * cost.training_flops_per_image(presets.imagenet256("XL/2", "maskdit"), LATENT)
    share = published * 2e6 / (260 * 3600) / 8 / 312e12
    basis = f"MaskDiT's authors: 2 M steps of 1,024 images in 260 h on 8 A100 are {share:.0%} of 312 TFLOP/s"
    return grid(["what", "assumed", "from"], ([a, b, c.format(published=basis)] for a, b, c in ASSUMED))


def a_step() -> list[str]:
    rows = []
    for m in METHODS:
        forward = cost.forward_cost(experiment(m), LATENT)
        trained = sum(cost.num_parameters(experiment(m), LATENT, CLASSES))
        rows.append([
            f"`{m}`", f"{forward.with_gradient / 1e9:.1f}", f"{forward.without_gradient / 1e9:.1f}",
            f"{flops(m) / 1e12:.0f}", f"{trained / 1e6:.0f} M", gb(gradient_bytes(m)),
            gb(update_bytes(m)), f"{MEASURED['counted'][m]['operators']:,}",
            gb(cost.checkpoint_bytes(experiment(m), LATENT, CLASSES)),
            gb(sum(cost.training_bytes(experiment(m).replace({"resources.workers": NODE}), LATENT, CLASSES))),
        ])  # fmt: skip
    head = ["XL/2", "G multiply-adds an image, with gradient", "without", "TFLOP a step", "trained", "gradient",
            "update traffic", "operators", "checkpoint", "memory"]  # fmt: skip
    return grid(head, rows)


def scaling() -> list[str]:
    steps = [step("sddit", gpus) for gpus in SCALES]
    cloud = [step("sddit", gpus, HW.cloud) for gpus in SCALES]
    first = steps[0].total
    rows = [
        ["images a GPU", *(f"{BATCH // s.gpus}" for s in steps)],
        ["arithmetic of the passes", *(ms(s.compute) for s in steps)],
        ["starting their operators", *(ms(s.launch) for s in steps)],
        ["optimiser, average, teacher, casts", *(ms(s.update) for s in steps)],
        ["all-reduce of the gradient", *(ms(s.all_reduce) for s in steps)],
        ["of which not hidden", *(ms(s.exposed) for s in steps)],
        ["**step**", *(f"**{ms(s.total)}**" for s in steps)],
        ["step over a cloud's network", *(ms(s.total) for s in cloud)],
        ["against 8 GPUs", *(f"{first / s.total:.1f} × faster" for s in steps)],
        [f"device-hours for {STEPS:,} steps", *(f"{STEPS * s.total * s.gpus / 3600:,.0f}" for s in steps)],
        ["step with `train.precision=fp32`, the default",
         *(ms(step("sddit", s.gpus, bf16=False).total) for s in steps)],
    ]  # fmt: skip
    return grid(["SD-DiT-XL/2, batch 256", *(f"{gpus} GPUs" for gpus in SCALES)], rows)


def arithmetic() -> list[str]:
    f, g, u = flops("sddit"), gradient_bytes("sddit"), update_bytes("sddit")
    counted, few, many = MEASURED["counted"]["sddit"], step("sddit", 8), step("sddit", 64)
    forward = cost.forward_cost(experiment("sddit"), LATENT)
    return [
        f"- FLOPs: 256 × 2 × (3 × {forward.with_gradient / 1e9:.1f} + {forward.without_gradient / 1e9:.1f}) G = "
        f"{f / 1e12:.0f} TFLOP. On 8 GPUs {f / 1e12:.0f} T / 8 / ({HW.mfu:g} × {HW.bf16 / 1e12:.0f} T/s) = "
        f"{ms(few.compute)}.",
        f"- Starting operators: {counted['operators']:,} × {HW.launch * 1e6:.0f} µs = {ms(few.launch)}.",
        f"- Update: {u / 1e9:.1f} GB / {HW.memory / 1e12:.2f} TB/s = {ms(few.update)}, the same on any number of GPUs, "
        "since each holds everything.",
        f"- Gradient: {g / 1e9:.2f} GB. 8 GPUs: 2 × 7/8 × {g / 1e9:.2f} / {HW.nvlink / 1e9:.0f} GB/s = "
        f"{ms(ring(g, 8, HW.network))}; 64 GPUs: 2 × 63/64 × {g / 1e9:.2f} / {HW.network / 1e9:.0f} GB/s = "
        f"{ms(ring(g, 64, HW.network))}. To each come {counted['buckets']} buckets × {HW.hop * 1e6:.0f} µs × log₂ GPUs "
        f"= {ms(few.all_reduce - ring(g, 8, HW.network))} and {ms(many.all_reduce - ring(g, 64, HW.network))}.",
        f"- Hidden behind the backward pass: at most 2 × {forward.with_gradient / 1e9:.1f} of 3 × "
        f"{forward.with_gradient / 1e9:.1f} + {forward.without_gradient / 1e9:.1f}, "
        f"{2 * forward.with_gradient / (3 * forward.with_gradient + forward.without_gradient):.0%} of the passes.",
    ]


def methods_at_scale() -> list[str]:
    rows = [[f"`{m}`", *(f"{ms(step(m, g).total)}; {BATCH / step(m, g).total:,.0f}" for g in SCALES)] for m in METHODS]
    return grid(["step; images a second", *(f"{g} GPUs" for g in SCALES)], rows)


def statistics() -> list[str]:
    k = experiment("sddit").method.num_prototypes  # type: ignore[union-attr]
    n = cost.num_tokens(experiment("sddit"), LATENT)
    centre, positions = 2 * 4 * (k + 1), 4 * (k + 1) * (1 + n)
    rows = [
        ["`centring=ema` (default)", "2", f"{centre / 1e3:.0f} kB"],
        ["`centring=ema`, `centre_per_position`", "2", f"{positions / 1e6:.1f} MB"],
        ["`centring=sinkhorn`, 3 iterations", "8", f"{8 * 4 * k / 1e3:.0f} kB"],
    ]
    return grid(
        ["statistics of the targets", "collectives a step", "bytes a step", *(f"waits, {g} GPUs" for g in SCALES)],
        ([*row, *(f"{int(row[1]) * HW.hop * math.log2(g) * 1e3:.1f} ms" for g in SCALES)] for row in rows),
    )


def checkpoints() -> list[str]:
    e = experiment("sddit")
    generator, head = cost.num_parameters(e, LATENT, CLASSES)
    teacher = teacher_parameters("sddit")
    size, parts = cost.checkpoint_bytes(e, LATENT, CLASSES), checkpoint_seconds("sddit")
    stall, memory = sum(parts.values()), 1 + MEASURED["store"]["extra_memory"]
    lines = [
        f"- Size: 4 × ({generator / 1e6:.0f} M averaged + 3 × {(generator + head) / 1e6:.0f} M parameters and "
        f"moments + {teacher / 1e6:.0f} M teacher) = {gb(size)}.",
        f"- Stall on rank 0, one after the other: copy from the GPU {parts['copy']:.0f} s, serialise "
        f"{parts['serialise']:.0f} s, digest {parts['digest']:.0f} s, write to object storage {parts['write']:.0f} s = "
        f"{stall:.0f} s. All GPUs wait.",
        f"- Host memory on the way: {memory:.1f} × the larger group of tensors, {gb(memory * (size - 4 * generator))}.",
        f"- Resume: every rank reads the whole checkpoint: {gb(NODE * size)} a node, {size * 64 / 1e12:.2f} TB on 64 "
        f"GPUs, {size * 256 / 1e12:.1f} TB on 256.",
        "",
    ]
    rows = [
        [f"evaluated every {every:,} steps", *(f"{stall / (every * step('sddit', g).total):.1%}" for g in SCALES)]
        for every in (EVERY, 5_000)
    ]
    return lines + grid(["stall against training between checkpoints", *(f"{g} GPUs" for g in SCALES)], rows)


def data() -> list[str]:
    image, host = 2 * 2 * math.prod(LATENT), MEASURED["streams"]
    rows = []
    for g in SCALES:
        seconds, mine = step("sddit", g).total, BATCH // g
        rows.append([
            f"{g} GPUs", f"{BATCH / seconds:,.0f}", f"{BATCH / seconds * image / 1e6:.0f} MB/s",
            f"{mine * NODE / seconds * image / 1e6:.1f} MB/s", f"{2 * host[f'normal_{mine}']:.1f} ms",
            f"{2 * host[f'normal_{mine}'] / seconds / 1e3:.1%}",
        ])  # fmt: skip
    one = flops("sddit") / (HW.bf16 * HW.mfu) + step("sddit", 8).update
    rows.append(["1 GPU", f"{BATCH / one:,.0f}", f"{BATCH / one * image / 1e6:.1f} MB/s", "",
                 f"{2 * host['normal_256']:.1f} ms", f"{2 * host['normal_256'] / one / 1e3:.1%}"])  # fmt: skip
    head = ["", "images a second", "read in all", "a node", "noise and posterior of a worker's slice", "of the step"]
    return [
        f"A latent is {image:,} bytes (mean and std, fp16), all of ImageNet {gb(IMAGES * image)}: "
        f"{IMAGES * image / HW.bucket:.0f} s for one stream, once a node, {IMAGES * image * FLEET / NODE / 1e12:.2f} "
        f"TB from the bucket for {FLEET // NODE} nodes. The places of 256 positions in a permutation of {IMAGES:,} "
        f"take {host['permuted_256']:.1f} ms, whatever the worker and the step.",
        "",
        *grid(head, rows),
    ]


def evaluations() -> list[str]:
    rows = []
    for m in METHODS:
        e = experiment(m)
        for bf16 in (False, True):
            cells = []
            for g in SCALES:
                both = sum(evaluation(m, g, bf16=bf16))
                train = EVERY * step(m, g).total
                cells.append(f"{duration(both)}; {both / (both + train):.0%}")
            how = "bf16, if it were" if bf16 else "fp32, as it is"
            rows.append([f"`{m}`, {cost.evaluations(e)} × {e.eval.samples:,}", how, *cells])
    sampled = experiment("sddit").eval.samples * cost.sampling_flops_per_image(experiment("sddit"), LATENT)
    decode = experiment("sddit").eval.samples * MEASURED["counted"]["vae_decode_flops"]
    found = MEASURED["statistics_of_samples"]
    return [
        f"SD-DiT: 50,000 × {cost.evaluations(experiment('sddit'))} × 2 × "
        f"{cost.forward_cost(experiment('sddit'), LATENT).inference / 1e9:.1f} G = {sampled / 1e15:.0f} PFLOP, beside "
        f"{EVERY * flops('sddit') / 1e18:.1f} EFLOP of training between two evaluations; decoding adds "
        f"{decode / 1e15:.0f} PFLOP. In fp32 on 8 GPUs: {sampled / 1e15:.0f} P / 8 / ({HW.fp32_share:g} × "
        f"{HW.fp32 / 1e12:.0f} T/s) = {sampled / 8 / HW.fp32 / HW.fp32_share:,.0f} s. The distance takes "
        f"{found['distance_s']:.0f} s of one core, while all wait; moments of a batch of 128 take "
        f"{found['update_128_ms']:.0f} ms of each worker's core.",
        "",
        *grid(["evaluations × samples", "precision of sampling",
               *(f"{g} GPUs: time; share" for g in SCALES)], rows),
    ]  # fmt: skip


def sweep() -> list[str]:
    """200 cells of XL/2 by eight workers: on the fleet, and all at once."""
    server, keys = MEASURED["tracking"], 8
    each = step("sddit", NODE).total
    period = max(SEND_SECONDS, 100 * each)  # train.log_every
    seconds = STEPS * each + STEPS // EVERY * (
        sum(evaluation("sddit", NODE)) + sum(checkpoint_seconds("sddit").values())
    )
    size = cost.checkpoint_bytes(experiment("sddit"), LATENT, CLASSES)
    points = CELLS * (STEPS // 100 * keys + STEPS // EVERY * 4)

    def row(name: str, value: Callable[[int], str]) -> list[str]:
        return [name, *(value(cells) for cells in (FLEET // NODE, CELLS))]

    rows = [
        row("GPUs", lambda cells: f"{cells * NODE:,}"),
        row(f"wall time, {STEPS:,} steps and {STEPS // EVERY} evaluations each",
            lambda cells: duration(-(-CELLS // cells) * seconds)),
        row("reports to the server a second", lambda cells: f"{cells / period:.1f}"),
        row("of what it takes here", lambda cells: f"{cells / period / server['reports_per_s']:.0%}"),
        row("head's memory, 1.3 … 3.3 GB a nested cell", lambda cells: f"{cells * 1.3:.0f} … {cells * 3.3:.0f} GB"),
        row("head's memory as the code counts it", lambda cells: gb(cells * NESTED_BYTES)),
        row("until the head has started all", lambda cells: duration(cells * NESTED_START / HW.head_cores)),
        row("second checkpoints, while cells run", lambda cells: gb(cells * size)),
    ]  # fmt: skip
    grids = CELLS * (STEPS // EVERY + 1) * HW.png * math.prod(GRID)
    database = points * server["bytes_a_point"]
    return [
        *grid(["200 cells, 8 workers each", f"{FLEET // NODE} at once", f"{CELLS} at once"], rows),
        "",
        f"- Device-hours: {CELLS} × 8 × {seconds / 3600:.1f} h = {CELLS * 8 * seconds / 3600:,.0f}.",
        f"- Checkpoints of done cells: {CELLS} × {gb(size)} = {CELLS * size / 1e12:.1f} TB; slimmed to sampling "
        f"weights {CELLS * 4 * cost.num_parameters(experiment('sddit'), LATENT, CLASSES)[0] / 1e12:.2f} TB.",
        f"- Points: {CELLS} × ({STEPS // 100:,} × {keys} + {STEPS // EVERY} × 4) = {points / 1e6:.1f} M, "
        f"{server['bytes_a_point']:.0f} bytes each = {gb(database)} of sqlite; copied to a bucket every minute "
        f"{database / 60 / 1e6:.0f} MB/s.",
        f"- A nested cell's start: at most {NESTED_START:.0f} s of a core (38.2 s on two, benchmarks/RESULTS.md).",
        f"- Grids: {CELLS} × {STEPS // EVERY + 1} × {HW.png * math.prod(GRID) / 1e6:.1f} MB = {gb(grids)}.",
        f"- Starting: {CELLS} × {server['start_cell_ms']:.0f} ms of requests, one after the other in Tune's loop.",
        f"- The live table of {CELLS} rows: {MEASURED['table']['ms']:.0f} ms, twice a second: "
        f"{2 * MEASURED['table']['ms'] / 1e3:.0%} of a core.",
        f"- With `--max-disk-gb` every end of a cell lists every cell's folder: {CELLS} × {CELLS} = {CELLS**2:,} "
        "listings of a bucket.",
    ]  # fmt: skip


def measured() -> list[str]:
    server, host = MEASURED["tracking"], MEASURED["store"]
    rows = [
        ["one report of 16 points (whose sweep is it, write)", f"{server['report_ms']:.0f} ms"],
        ["reports a second, eight writers that wait for nothing else", f"{server['reports_per_s']:.0f}"],
        [f"reading the steps of {CELLS} cells, one request", f"{server['read_steps_ms']:.0f} ms"],
        ["checkpoint: serialise, digest, both and written to this disk",
         ", ".join(f"{host[f'{k}_mb_s']:.0f} MB/s" for k in ("serialise", "digest", "save"))],
        ["checkpoint read, digest checked", f"{host['load_mb_s']:.0f} MB/s"],
        ["noise of 256, 32, 4, 1 images of 4×32×32",
         ", ".join(f"{MEASURED['streams'][f'normal_{n}']:.2f} ms" for n in (256, 32, 4, 1))],
    ]  # fmt: skip
    return [f"On {MEASURED['machine']}, {MEASURED['date']}, other work beside it.", "", *grid(["", "measured"], rows)]


def simulated() -> list[str]:
    """Cells without their training against a real server."""
    rows = [
        [f"{t['cells']}", f"{t['cells'] / t['period_s']:.0f}", f"{t['put']:,.0f}; {t['stored']:,.0f}",
         f"{t['failed_reports']:.0f}; {t['failed_reads']:.0f}", f"{t['waited_s']:.0f} s", f"{t['round_s']:.1f} s"]
        for t in MEASURED["tracking"]["together"]
    ]  # fmt: skip
    first = MEASURED["tracking"]["together"][0]
    head = ["cells", "reports a second", "points put; stored in the end",
            "reports and reads without answer in 10 s", "longest wait of a point", "a round of the table"]  # fmt: skip
    return [
        f"Each cell reports every {first['period_s']:.0f} s for {first['seconds']:.0f} s, and has as long again "
        "until its last point must be stored.",
        "",
        *grid(head, rows),
    ]


def limits() -> list[str]:
    few, mid, many = (step("sddit", g) for g in SCALES)
    sampling, _ = evaluation("sddit", 8)
    slow = step("sddit", 8, bf16=False)
    server, tally = MEASURED["tracking"], MEASURED["statistics_of_samples"]["bytes"]
    cells, period = FLEET // NODE, max(SEND_SECONDS, 100 * few.total)  # train.log_every
    return [
        f"- **8 GPUs: precision.** fp32, the presets' default, takes {ms(slow.total)} a step where bf16 takes "
        f"{ms(few.total)}; and sampling is fp32 whatever `train.precision` says: {duration(sampling)} an evaluation of "
        f"50,000 samples, against {duration(EVERY * few.total)} of training between two.",
        f"- **64 GPUs: the step itself.** {ms(mid.compute)} of arithmetic stand beside {ms(mid.launch)} of starting "
        f"operators, {ms(mid.update)} of updates and {ms(mid.all_reduce)} of all-reduce: eight times the GPUs are "
        f"{few.total / mid.total:.1f} × as fast.",
        f"- **256 GPUs: the same, and nothing is left to gain.** {ms(many.compute)} of arithmetic in a step of "
        f"{ms(many.total)}: {mid.total / many.total:.2f} × as fast as 64 GPUs for four times the money. Rank 0 also "
        f"takes {gb(256 * tally)} of moments at each evaluation, twice for a moment.",
        f"- **A sweep of 200 cells, 32 at once: the head's memory.** {cells * 1.3:.0f} to {cells * 3.3:.0f} GB for the "
        f"helpers of nested cells, which no check counts there. The server has {cells / period:.1f} reports a second, "
        f"{cells / period / server['reports_per_s']:.0%} of what it takes here.",
        f"- **All 200 at once: the same, {CELLS * 1.3:.0f} to {CELLS * 3.3:.0f} GB.** {CELLS / period:.0f} reports a "
        f"second are {CELLS / period / server['reports_per_s']:.0%} of what the server takes here; with the cells' "
        f"processes on the same two cores a point waited for up to {server['together'][-1]['waited_s']:.0f} s.",
    ]


# ------------------------------------------------------------------------------------------------------------- words


def grid(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def gb(size: float) -> str:
    if size >= 1e12:
        return f"{size / 1e12:.1f} TB"
    return f"{size / 1e9:.0f} GB" if size >= 1e11 else f"{size / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def filled(page: str) -> str:
    """The page with each block between its markers as it is computed now."""
    for name, lines in blocks().items():
        before, marker, after = page.partition(f"<!-- {name} -->\n")
        _, end, rest = after.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"{PAGE} has no block {name!r}.")
        page = before + marker + "".join(f"{line}\n" for line in lines) + end + rest
    return page


def main() -> None:
    if "--measure" in sys.argv:
        from benchmarks.scale_measured import measure

        found = MEASURED | measure([word for word in sys.argv[1:] if word != "--measure"])
        Path(__file__).with_name("scale.json").write_text(json.dumps(found, indent=1) + "\n")
    elif "--write" in sys.argv:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print("\n\n".join(f"{name}\n" + "\n".join(lines) for name, lines in blocks().items()))


if __name__ == "__main__":
    main()
