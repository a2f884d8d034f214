"""The contract of `methods.base` over every method."""

import math

import pytest
import torch
from steps import make_batch, run_step, scramble_

from sddit import presets
from sddit.config import METHOD_CONFIGS, Experiment
from sddit.methods import METHODS, build_method
from sddit.methods.base import Method

every_method = pytest.mark.parametrize("name", METHODS)
every_combination = pytest.mark.parametrize(("name", "kind"), [(m, k) for m in METHODS for k in ("edm", "iddpm")])
WEIGHTS = {"discriminative": 0.1, "mae": 0.1, "masked": 1.0}  # of the parts beside 'generative'


UNMASKED: dict[str, dict[str, object]] = {
    "dit": {},
    "maskdit": {"method__mask_ratio": 0.0},
    "mdt": {"method__mask_ratio": 0.0},
    "sddit": {"method__mask_ratio": 0.0, "method__lambda_d": 0.0},
}


def experiment(name: str, **changes: object) -> Experiment:
    return presets.digits(method=name).replace({k.replace("__", "."): v for k, v in changes.items()})


def build(name: str, **changes: object) -> Method:
    return build_method(experiment(name, **changes), (1, 8, 8), 10)


def test_table_has_every_configured_method() -> None:
    assert METHODS.keys() == METHOD_CONFIGS.keys()


@every_combination
def test_loss_falls_on_one_batch(name: str, kind: str) -> None:
    method = build(name, diffusion__kind=kind).train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    batch, generative = make_batch(method, 32), []
    for step in range(45):
        (losses,) = run_step(method, [batch], step)
        optimizer.step()
        method.after_optimizer(step)
        method.end_step(step)
        generative.append(losses.parts["generative"].item())
    assert generative[-1] < 0.85 * generative[0]


@every_combination
def test_losses_and_their_parts(name: str, kind: str) -> None:
    method = build(name, diffusion__kind=kind)
    scramble_(method.network)
    (losses,) = run_step(method, [make_batch(method)])
    assert losses.per_image.shape == (16,) and not losses.per_image.requires_grad
    assert losses.total.dtype == losses.per_image.dtype == torch.float32
    assert not any(v.requires_grad or v.ndim for v in losses.parts.values())
    total = losses.parts["generative"] + sum(w * losses.parts[k] for k, w in WEIGHTS.items() if k in losses.parts)
    torch.testing.assert_close(losses.total.detach(), total)
    of_images = losses.total.detach() - 0.1 * losses.parts.get("discriminative", 0)
    torch.testing.assert_close(losses.per_image.mean(), of_images)


