"""How fast samples are scored, against torch-fidelity's own way, and in how much memory.

Features of the same PNGs by the same Inception (its weights as initialised), from the files to the moments: ours as
`sddit evaluate` does it, torch-fidelity's as its command `fidelity --fid` does it, in turn. FID from moments of 2,048
features; precision and recall of 50,000 samples against 10,000 images in a process of its own.
"""

from __future__ import annotations

import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

IMAGES, SIDE, BATCH, ROUNDS = 64, 32, 32, 3
DIM = 2048
SAMPLES, REAL = 50_000, 10_000
LIMIT, SHARE = 30, 4  # seconds for all rows; where they do not suffice, the time is that of one in four, times 16
GIB = 2**30


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------- extraction


def make_weights(path: Path) -> None:
    """Of Inception as it is initialised, in the form in which torch-fidelity expects them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **options: object) -> None:  # type: ignore[override]
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    torch.save(Blank("blank", [str(DIM)], feature_extractor_weights_path=empty).state_dict(), path)


def make_images(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    for i, values in enumerate(pixels):
        Image.fromarray(values).save(folder / f"{i:05d}.png")


def extraction() -> list[str]:
    """The row of feature extraction."""
    from torch_fidelity.metric_fid import fid_featuresdict_to_statistics
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    from sddit.metrics.features import INCEPTION, TORCH_FIDELITY, get_extractor
    from sddit.metrics.fidelity import Tally
    from sddit.metrics.images import open_images
    from sddit.metrics.reference import as_tensor

    cuda = torch.cuda.is_available()
    before = os.environ.get("SDDIT_CACHE")
    with tempfile.TemporaryDirectory() as name:
        os.environ["SDDIT_CACHE"] = name
        try:
            weights, images = TORCH_FIDELITY[INCEPTION].path, Path(name) / "images"
            weights.parent.mkdir()
            make_weights(weights)
            make_images(images)
            extractor = get_extractor(INCEPTION, "cuda" if cuda else "cpu")
            options = {"cuda": cuda, "verbose": False, "batch_size": BATCH}
            network = create_feature_extractor(
                INCEPTION, [str(DIM)], feature_extractor_weights_path=str(weights), **options
            )

            def ours() -> np.ndarray:
                tally, first = Tally(extractor, ("fid",)), 0
                for batch in open_images(images).batches(BATCH):
                    tally.update(as_tensor(batch), first)
                    first += len(batch)
                assert tally.moments is not None
                return tally.moments.mean

            def theirs() -> np.ndarray:
                features = extract_featuresdict_from_input_id(1, network, input1=str(images), **options)
                return fid_featuresdict_to_statistics(features, str(DIM))["mu"]

            if not np.allclose(ours(), theirs(), rtol=1e-3, atol=1e-4):  # and warm
                raise SystemExit("Our features and torch-fidelity's differ.")
            times = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
        finally:
            os.environ.pop("SDDIT_CACHE") if before is None else os.environ.update(SDDIT_CACHE=before)
    mine, other = (IMAGES / statistics.median(column) for column in zip(*times, strict=True))
    ratios = [b / a for a, b in times]
    return [
        f"| features of {IMAGES} PNGs of {SIDE}×{SIDE}, batches of {BATCH} | {mine:.1f} images/s; torch-fidelity "
        f"{other:.1f}; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}) | 1 |"
    ]


# ------------------------------------------------------------------------------------------------------------ distances


def fid() -> list[str]:
    """The row of FID."""
    from sddit.metrics.statistics import Moments, frechet_distance

    rng = np.random.default_rng(0)
    pair = [Moments(), Moments()]
    for moments in pair:
        moments.update(rng.standard_normal((2 * DIM, DIM), dtype=np.float32))
    statistics_ = [(moments.mean, moments.covariance()) for moments in pair]
    frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))  # what is imported when it is needed, is
    taken = seconds(lambda: frechet_distance(*statistics_[0], *statistics_[1]))
    return [f"| FID from moments at {DIM:,} dimensions | {taken:.1f} s | 1 s |"]


def status(name: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM); getrusage would count its parent's as well."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def neighbours(share: int, limit: float) -> None:
    """Precision and recall with one in `share` rows, ended after `limit` seconds. Prints the seconds (inf where it was
    ended), and bytes of memory: before it, with the features, and at most."""
    from sddit.metrics.statistics import precision_and_recall

    torch.manual_seed(0)
    samples, real = torch.randn(SAMPLES // share, DIM), torch.randn(REAL // share, DIM)
    precision_and_recall(samples[:100], real[:100])  # what is imported when it is needed, is
    before = status("VmRSS")

    def tell(taken: float) -> None:
        print(taken, before, status("VmHWM"), flush=True)
        os._exit(0)  # whatever the other thread does

    timer = threading.Timer(limit, tell, [math.inf])
    timer.start()
    taken = seconds(lambda: precision_and_recall(samples, real))
    timer.cancel()
    tell(taken)


def neighbours_of(share: int, limit: float = 600) -> tuple[float, int, int]:
    """What `neighbours` prints, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scoring", str(share), str(limit)]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(said[-3]), int(said[-2]), int(said[-1])


def precision_and_recall_rows() -> list[str]:
    """The rows of precision and recall."""
    taken, before, most = neighbours_of(1, LIMIT)
    features = 4 * DIM * (SAMPLES + REAL)
    in_time = math.isfinite(taken)
    when = "" if in_time else f", in its first {LIMIT} s, which see its largest blocks"
    time_ = (
        f"{taken:.0f} s"
        if in_time
        else f"{neighbours_of(SHARE)[0] * SHARE**2:.0f} s, computed from 1/{SHARE} of the rows"
    )
    what = f"precision and recall, {SAMPLES:,} × {REAL:,}"
    return [
        f"| {what}: memory with the features ({features / GIB:.2f} GiB) "
        f"| {(most - before + features) / GIB:.2f} GiB{when}; {most / GIB:.2f} GiB with process and libraries "
        "| 2 GiB |",
        f"| {what}: time | {time_} | |",
    ]


def report() -> list[str]:
    """A section of RESULTS.md."""
    return [
        "## Scoring",
        "",
        f"{torch.get_num_threads()} threads. Inception with weights as initialised; from the files to FID's moments, "
        f"median (least … most) of {ROUNDS} rounds, both in turn.",
        "",
        "| | measured | target |",
        "|---|---|---|",
        *extraction(),
        *fid(),
        *precision_and_recall_rows(),
    ]


if __name__ == "__main__":
    neighbours(int(sys.argv[1]), float(sys.argv[2]))
