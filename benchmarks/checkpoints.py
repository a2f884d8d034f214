"""How long training stands still for a checkpoint, against the training between two at the paper's settings.

`CheckpointStore.save` is synchronous: rank 0 writes, all wait. Measured with the whole training state of SD-DiT-S/2, to
a local disk and without a sync, beside `torch.save` and a copy of as many bytes; computed for XL/2, and for a storage
of 1 GB/s, beside which the digest is made, as measured here. Steps take their multiply-adds at 40% of an H100's
989 TFLOP/s. What a GPU needs to hand over the tensors is left out.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.data import CLASSES, H100, SHAPE
from sddit import cost, presets
from sddit.config import Experiment
from sddit.methods import build_method
from sddit.training.state import TrainState
from sddit.training.store import CheckpointStore, _digest, _safetensors

SIZE, ROUNDS = "S/2", 3
SIZES, GPUS = ("S/2", "XL/2"), (1, 8)
NETWORK = 1e9  # bytes/s
TARGET = 0.01


def make_state(experiment: Experiment) -> TrainState:
    """After a step of the optimiser, which then has its moments."""
    state = TrainState.create(experiment, build_method(experiment, SHAPE, CLASSES), torch.device("cpu"))
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return state


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(state: TrainState) -> tuple[int, dict[str, list[float]]]:
    """Bytes of a checkpoint, and seconds of each way to write it, in turn."""
    groups = state.groups()
    times: dict[str, list[float]] = {name: [] for name in ("save", "torch.save", "copy", "digest")}
    with tempfile.TemporaryDirectory(dir=".") as name:  # the folder for temporary files may be in memory
        folder = Path(name)
        store, file = CheckpointStore(folder / "store", keep=1), folder / "state.pt"
        for i in range(ROUNDS + 1):
            times["save"].append(seconds(lambda i=i: store.save(i, groups, {})))  # type: ignore[misc]
            times["torch.save"].append(seconds(lambda: torch.save(groups, file)))
            times["copy"].append(seconds(lambda: shutil.copyfile(file, folder / "copy.pt")))
            times["digest"].append(seconds(lambda: [_digest(*_safetensors(tensors)) for tensors in groups.values()]))
        size = sum(entry["bytes"] for entry in store.checkpoints()[0].files.values())
    return size, {name: found[1:] for name, found in times.items()}  # the first round has cold memory


def between(experiment: Experiment, gpus: int) -> float:
    """Seconds of training from one checkpoint to the next."""
    images = experiment.eval.every * experiment.train.batch_size
    return images * cost.training_flops_per_image(experiment, SHAPE) / (gpus * H100)


def report() -> list[str]:
    """A section of RESULTS.md."""
    size, times = measure(make_state(presets.imagenet256(SIZE, "sddit")))
    median = {name: statistics.median(found) for name, found in times.items()}
    prepared = median["digest"] / size  # seconds a byte

    def against(name: str) -> str:
        ratios = [mine / theirs for mine, theirs in zip(times["save"], times[name], strict=True)]
        return f"{statistics.median(ratios):.1f} × as long ({min(ratios):.1f} … {max(ratios):.1f})"

    rows = []
    for model in SIZES:
        experiment = presets.imagenet256(model, "sddit")
        bytes_ = cost.checkpoint_bytes(experiment, SHAPE, CLASSES)
        stalls = {"this disk": median["save"] * bytes_ / size, "1 GB/s": bytes_ * max(prepared, 1 / NETWORK)}
        for where, stall in stalls.items():
            shares = " | ".join(f"{stall / between(experiment, gpus):.2%}" for gpus in GPUS)
            how = "measured" if (model, where) == (SIZE, "this disk") else "computed"
            rows.append(
                f"| {model} | {bytes_ / 1e9:.2f} GB | {where} | {stall:.1f} s, {how} | {shares} | {TARGET:.0%} |"
            )
    paper = presets.imagenet256(SIZE, "sddit")
    longest = between(presets.imagenet256("XL/2", "sddit"), 1)
    shortest = between(presets.imagenet256("S/2", "sddit"), max(GPUS))
    return [
        "## Checkpoints",
        "",
        f"The whole training state of SD-DiT-{SIZE} ({size / 1e9:.2f} GB), written synchronously to a local disk, page "
        f"cache and all; medians of {ROUNDS} rounds, all ways in turn.",
        "",
        "| | seconds | MB/s | `CheckpointStore.save` takes |",
        "|---|---|---|---|",
        f"| `CheckpointStore.save` | {median['save']:.2f} | {size / median['save'] / 1e6:,.0f} | |",
        f"| the digest, made beside the writing | {median['digest']:.2f} | {size / median['digest'] / 1e6:,.0f} | |",
        f"| `torch.save`, without a digest | {median['torch.save']:.2f} | {size / median['torch.save'] / 1e6:,.0f} "
        f"| {against('torch.save')} |",
        f"| copy of the file | {median['copy']:.2f} | {size / median['copy'] / 1e6:,.0f} | {against('copy')} |",
        "",
        f"Stall against the training between two checkpoints: {paper.eval.every:,} steps of {paper.train.batch_size} "
        f"images, at 40% of an H100's 989 TFLOP/s ({shortest / 60:.0f} min for S/2 on {max(GPUS)} GPUs to "
        f"{longest / 3600:.0f} h for XL/2 on one).",
        "",
        f"| SD-DiT | checkpoint | to | stall | {' | '.join(f'GPUs: {gpus}' for gpus in GPUS)} | target |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