@every_method
@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_changes_nothing(name: str, count: int) -> None:
    whole, parts = build(name), build(name)
    for method in (whole, parts):
        scramble_(method.network)
    size = 16 // count
    straight = run_step(whole, [make_batch(whole)])
    pieces = run_step(parts, [make_batch(parts, size, first=i * size) for i in range(count)])
    per_image = torch.cat([losses.per_image for losses in pieces])
    torch.testing.assert_close(per_image, straight[0].per_image, rtol=1e-5, atol=1e-6)
    for (key, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    for key, value in whole.diagnostics().items():
        assert parts.diagnostics()[key].item() == pytest.approx(value.item(), abs=1e-5)


@every_combination
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_every_parameter_gets_a_gradient(name: str, kind: str, mask_ratio: float) -> None:
    """DDP without a search for unused parameters hangs otherwise."""
    method = build(name, diffusion__kind=kind, **({} if name == "dit" else {"method__mask_ratio": mask_ratio})).train()
    batch = make_batch(method)
    for drop in {"drop", "drop2"} & batch.draws.keys():
        batch.draws[drop].zero_()  # all labels dropped: the embedder has to take part all the same
    run_step(method, [batch])
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@every_method
def test_labels_are_dropped_by_the_draw(name: str) -> None:
    method = build(name, method__class_dropout=0.25)
    y, draw = torch.tensor([3, 1, 4, 1]), torch.tensor([0.1, 0.2499, 0.25, 0.9])
    assert torch.equal(method.drop_labels(y, draw), torch.tensor([10, 10, 4, 1]))
    assert torch.equal(build(name, method__class_dropout=0.0).drop_labels(y, draw), y)


@every_method
def test_generative_loss_before_training(name: str) -> None:
    """The raw target's mean square: the network gives 0 (methods.md §12.2)."""
    method = build(name, diffusion__kind="edm", **UNMASKED[name])
    batch = make_batch(method, 8)
    (losses,) = run_step(method, [batch])
    sigma = torch.exp(-0.8 + 1.2 * batch.draws["sigma"])[:, None, None, None]
    skip, out = 0.75**2 / (sigma**2 + 0.75**2), sigma * 0.75 / (sigma**2 + 0.75**2).sqrt()
    error = (skip * (batch.x0 + sigma * batch.draws["noise"]) - batch.x0) / out
    assert losses.parts["generative"].item() == pytest.approx(error.square().mean().item(), rel=1e-4)


@every_method
def test_generative_loss_is_the_weighted_error_of_the_denoiser(name: str) -> None:
    method = build(name, diffusion__kind="edm", **UNMASKED[name])
    scramble_(method.network)
    batch = make_batch(method, 8)
    if name == "mdt":  # the masked pass, with nothing masked, is the full pass
        batch.draws |= {"noise2": batch.draws["noise"], "drop2": batch.draws["drop"]}
    (losses,) = run_step(method, [batch])
    sigma = torch.exp(-0.8 + 1.2 * batch.draws["sigma"])
    x = batch.x0 + sigma[:, None, None, None] * batch.draws["noise"]
    denoised = method.process.evaluate(method.network, x, sigma, method.drop_labels(batch.y, batch.draws["drop"]))
    weight = (sigma**2 + 0.75**2) / (sigma * 0.75) ** 2
    expected = weight * (denoised - batch.x0).square().mean(dim=(1, 2, 3)) * (2 if name == "mdt" else 1)
    torch.testing.assert_close(losses.per_image, expected, rtol=2e-3, atol=1e-4)


@every_method
def test_state_dict_resumes_bit_for_bit(name: str) -> None:
    def train(method: Method, steps: range) -> list[float]:
        totals = []
        for step in steps:
            (losses,) = run_step(method, [make_batch(method, step=step)], step)
            with torch.no_grad():
                for p in method.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
            method.after_optimizer(step)
            method.end_step(step)
            totals.append(losses.total.item())
        return totals

    changes = {"method__centring": "ema"} if name == "sddit" else {}
    straight, first, second = (build(name, **changes) for _ in range(3))
    totals = train(straight, range(6))
    train(first, range(3))
    second.load_state_dict(first.state_dict())
    assert train(second, range(3, 6)) == totals[3:]


@every_method
def test_bf16_autocast_keeps_losses_in_float32(name: str) -> None:
    method = build(name, train__precision="bf16")
    scramble_(method.network)
    batch = make_batch(method)
    context = method.begin_step([batch], 0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(batch, context, 0)
    losses.total.backward()
    exact = build(name)
    scramble_(exact.network)
    (reference,) = run_step(exact, [batch])
    assert losses.total.dtype == torch.float32 and all(v.dtype == torch.float32 for v in losses.parts.values())
    assert losses.total.item() == pytest.approx(reference.total.item(), rel=0.05)
    assert losses.total.item() != reference.total.item()


@every_method
def test_seed_decides_everything(name: str) -> None:
    a, b, c = (build(name, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_methods_share_their_encoder_at_the_start() -> None:
    weights = [build(name).network.state_dict() for name in METHODS]
    shared = [k for k in set.intersection(*(set(w) for w in weights)) if k.startswith(("blocks.", "patch_embed."))]
    assert len(shared) > 10
    assert all(torch.equal(weights[0][k], w[k]) for w in weights for k in shared)


@every_method
def test_draws_have_the_agreed_names(name: str) -> None:
    for kind, level in {"edm": ("sigma", "normal"), "iddpm": ("t", "uniform")}.items():
        draws = build(name, diffusion__kind=kind).draws()
        assert draws["drop"] == ("uniform", ()) and draws[level[0]] == (level[1], ())
    assert draws["noise"] == ("normal", (1, 8, 8))
    assert all(math.prod(shape) >= 1 for _, shape in draws.values())


@every_method
def test_forward_is_one_graph(name: str) -> None:
    """For torch.compile: no break, and no new graph for another step."""
    method = build(name)
    compiled = torch.compile(method, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2):
            batch = make_batch(method, step=step)
            (context,) = method.begin_step([batch], step)
            torch.testing.assert_close(compiled(batch, context, step).total, method(batch, context, step).total)
