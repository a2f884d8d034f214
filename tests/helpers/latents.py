"""A small autoencoder with weights made here, and a data set in pixels and in its latents."""

from pathlib import Path

import numpy as np
import torch

from sddit.data import Manifest
from sddit.data.manifest import write_manifest
from sddit.data.shards import write_shard, write_shards
from sddit.data.vae import Vae, encoded

SHAPE = (3, 16, 16)
CLASSES = 4


def write_vae(folder: Path, *, seed: int = 0, **changes) -> Path:
    """Saves an AutoencoderKL of 16×16 colour images to 4×8×8 latents."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(seed)
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.7,
        "mid_block_add_attention": False,
    }
    AutoencoderKL(**(options | changes)).save_pretrained(folder)
    return folder


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour gradients of four kinds: uint8 (n, 3, 16, 16), labels int64 (n,)."""
    labels = np.arange(count) % CLASSES
    y, x = np.mgrid[0:16, 0:16] / 15
    kinds = np.stack([x, y, (x + y) / 2, (x - y + 1) / 2])
    tint = np.random.default_rng(0).uniform(0.2, 1, (count, 3, 1, 1))
    return (255 * kinds[labels][:, None] * tint).astype(np.uint8), labels


def write_both(folder: Path, vae: Path, count: int = 96, *, mirrored: bool = False) -> tuple[Manifest, Manifest]:
    """The pictures as pixels in `folder`/pixels and as latents in `folder`/latents."""
    images, labels = pictures(count)
    pixels = write_shards(images, labels, folder / "pixels", name="pictures", num_classes=CLASSES)
    latents = folder / "latents"
    latents.mkdir()
    info, shape = encoded(str(vae), SHAPE)
    shard = write_shard(Vae(str(vae)).encode(images, mirrored=mirrored), labels, latents, 0, num_classes=CLASSES)
    return pixels, write_manifest(
        latents,
        [shard],
        name="pictures",
        shape=shape,
        num_classes=CLASSES,
        vae=info.model_copy(update={"mirrored": mirrored}),
    )
