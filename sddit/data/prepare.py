"""From the files of images to shards: decode, crop, encode, write. Pure functions of one shard; free of Ray.

A shard is made of fixed positions of the source, by one worker, in fixed batches: so its bytes do not depend on who
makes it, when, or beside how many others. What is to be made, and what an earlier run left, is `job.py`'s. Torch is
imported only where images are encoded.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from sddit.data.manifest import Shard
from sddit.data.output import SCRATCH, Output
from sddit.data.shards import write_shard
from sddit.data.sources import Kind, Place, read_images
from sddit.errors import DataError

if TYPE_CHECKING:
    from sddit.data.vae import Vae

Unreadable = list[tuple[int, str, str]]  # position in the shard, name, reason


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(_Frozen):
    """One shard to be made: plain values, all that a worker needs."""

    index: int
    uri: str  # of the source
    kind: Kind
    places: list[Place]
    labels: list[int]
    out: str
    size: int | None  # side of the centre crop; None keeps images as they are
    shape: tuple[int, int, int]  # (C, H, W) of the pixels
    num_classes: int
    vae: str | None  # encode with it
    mirrored: bool


class Report(_Frozen):
    """A shard that is in its place; None where no image of it could be read."""

    index: int
    images: int  # of the source
    shard: Shard | None
    unreadable: Unreadable


def report_name(index: int) -> str:
    """The file of a report in the output."""
    return f"{SCRATCH}/shard-{index:05d}.json"


def make_shards(tasks: Iterable[Task]) -> Generator[Report, None, None]:
    """Makes shards one after the other in this process. Raises as `decode_shard` and `write_task`."""
    return (write_task(task, *decode_shard(task)) for task in tasks)


def decode_shard(task: Task) -> tuple[np.ndarray, Unreadable]:
    """Pixels uint8 (n, C, H, W) of the images that can be read, in their order, and those that cannot.

    Raises:
        DataError: an image of another size where no size is asked for, or a file is gone or broken.
        StorageError: the storage cannot be read.
    """
    pixels = np.empty((len(task.labels), *task.shape), dtype=np.uint8)
    unreadable: Unreadable = []
    for i, (name, content) in enumerate(read_images(task.uri, task.kind, task.places)):
        try:
            image = decode(content, task.size, task.shape[0])
        except ValueError as error:
            unreadable.append((i, name, str(error)))
            continue
        if image.shape != task.shape:
            sizes = ["×".join(map(str, shape[1:])) for shape in (image.shape, task.shape)]
            raise DataError(
                f"{name} is {sizes[0]} (H×W), but the first image is {sizes[1]}. Give --size N: a centre crop brings "
                "all images to N×N."
            )
        pixels[i - len(unreadable)] = image
    return pixels[: len(task.labels) - len(unreadable)], unreadable


def write_task(task: Task, pixels: np.ndarray, unreadable: Unreadable) -> Report:
    """Encodes the pixels if asked for, and writes the shard, its report last. Twice gives the same bytes again.

    Raises:
        StorageError: it cannot be written.
        DataError: latents are not finite in half precision.
    """
    dropped = {i for i, _, _ in unreadable}
    labels = np.array([label for i, label in enumerate(task.labels) if i not in dropped], dtype=np.int64)
    out, shard = Output(task.out), None
    if len(labels):
        images = _encode(task.vae, pixels, task.mirrored) if task.vae else pixels
        with out.staging() as staging:
            shard = write_shard(images, labels, staging, task.index, num_classes=task.num_classes)
    report = Report(index=task.index, images=len(task.labels), shard=shard, unreadable=unreadable)
    out.write(report_name(task.index), report.model_dump_json())
    return report


def decode(content: bytes | np.ndarray | None, size: int | None, channels: int) -> np.ndarray:
    """Pixels uint8 (C, H, W) of a file's bytes, or of pixels (H, W) or (H, W, C); cropped to `size` if given.

    An alpha channel is dropped and the orientation in EXIF is not applied, as in the methods' own loaders.

    Raises:
        ValueError: the reason why it is no such image.
    """
    try:
        if isinstance(content, np.ndarray):
            image = Image.fromarray(content.squeeze(-1) if content.shape[2:] == (1,) else content)
        elif not content:
            raise ValueError("no bytes")
        else:
            image = Image.open(io.BytesIO(content))
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
        image = image.convert("RGB" if channels == 3 else "L")
    except Image.UnidentifiedImageError:
        raise ValueError("no image of a known kind") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's ways to say it
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    if size is not None:
        image = center_crop(image, size)
    values = np.asarray(image)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to `size` pixels a side (`center_crop_arr` of guided-diffusion, methods.md §1.1).

    Halved with a box filter while the short side is 2 · `size` or more, then bicubic until it is `size`, then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _encode(name: str, pixels: np.ndarray, mirrored: bool) -> np.ndarray:
    """On one thread where there is no GPU, since more of them sum in another order."""
    import torch

    vae, threads = _vae(name), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return vae.encode(pixels, mirrored=mirrored)
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _vae(name: str) -> Vae:
    """That of this process, on its GPU if it has one."""
    import torch

    from sddit.data.vae import Vae

    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    return Vae(name, "cuda" if torch.cuda.is_available() else "cpu")
