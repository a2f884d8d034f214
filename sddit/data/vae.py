"""The autoencoder between pixels and latents: a diffusers AutoencoderKL, found, checked and run.

Finding and checking are free of torch. Conventions (methods.md §1.1): the encoder sees [-1, 1]; the network sees
x = scaling_factor · (z − shift_factor), z drawn from the posterior.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sddit.data.manifest import VaeInfo
from sddit.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", WEIGHTS)
PART = 32  # images at once: part of what latents are, since sums depend on it, and a bound on memory


def find_vae(name: str) -> Path:
    """The folder of an AutoencoderKL: `name` itself, or that of the Hugging Face hub's cache, fetched if need be.

    Raises:
        UsageError: it is not there, with the command that fetches it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        for file in FILES:
            if not (folder / file).is_file():
                raise UsageError(
                    f"{folder} is not a diffusers AutoencoderKL: it has no {file}. Save one with save_pretrained (in "
                    "safetensors, which is the default)."
                )
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = [Path(hf_hub_download(name, file)) for file in FILES]
    except HFValidationError:
        raise UsageError(f"There is no folder {name}. Give that of a diffusers AutoencoderKL, or its name on the hub, "
                         "as in stabilityai/sd-vae-ft-ema.") from None  # fmt: skip
    except Exception as error:  # whatever the network says
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"The autoencoder {name} is neither a folder nor in the cache of the Hugging Face hub, and cannot be "
            f"fetched ({reason}). Where there is internet: hf download {name} config.json {WEIGHTS} --local-dir "
            f"{name.rpartition('/')[2]}; then copy that folder here and give its path."
        ) from None
    return found[0].parent


def read_vae(name: str) -> tuple[dict[str, Any], str]:
    """Configuration and digest of an autoencoder; the digest is that of its weights' file and what it computes.

    Raises:
        UsageError: as `find_vae`, or it is another kind of model.
    """
    folder = find_vae(name)
    return _read(folder, tuple((folder / file).stat().st_mtime_ns for file in FILES))


@functools.lru_cache(maxsize=4)
def _read(folder: Path, changed: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    """`changed` is part of the key: a plan of many cells digests the weights once."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if not float(config["scaling_factor"]) > 0:
            raise ValueError(f"scaling_factor is {config['scaling_factor']}")
        computes = {key: value for key, value in config.items() if not key.startswith("_")}
        kind = config.get("_class_name", "AutoencoderKL")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'config.json'} is not that of an AutoencoderKL: {error!r}.") from None
    if kind != "AutoencoderKL":
        raise UsageError(f"{folder} holds a {kind}, but latents are made with an AutoencoderKL.")
    digest = hashlib.sha256(json.dumps(computes, sort_keys=True).encode())
    with open(folder / WEIGHTS, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return config, digest.hexdigest()


def described(name: str, shape: tuple[int, int, int]) -> VaeInfo:
    """What a manifest would say of an autoencoder whose latents are `shape` (C, h, w). Raises as `read_vae`."""
    config, digest = read_vae(name)
    factor = int(2 ** (len(config["block_out_channels"]) - 1))
    return VaeInfo(
        name=str(Path(name).expanduser().absolute()) if Path(name).expanduser().is_dir() else name,
        digest=digest,
        scaling_factor=config["scaling_factor"],
        shift_factor=config.get("shift_factor") or 0.0,
        image_shape=(config["in_channels"], shape[1] * factor, shape[2] * factor),
    )


def encoded(name: str, image_shape: tuple[int, int, int]) -> tuple[VaeInfo, tuple[int, int, int]]:
    """What a manifest says of an autoencoder's latents of images (C, H, W), and their shape (C, h, w).

    Raises:
        UsageError: as `read_vae`, or the encoder does not take such images.
    """
    config, _ = read_vae(name)
    in_channels, factor, _ = described(name, (1, 1, 1)).image_shape
    channels, height, width = image_shape
    if channels != in_channels or height % factor or width % factor:
        raise UsageError(
            f"The autoencoder {name} takes images of {in_channels} channels with sides divisible by {factor}, but "
            f"these are {' × '.join(map(str, image_shape))} (C, H, W). Choose --size (and --channels) accordingly."
        )
    shape = (int(config["latent_channels"]), height // factor, width // factor)
    return described(name, shape), shape


def check_vae(info: VaeInfo, path: str | None) -> None:
    """Whether the autoencoder behind latents is at hand and the same; `path` overrides where the manifest has it.

    Raises:
        UsageError: it is not there, or it is another one.
    """
    name = path or info.name
    try:
        _, digest = read_vae(name)
    except UsageError as error:
        raise UsageError(
            f"The latents were made with the autoencoder {info.name}, which decodes the samples. {error} "
            "Say where it is with data.vae."
        ) from None
    if digest != info.digest:
        raise UsageError(
            f"{name} is another autoencoder than the one that the latents were made with (digest {digest[:12]}, the "
            f"latents' {info.digest[:12]}). Give theirs with data.vae, or prepare the data with this one."
        )


class Vae:
    """An AutoencoderKL on a device, in fp32 and evaluation mode. Works in parts of `PART` images."""

    def __init__(self, name: str, device: Any = "cpu") -> None:
        """Raises UsageError as `read_vae`, or where the weights do not fit the configuration."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.name = name
        self.config, self.digest = read_vae(name)
        self.scaling_factor = float(self.config["scaling_factor"])
        self.shift_factor = float(self.config.get("shift_factor") or 0.0)
        try:
            model = AutoencoderKL.from_pretrained(
                find_vae(name), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except Exception as error:  # a configuration's nonsense fails wherever diffusers comes to use it
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise UsageError(f"The autoencoder {name} cannot be loaded: {reason}.") from None
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.device = device

    def encode(self, images: np.ndarray, *, mirrored: bool = False) -> np.ndarray:
        """Mean and std of the posterior, float16 (n, 2C, h, w), of uint8 images (n, C, H, W).

        `mirrored` adds those of the mirrored images: (n, 4C, h, w).

        Raises:
            DataError: a value is not finite in half precision.
        """
        import torch

        if mirrored:
            return np.concatenate([self.encode(images), self.encode(images[..., ::-1])], axis=1)
        with torch.inference_mode():
            parts = []
            for lo in range(0, len(images), PART):
                part = np.ascontiguousarray(images[lo : lo + PART])  # other strides pick other kernels, and other bits
                x = torch.from_numpy(part).to(self.device).float() / 127.5 - 1
                posterior = self.model.encode(x).latent_dist
                parts.append(torch.cat([posterior.mean, posterior.std], dim=1).half().cpu())
            moments = torch.cat(parts).numpy()
        if not np.isfinite(moments).all():
            raise DataError(f"The autoencoder {self.name} gives latents that are not finite in half precision.")
        return moments

    def decode(self, x: Tensor) -> Tensor:
        """Images (n, C, H, W) near [-1, 1] of latents (n, C, h, w) as the network sees them."""
        import torch

        z = x.float() / self.scaling_factor + self.shift_factor
        with torch.inference_mode():
            return torch.cat([self.model.decode(part).sample for part in z.split(PART)])


def decoder_of(info: VaeInfo | None, path: str | None, device: Any) -> Callable[[Tensor], Tensor]:
    """From what the network sees to images near [-1, 1]: the identity for pixels. Raises as `check_vae`."""
    if info is None:
        return lambda x: x
    check_vae(info, path)
    return Vae(path or info.name, device).decode
