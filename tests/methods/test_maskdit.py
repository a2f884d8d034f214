"""MaskDiT's training step (methods.md §3.3, §3.4, §12.3, §12.4)."""

from typing import Any

import pytest
import torch
from steps import is_gate, make_batch, moved_at_update, run_step, scramble_

from sddit import presets
from sddit.config import MaskDiT
from sddit.errors import UsageError
from sddit.methods.maskdit import MaskDiTMethod, mask_ratio, masked_mean, reconstruction_error


def build(scrambled: bool = True, **changes: Any) -> MaskDiTMethod:
    fields = {f"method.{k}": v for k, v in changes.items()}
    method = MaskDiTMethod(presets.digits(method="maskdit").replace(fields), (1, 8, 8), 10).train()
    if scrambled:
        scramble_(method.network)
    return method


@pytest.mark.parametrize(("patch", "channels", "expected"), [(2, 4, 0.9375), (4, 4, 0.984375)])
def test_reconstruction_of_nothing(patch: int, channels: int, expected: float) -> None:
    """Prediction 0: (p²C - 1)/(p²C), since the variance is unbiased; a constant patch: 0."""
    noisy = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = reconstruction_error(torch.zeros_like(noisy), noisy, patch)
    torch.testing.assert_close(errors, torch.full_like(errors, expected), rtol=1e-4, atol=1e-4)
    assert not reconstruction_error(torch.zeros_like(noisy), torch.ones_like(noisy), patch).any()


def test_losses_by_hand() -> None:
    """Visible tokens carry the diffusion loss, removed ones the reconstruction, without λ(σ)."""
    method = build()
    batch = make_batch(method, 6)
    (mask,) = method.begin_step([batch], 0)
    losses = method(batch, mask, 0)
    x0, eps, sigma = batch.x0, batch.draws["noise"], torch.exp(-0.8 + 1.2 * batch.draws["sigma"])
    s = sigma[:, None, None, None]
    noisy, root = x0 + s * eps, (s**2 + 0.75**2).sqrt()
    y = torch.where(batch.draws["drop"] < 0.1, 10, batch.y)
    output = method.network(noisy / root, sigma.log() / 4, y, mask)
    denoised = 0.75**2 / root**2 * noisy + s * 0.75 / root * output
    dsm = mae = 0.0
    for b in range(6):
        for token in range(16):
            rows, columns = slice(token // 4 * 2, token // 4 * 2 + 2), slice(token % 4 * 2, token % 4 * 2 + 2)
            if mask.removed[b, token]:
                target = noisy[b, :, rows, columns]
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                mae += (denoised[b, :, rows, columns] - target).square().mean().item() / (6 * 8)
            else:
                weight = (sigma[b] ** 2 + 0.75**2) / (sigma[b] * 0.75) ** 2
                error = (denoised[b, :, rows, columns] - x0[b, :, rows, columns]).square().mean()
                dsm += (weight * error).item() / (6 * 8)
    assert losses.parts["generative"].item() == pytest.approx(dsm, rel=1e-4)
    assert losses.parts["mae"].item() == pytest.approx(mae, rel=1e-4)
    assert losses.total.item() == pytest.approx(dsm + 0.1 * mae, rel=1e-4)


@pytest.mark.parametrize("kind", ["edm", "iddpm"])
def test_reconstruction_is_bounded_at_first(kind: str) -> None:
    """The denoised image of IDDPM is not: x̂0 of an untrained network is off by σ, up to 157."""
    experiment = presets.digits(method="maskdit").replace({"diffusion.kind": kind})
    method = MaskDiTMethod(experiment, (1, 8, 8), 10)
    (losses,) = run_step(method, [make_batch(method, 64)])
    assert losses.parts["mae"] < 2.5 * losses.parts["generative"]


def test_without_the_reconstruction_there_is_no_mask_token() -> None:
    method = build(lambda_mae=0.0)
    (losses,) = run_step(method, [make_batch(method)])
    assert losses.parts.keys() == {"generative"} and method.network.mask_token is None


def test_mask_ratio_zero_has_one_loss_and_no_mask() -> None:
    method = build(mask_ratio=0.0)
    assert "mask" not in method.draws()
    (losses,) = run_step(method, [make_batch(method)])
    assert losses.parts.keys() == {"generative"}


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("linear", 0.25, 0.0), ("cosine4", 0.125, 0.0), ("exp", 0.5 * 0.0301974, 0.000456)]
)
def test_unmasking(schedule: str, half: float, end: float) -> None:
    options = MaskDiT(mask_schedule=schedule, mask_horizon=100)  # type: ignore[arg-type]
    assert mask_ratio(options, 0) == 0.5
    assert mask_ratio(options, 50) == pytest.approx(half, rel=1e-3)
    assert mask_ratio(options, 100) == mask_ratio(options, 999) == pytest.approx(end, abs=1e-6)
    assert mask_ratio(MaskDiT(), 10**6) == 0.5
    method = build(mask_schedule=schedule, mask_horizon=100)
    batch = make_batch(method)
    early, later = (method.begin_step([batch], step)[0] for step in (0, 50))
    assert early.ids_keep.shape[1] == 8 and later.ids_keep.shape[1] > 8


def test_a_schedule_needs_a_horizon() -> None:
    with pytest.raises(UsageError, match="mask_horizon is needed"):
        build(mask_schedule="linear")


def test_masked_mean() -> None:
    values, mask = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0, 0, 0, 1]])
    assert masked_mean(values, mask).item() == 2.5


def test_reachability() -> None:
    """§12.4: final Linear; then gates of the decoder, bridge and mask token; the encoder at the third update."""
    first = moved_at_update(build(scrambled=False), updates=5)
    assert {n for n, u in first.items() if u == 1} == {"network.final.linear.weight", "network.final.linear.bias"}
    second = {n for n, u in first.items() if u == 2}
    assert second >= {"network.bridge.linear.weight", "network.bridge.linear.bias"}
    assert {n for n in first if is_gate(n) and "decoder" in n} <= second
    assert min(u for n, u in first.items() if n.startswith(("network.blocks", "network.patch_embed"))) == 3
    assert first.keys() == {n for n, p in build().named_parameters() if p.requires_grad}
