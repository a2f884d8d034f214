"""MDT's training step: two passes, summed (methods.md §4.2, §5, §12.4)."""

from typing import Any

import pytest
import torch
from steps import make_batch, moved_at_update, run_step, scramble_

from sddit import presets, seeding
from sddit.errors import UsageError
from sddit.methods.mdt import MDTMethod


def build(scrambled: bool = True, **changes: Any) -> MDTMethod:
    fields = {k if "." in k else f"method.{k}": v for k, v in changes.items()}
    method = MDTMethod(presets.digits("B/2", method="mdt").replace(fields), (1, 8, 8), 10).train()
    if scrambled:
        scramble_(method.network)
    return method


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_sum_of_two_passes(version: str) -> None:
    """Each over all tokens, on the same image, label and t, with its own noise and label drop."""
    method = build(version=version)
    batch = make_batch(method, 6)
    (mask,) = method.begin_step([batch], 0)
    assert mask.ids_keep.shape == (6, 11)
    losses = method(batch, mask, 0)
    t = method.process.level(batch.draws)
    totals = []
    for suffix, masks in (("", ()), ("2", (mask,))):
        eps = batch.draws[f"noise{suffix}"]
        y = torch.where(batch.draws[f"drop{suffix}"] < 0.1, 10, batch.y)
        output = method.network(method.process.noisy(batch.x0, eps, t), t.float(), y, *masks)
        totals.append(method.process.error(output, batch.x0, eps, t).mean())
    torch.testing.assert_close(losses.parts["generative"], totals[0].detach())
    torch.testing.assert_close(losses.parts["masked"], totals[1].detach())
    torch.testing.assert_close(losses.total, totals[0] + totals[1])


def test_a_drawn_ratio_is_one_for_the_whole_batch_of_a_step() -> None:
    method = build(mask_ratio=0.3, mask_ratio_max=0.5)
    ratios = [method.mask_ratio(step) for step in range(200)]
    assert min(ratios) < 0.32 and max(ratios) > 0.48 and all(0.3 <= r <= 0.5 for r in ratios)
    assert ratios[7] == pytest.approx(0.3 + 0.2 * seeding.uniform(0, "mask_ratio", 7, 0, 1)[0])
    batches = [make_batch(method, 4), make_batch(method, 4, first=4)]
    assert len({mask.ids_keep.shape[1] for mask in method.begin_step(batches, 3)}) == 1
    with pytest.raises(UsageError, match=r"mask_ratio_max 0.1 is below mask_ratio 0.3"):
        build(mask_ratio_max=0.1)


def test_min_snr_weighs_the_squared_error_alone() -> None:
    """min(SNR, 5)/SNR is 1 from t = 130 on (methods.md §12.5)."""
    plain, weighted = build(), build(**{"diffusion.min_snr_gamma": 5.0})
    batch = make_batch(plain, 8)
    batch.draws["t"] = torch.full((8,), 0.1301)
    assert torch.equal(*(run_step(m, [batch])[0].total for m in (plain, weighted)))
    batch.draws["t"] = torch.full((8,), 0.1001)
    early = [run_step(m, [batch])[0].total for m in (plain, weighted)]
    assert early[1] < early[0]


def test_reachability() -> None:
    """§12.4 as DiT: the final Linear, then the gates behind it, then all."""
    first = moved_at_update(build(scrambled=False), updates=5)
    assert {n for n, u in first.items() if u == 1} == {"network.final.linear.weight", "network.final.linear.bias"}
    assert first.keys() == {n for n, p in build().named_parameters() if p.requires_grad}
