"""`sddit export`: sampling weights as a diffusers pipeline, or as safetensors with their configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sddit.checkpoints.implied import Implied
from sddit.checkpoints.importing import new_folder, require_new
from sddit.checkpoints.names import sources, to_theirs
from sddit.errors import CheckpointError, UsageError
from sddit.models import build_network

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Form = Literal["diffusers", "safetensors"]
LATENT_CHANNELS = 4  # of the VAE that the published pipelines have

README = """\
A class-conditional DiT as a diffusers pipeline, written by `sddit export`.

```python
from diffusers import AutoencoderKL, DiTPipeline

pipe = DiTPipeline.from_pretrained("THIS FOLDER"{argument})
for block in pipe.transformer.transformer_blocks:  # the spacing it was trained with, see below
    block.norm1.emb.time_proj.downscale_freq_shift = 0
images = pipe([0, 1, 2], guidance_scale=1.0, num_inference_steps=50).images
```
{vae}
Where diffusers (as of 0.42) differs from the published DiT:

- It spaces the 128 frequencies of the time embedding by 1/127, DiT by 1/128. After the loop above, the transformer
  computes what `sddit` does, up to rounding.
- It guides all latent channels, DiT the first three.
- It takes 1000 for the null class, which in this model is {num_classes}.{caution}
- DDIM, the scheduler here, makes no use of the learnt variance.
"""
WITHOUT_VAE = """
The folder has no VAE: give the one whose latents the model was trained on, or export again with `--vae`.
"""


def export_network(
    tensors: Mapping[str, Tensor], trained: Implied, out: Path, *, form: Form | None = None, vae: str | None = None
) -> Form:
    """Writes sampling weights to the new folder `out`; returns the form.

    Without `form` it is 'diffusers' for a DiT with learnt variance on square latents of four channels, else
    'safetensors', which `sddit import --from sddit` reads. `vae` is a folder, or a name on Hugging Face's hub.

    Raises:
        UsageError: `out` exists, diffusers has no such network, or the VAE has other latents.
        CheckpointError: the weights are not those of the experiment's network, or cannot be written.
    """
    require_new(out)
    misfit = _diffusers_misfit(trained)
    if form is None:
        form = "safetensors" if misfit or trained.shape[0] != LATENT_CHANNELS else "diffusers"
    if form == "diffusers" and misfit:
        raise UsageError(f"diffusers' DiT has {misfit}. Use --format safetensors.")
    if form == "safetensors" and vae is not None:
        raise UsageError("--vae is for a diffusers pipeline alone; this is exported as safetensors. Leave it out.")
    with torch.device("meta"):
        expected = build_network(trained.experiment, trained.shape, trained.num_classes).state_dict()
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in tensors.items()}:
        raise CheckpointError("The weights of this checkpoint are not those of its experiment's network.")
    if form == "safetensors":
        _write_safetensors(tensors, trained, out)
    else:
        _write_pipeline(tensors, trained, out, vae)
    return form


def _diffusers_misfit(trained: Implied) -> str | None:
    """What diffusers' DiT has and this network has not."""
    experiment, shape = trained.experiment, trained.shape
    if experiment.method.name != "dit":
        return f"one stack of plain blocks, unlike {experiment.method.name}"
    if experiment.diffusion.kind != "iddpm":
        return f"the noise process 'iddpm', and this is {experiment.diffusion.kind!r}"
    return None if shape[1] == shape[2] else f"square latents alone, and these are {shape[1]}×{shape[2]}"


def _write_safetensors(tensors: Mapping[str, Tensor], trained: Implied, out: Path) -> None:
    import safetensors.torch

    config = {
        "experiment": trained.experiment.model_dump(mode="json"),
        "shape": list(trained.shape),
        "num_classes": trained.num_classes,
    }
    with new_folder(out) as folder:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _write_pipeline(tensors: Mapping[str, Tensor], trained: Implied, out: Path, vae: str | None) -> None:
    # Slow to import.
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.utils import logging

    decoder = None if vae is None else _load_vae(vae, trained)
    experiment, shape = trained.experiment, trained.shape
    depth, width, heads = experiment.model.dims
    state: dict[str, Tensor] = {}
    for name, source in sources("diffusers", tensors, experiment).items():
        for theirs, tensor in to_theirs(tensors[name], source, experiment.model.patch).items():
            # safetensors refuses tensors that share memory
            state[theirs] = tensor.clone(memory_format=torch.contiguous_format)
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=shape[0],
            out_channels=2 * shape[0],
            num_layers=depth,
            sample_size=shape[1],
            patch_size=experiment.model.patch,
            num_embeds_ada_norm=trained.num_classes,
            norm_eps=1e-6,  # DiT's; diffusers would take 1e-5 in half of the norms
        )
    transformer.load_state_dict(state, assign=True)
    scheduler = DDIMScheduler(
        experiment.diffusion.timesteps,
        beta_start=experiment.diffusion.beta_start,
        beta_end=experiment.diffusion.beta_end,
        clip_sample=False,
    )
    with new_folder(out) as folder:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # that there may be no VAE is meant
        try:
            DiTPipeline(transformer, decoder, scheduler).save_pretrained(folder)  # type: ignore[arg-type]
        finally:
            logging.set_verbosity(verbosity)
        (folder / "README.md").write_text(_readme(trained.num_classes, with_vae=decoder is not None))


def _load_vae(vae: str, trained: Implied) -> AutoencoderKL:
    from sddit.data.vae import Vae

    decoder = Vae(vae).model
    if (channels := decoder.config.latent_channels) != trained.shape[0]:
        raise UsageError(f"--vae {vae} has latents of {channels} channels, but the model makes {trained.shape[0]}.")
    return decoder


def _readme(num_classes: int, *, with_vae: bool) -> str:
    return README.format(
        argument="" if with_vae else ', vae=AutoencoderKL.from_pretrained("ITS VAE")',
        vae="" if with_vae else WITHOUT_VAE,
        num_classes=num_classes,
        caution="" if num_classes == 1000 else " So it cannot guide this model: keep `guidance_scale` at 1.",
    )
