"""Whether the targets of SD-DiT's discriminative loss say anything, where figures show it beside FID."""

from __future__ import annotations

from dataclasses import replace

from analysis.axis import AxisData
from analysis.common import last_done
from sddit.config import SDDiT

METRICS = {"train/information_cls": "[CLS]", "train/information_patch": "patch"}
DEAD = float(SDDiT.model_fields["collapse_threshold"].default)  # nat


def recorded(data: AxisData) -> bool:
    """Whether any cell that counts has it at the last step."""
    rows = data.counting
    return bool(rows.loc[rows["step"] == last_done(data.frame), list(METRICS)].notna().any(axis=None))


def explained(data: AxisData) -> AxisData:
    """With the sentence that explains it in the caption."""
    sentence = (
        "Information of the targets: between a token and its prototype, at the last step; below "
        f"{DEAD:g} nat the targets are dead and the discriminative loss teaches nothing."
        if recorded(data)
        else "The information of the targets at the last step was not recorded."
    )
    return replace(data, caption=f"{data.caption} {sentence}")
