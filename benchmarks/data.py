"""How fast batches are read in random order, against what the fastest training would need and against plain reads.

ImageNet-256 as latents (mean and std of 4×32×32 in fp16, 16 KiB an image), in shards as `sddit prepare` makes them. The
need is S/2 of each method's at batch 256 on an H100: `sddit.cost`'s FLOPs of a step at 40% of 989 TFLOP/s, the dense
bf16 peak.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sddit import cost, presets, seeding
from sddit.data.manifest import Manifest, VaeInfo, write_manifest
from sddit.data.sampler import BatchSampler
from sddit.data.shards import Shards, write_shard

SHAPE, CLASSES, BATCH = (4, 32, 32), 1000, 256
SHARDS, SHARD = 48, 1024  # 805 MB
BATCHES, ROUNDS = 24, 7
H100 = 0.4 * 989e12  # FLOP/s
VAE = VaeInfo(name="", digest="0" * 64, scaling_factor=0.18215, image_shape=(3, 256, 256))


def make_data(folder: Path) -> Manifest:
    """Latents of noise: reading does not look at them."""
    random = np.random.default_rng(0)
    values = random.integers(0, 2**14, (SHARD, 8, 32, 32), dtype=np.uint16).view(np.float16)  # finite
    labels = np.arange(SHARD) % CLASSES
    lines = [write_shard(values, labels, folder, i, num_classes=CLASSES) for i in range(SHARDS)]
    return write_manifest(folder, lines, name="latents", shape=SHAPE, num_classes=CLASSES, vae=VAE)


def drop(manifest: Manifest) -> None:
    """Takes the shards out of the page cache."""
    for shard in manifest.shards:
        with open(f"{manifest.folder}/{shard.images.file}", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(manifest: Manifest, batches: list[np.ndarray]) -> int:
    """The same rows by one `pread` each, in the order asked for. Returns the bytes."""
    row = 2 * 2 * int(np.prod(SHAPE))
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(f"{manifest.folder}/{shard.images.file}", "rb", buffering=0)).fileno()
            for shard in manifest.shards
        ]
        headers = [shard.images.bytes - SHARD * row for shard in manifest.shards]
        places = (divmod(index, SHARD) for indices in batches for index in indices.tolist())
        return sum(len(os.pread(files[i], row, headers[i] + place * row)) for i, place in places)


def seconds(read: Callable[[], object]) -> float:
    begun = time.perf_counter()
    read()
    return time.perf_counter() - begun


def report() -> list[str]:
    """A section of RESULTS.md."""
    need = {
        method: H100 / cost.training_flops_per_image(presets.imagenet256("S/2", method), SHAPE)
        for method in ("sddit", "dit")
    }
    with tempfile.TemporaryDirectory(dir=".") as name:  # the folder for temporary files may be in memory
        manifest = make_data(Path(name))
        orders = [seeding.permuted(0, np.arange(i * BATCH, (i + 1) * BATCH), manifest.count) for i in range(BATCHES)]
        images = BATCHES * BATCH

        def ours(shards: Shards) -> None:
            for indices in orders:
                shards.read(indices)

        cold: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(ROUNDS):
            drop(manifest)
            cold["ours"].append(images / seconds(lambda: ours(Shards(manifest))))  # mapping and all
            drop(manifest)
            cold["plain"].append(images / seconds(lambda: plain(manifest, orders)))
        shards = Shards(manifest)
        for _ in range(2):
            ours(shards)
        cached = images / min(seconds(lambda: ours(shards)) for _ in range(ROUNDS))  # what disturbs only adds
        cached_plain = images / min(seconds(lambda: plain(manifest, orders)) for _ in range(ROUNDS))
        sampler = BatchSampler(shards, seed=0, batch_size=BATCH)
        drawn = BATCH / min(seconds(functools.partial(sampler.batch, i, 0, BATCH)) for i in range(BATCHES))
    least, most = need.values()
    ratios = [a / b for a, b in zip(*cold.values(), strict=True)]
    return [
        "## Reading batches",
        "",
        f"{manifest.count:,} images of 16 KiB (latents of ImageNet-256, mean and std in fp16) in {SHARDS} shards, "
        f"batches of {BATCH} in random order, one thread. S/2 at 40% of an H100's 989 TFLOP/s needs {least:,.0f} "
        f"(sddit) to {most:,.0f} (dit) images/s.",
        "",
        "| | images/s | | target |",
        "|---|---|---|---|",
        f"| `Shards.read` from the page cache | {cached:,.0f} | {cached / most:.0f} × what dit needs, "
        f"{cached / least:.0f} × what sddit needs | 20 × |",
        f"| plain loop of `pread`, which keeps nothing | {cached_plain:,.0f} | | |",
        f"| `Shards.read` from disk | {statistics.median(cold['ours']):,.0f} | {statistics.median(ratios):.1f} × a "
        f"plain loop of `pread` ({min(ratios):.1f} … {max(ratios):.1f}) | 0.8 × |",
        f"| `BatchSampler.batch`: read and draw from the posterior | {drawn:,.0f} | {drawn / least:.1f} × what sddit "
        "needs, on one of the four threads that make batches for a GPU | |",
    ]
