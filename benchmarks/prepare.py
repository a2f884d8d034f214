"""How fast `sddit prepare` is on CIFAR-10's size, against a plain loop in one process per core doing the same work.

60,000 JPEGs of 32×32 in parquet, to pixels and to latents. Images per second are those of the steady state: between
the first finished shard of each worker and the last of all; what comes before, Ray's start above all, stands apart.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

COUNT, SIDE, CLASSES = 60_000, 32, 10
BATCH = 32  # as the autoencoder is run
TARGET = 0.8


def make_source(path: Path) -> None:
    """Smooth colour noise as JPEGs in the layout of the Hugging Face hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    distinct = []
    for values in rng.integers(0, 256, (500, 8, 8, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        distinct.append(file.getvalue())
    images = [{"bytes": distinct[i % len(distinct)], "path": f"{i}.jpg"} for i in range(COUNT)]
    table = pa.table({"image": images, "label": np.arange(COUNT) % CLASSES})
    pq.write_table(table, path, row_group_size=1000)


def make_vae(folder: Path) -> None:
    """An AutoencoderKL of the size of one for CIFAR-10 (0.65 M parameters, to 4×8×8), untrained."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    ).save_pretrained(folder)


def plain(share: int, of: int, source: Path, vae: Path | None, out: Path, begin: object, told: object) -> None:
    """What one would write by hand: a part of the rows, decoded, encoded in batches, saved."""
    import pyarrow.parquet as pq
    from PIL import Image

    encode = None
    if vae is not None:
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        torch.set_num_threads(1)
        model = AutoencoderKL.from_pretrained(vae).eval()

        def encode(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                posterior = model.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent_dist
                return torch.cat([posterior.mean, posterior.std], 1).half().numpy()

    begin.wait()  # type: ignore[attr-defined]
    begun, done = time.monotonic(), 0
    with pq.ParquetFile(source) as file:
        for group in range(share, file.num_row_groups, of):
            files = file.read_row_group(group, columns=["image"])["image"].combine_chunks().field("bytes")
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(f.as_py())).convert("RGB")) for f in files])
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
            if encode:
                pixels = np.concatenate([encode(pixels[lo : lo + BATCH]) for lo in range(0, len(pixels), BATCH)])
            np.save(out / f"{group:05d}.npy", pixels)
            done += len(pixels)
    told.put((done, begun, time.monotonic()))  # type: ignore[attr-defined]


def plain_rate(source: Path, vae: Path | None, out: Path) -> float:
    """Images per second of the plain loops together."""
    out.mkdir()
    context, workers = multiprocessing.get_context("spawn"), os.cpu_count() or 1
    begin, told = context.Barrier(workers), context.Queue()
    shared = (workers, source, vae, out, begin, told)
    processes = [context.Process(target=plain, args=(i, *shared)) for i in range(workers)]
    for process in processes:
        process.start()
    ended = [told.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(n for n, _, _ in ended) / (max(end for _, _, end in ended) - min(begun for _, begun, _ in ended))


def memory(pid: int) -> int:
    """Bytes that a process and all below it hold themselves, Ray's shared store counted once."""
    import psutil

    total, shared = 0, 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found = process.memory_full_info()
            total += found.uss
            shared = max(shared, found.shared if "raylet" in process.name() else 0)
        except psutil.Error:
            continue
    return total + shared


def ours(source: Path, vae: Path | None, out: Path) -> tuple[float, float, float, int]:
    """Images per second in the steady state, seconds before it, seconds of the second run, and bytes at most."""
    command = [sys.executable, "-m", "sddit", "prepare", str(source), "--out", str(out)]
    command += ["--vae", str(vae)] if vae else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    begun = time.time()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(2.0):
            most = max(most, memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0]
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    shards = sorted((file.stat().st_mtime, file.name) for file in out.glob("labels-*.npy"))
    sizes = [len(np.load(out / name)) for _, name in shards]
    workers = os.cpu_count() or 1
    rate = sum(sizes[workers:]) / (shards[-1][0] - shards[workers - 1][0])
    again = time.monotonic()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return rate, shards[workers - 1][0] - begun, time.monotonic() - again, most


def report() -> list[str]:
    """A section of RESULTS.md."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, vae = folder / "images.parquet", folder / "vae"
        make_source(source)
        make_vae(vae)
        for what, encoder in (("pixels", None), ("latents", vae)):
            loop = plain_rate(source, encoder, folder / f"plain-{what}")
            rate, start, again, most = ours(source, encoder, folder / what)
            rows.append(
                f"| {what} | {rate:,.0f} | {loop:,.0f} | {rate / loop:.2f} | {TARGET} | {start:.0f} s | {again:.1f} s "
                f"| {most / 1e9:.1f} GB |"
            )
    return [
        "## Preparing data",
        "",
        f"{COUNT:,} JPEGs of {SIDE}×{SIDE} in parquet; latents with an AutoencoderKL as large as CIFAR-10's. Images/s "
        "in the steady state on all cores, against one plain process per core; before it: until each worker has made "
        "its first shard; memory: the most of driver, Ray and workers together.",
        "",
        "| | images/s | plain loop | ratio | target | before it | second run | memory |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
