"""Networks: tensors in, tensors out. `build_network` makes the one an experiment trains and samples from."""

from __future__ import annotations

from torch import nn

from sddit import config
from sddit.config import Experiment
from sddit.errors import UsageError
from sddit.models.dit import DiT
from sddit.models.layers import keyed_init_
from sddit.models.maskdit import MaskDiT
from sddit.models.mdt import MDT
from sddit.models.sddit import SDDiT


def build_network(experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The generator of the experiment's method, with its initial weights (a function of `seed` alone).

    Under ``torch.device("meta")`` it has shapes only, which is enough to count.

    Raises:
        UsageError: sizes that do not fit each other.
    """
    model = experiment.model
    if shape[1] % model.patch or shape[2] % model.patch:
        raise UsageError(
            f"model.size {model.size!r} has patches of {model.patch}×{model.patch}, which do not divide images of "
            f"{shape[1]}×{shape[2]}. Use a patch that divides both sides, e.g. '{model.size.partition('/')[0]}/1'."
        )
    network = _build(experiment, shape, num_classes)
    keyed_init_(network, experiment.seed)
    return network


def _build(experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    model, method = experiment.model, experiment.method
    depth, width, heads = model.dims
    common = (width, heads, model.patch)
    out_channels = shape[0] * experiment.diffusion.outputs
    if isinstance(method, config.DiT):
        return DiT(shape, num_classes, depth, *common, out_channels)
    if isinstance(method, config.MDT):
        needed = 2 if method.version == "v2" else 1
        if depth - method.decoder_layers < needed:
            raise UsageError(
                f"method.decoder_layers is {method.decoder_layers}, but size {model.size!r} has {depth} blocks, of "
                f"which the encoder of MDT {method.version} needs {needed}. Use at most {depth - needed}."
            )
        options = {"decoder_layers": method.decoder_layers, "version": method.version}
        return MDT(shape, num_classes, depth, *common, out_channels=out_channels, **options)  # type: ignore[arg-type]
    decoder = {
        "out_channels": out_channels,
        "decoder_depth": model.decoder_depth,
        "decoder_width": model.decoder_width,
        "decoder_heads": model.decoder_heads,
    }
    if isinstance(method, config.SDDiT) and method.decoder != "light":
        decoder |= {"decoder_width": width, "decoder_heads": heads}
        if method.decoder == "last_blocks":
            last = model.last_blocks(method.last_blocks)
            depth -= last
            decoder |= {"decoder_depth": last, "bridge": False}
    elif model.decoder_width % model.decoder_heads or model.decoder_width % 4:
        raise UsageError(
            f"model.decoder_width {model.decoder_width} must be a multiple of 4 and of model.decoder_heads "
            f"{model.decoder_heads}. Change either."
        )
    if isinstance(method, config.MaskDiT):
        return MaskDiT(shape, num_classes, depth, *common, mask_token=method.lambda_mae > 0, **decoder)
    return SDDiT(
        shape,
        num_classes,
        depth,
        *common,
        cls_init_std=method.cls_init_std,
        masked_slots=method.masked_slots,
        cls_in_decoder=method.cls_in_decoder,
        cls_at_inference=method.cls_at_inference,
        **decoder,
    )
