"""Networks: tensors in, tensors out. `build_network` makes the one an experiment trains and samples from."""

from __future__ import annotations

from torch import nn

from sddit.config import Experiment
from sddit.config import SDDiT as SDDiTConfig
from sddit.errors import UsageError
from sddit.models.dit import DiT
from sddit.models.layers import keyed_init_
from sddit.models.sddit import SDDiT


def build_network(experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The generator of the experiment's method, with its initial weights (a function of `seed` alone).

    Under ``torch.device("meta")`` it has shapes only, which is enough to count.

    Raises:
        UsageError: the patch does not divide the image, or the decoder's width does not fit its heads.
    """
    model, method = experiment.model, experiment.method
    if shape[1] % model.patch or shape[2] % model.patch:
        raise UsageError(
            f"model.size {model.size!r} has patches of {model.patch}×{model.patch}, which do not divide images of "
            f"{shape[1]}×{shape[2]}. Use a patch that divides both sides, e.g. '{model.size.partition('/')[0]}/1'."
        )
    network: nn.Module
    if isinstance(method, SDDiTConfig):
        if model.decoder_width % model.decoder_heads or model.decoder_width % 4:
            raise UsageError(
                f"model.decoder_width {model.decoder_width} must be a multiple of 4 and of model.decoder_heads "
                f"{model.decoder_heads}. Change either."
            )
        network = SDDiT(
            shape,
            num_classes,
            *model.dims,
            model.patch,
            decoder_depth=model.decoder_depth,
            decoder_width=model.decoder_width,
            decoder_heads=model.decoder_heads,
            cls_init_std=method.cls_init_std,
            masked_slots=method.masked_slots,
        )
    else:
        network = DiT(shape, num_classes, *model.dims, model.patch)
    keyed_init_(network, experiment.seed)
    return network
