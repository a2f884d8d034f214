"""Costs in closed form against published tables and against the networks themselves."""

import contextlib

import pytest
import torch
from steps import make_batch, run_step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sddit import cost, presets
from sddit.methods import build_method
from sddit.methods.base import Batch
from sddit.training.state import TrainState

LATENT = (4, 32, 32)


@pytest.mark.parametrize(
    ("size", "gmacs"), [("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.70), ("XL/2", 118.62), ("S/4", 1.41), ("B/8", 1.42)]
)
def test_dit_as_published(size, gmacs):
    assert cost.forward_cost(presets.imagenet256(size, "dit"), LATENT).inference / 1e9 == pytest.approx(gmacs, abs=0.02)


@pytest.mark.parametrize(
    ("size", "student", "teacher", "decoder"), [("S/2", 4.75, 6.08, 7.04), ("XL/2", 94.35, 119.09, 7.16)]
)
def test_sddit_as_derived(size, student, teacher, decoder):
    experiment = presets.imagenet256(size, "sddit")
    no_head = cost.forward_cost(experiment.replace({"method.lambda_d": 0}), LATENT)
    assert no_head.with_gradient / 1e9 == pytest.approx(student + decoder, rel=0.01)
    head = cost.head_weights(experiment.method, experiment.model.dims[1])
    with_head = cost.forward_cost(experiment, LATENT)
    assert (with_head.without_gradient - 257 * head) / 1e9 == pytest.approx(teacher, rel=0.01)


@pytest.mark.parametrize(
    ("size", "method", "train", "inference"),  # methods.md §1.5
    [("S/2", "maskdit", 9.90, 13.09), ("XL/2", "maskdit", 65.45, 125.78), ("B/4", "maskdit", 4.46, 7.25),
     ("S/2", "mdt", 11.00, 6.06), ("L/2", "mdt", 141.93, 80.70), ("XL/2", "mdt", 207.59, 118.62)],
)  # fmt: skip
def test_maskdit_and_mdt_as_derived(size, method, train, inference):
    forward = cost.forward_cost(presets.imagenet256(size, method), LATENT)
    assert forward.with_gradient / 1e9 == pytest.approx(train, rel=0.005)
    assert forward.inference / 1e9 == pytest.approx(inference, rel=0.005)


VARIANTS = {
    "dit": [{}, {"diffusion.kind": "edm"}],
    "maskdit": [{}, {"diffusion.kind": "iddpm"}, {"method.lambda_mae": 0}],
    "mdt": [{}, {"method.version": "v2", "method.decoder_layers": 4}],
    "sddit": [
        {}, {"method.lambda_d": 0}, {"method.decoder": "wide"}, {"method.decoder": "last_blocks"},
        {"method.masked_slots": "nothing"}, {"method.masked_slots": "zeros"}, {"method.teacher_tokens": "visible"},
        {"method.cls_in_decoder": "forwarded"}, {"method.cls_in_decoder": "embedded"},
        {"method.cls_at_inference": False}, {"method.head_shared": False},
    ],
}  # fmt: skip


def meta_batch(method, size):
    draws = {name: torch.empty((size, *shape), device="meta") for name, (_, shape) in method.draws().items()}
    return Batch(
        torch.empty((size, *method.shape), device="meta"), torch.empty(size, dtype=torch.int64, device="meta"), draws
    )


def flops(call):
    """As torch counts them; fused attention it would not count on every backend."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = call()
    return counter.get_total_flops(), result


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [(name, changes, "S/4") for name, variants in VARIANTS.items() for changes in variants]
    + [(name, {}, size) for name in VARIANTS for size in ("S/2", "S/8", "B/2", "B/4", "L/2", "L/8", "XL/2", "XL/4")],
)
def test_flops_and_parameters_as_torch_counts_them(name, changes, size, monkeypatch):
    """Within 2% is asked; the closed forms are exact."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: contextlib.nullcontext())  # knows no 'meta'
    experiment = presets.imagenet256(size, name).replace(changes)
    with torch.device("meta"):
        method = build_method(experiment, LATENT, 1000).train()
        batch = meta_batch(method, 2)
        without, (context,) = flops(lambda: method.begin_step([batch], 0))
        with_, _ = flops(lambda: method(batch, context, 0))
        noise = torch.empty(2)
        inference, _ = flops(lambda: method.network.eval()(batch.x0, noise, batch.y))
    expected = cost.forward_cost(experiment, LATENT)
    pairs = [(without, expected.without_gradient), (with_, expected.with_gradient), (inference, expected.inference)]
    for counted, predicted in pairs:
        assert counted / 4 == pytest.approx(predicted, rel=1e-3)
    trainable = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (method.network, method)]
    generator, head = cost.num_parameters(experiment, LATENT, 1000)
    assert trainable == [generator, generator + head]


@pytest.mark.parametrize("name", VARIANTS)
def test_memory_of_a_step(name):
    """Numbers that autograd keeps, counted by storage."""
    experiment = presets.imagenet256("S/4", name)
    method = build_method(experiment, LATENT, 1000).train()
    batch, kept = make_batch(method, 4), {}
    parameters = {p.untyped_storage().data_ptr() for p in method.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    (context,) = method.begin_step([batch], 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(batch, context, 0)
    numbers = sum(storage.nbytes() for storage in kept.values()) / 4 / 4
    assert cost.saved_numbers(experiment, LATENT) == pytest.approx(numbers, rel=0.25)


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in VARIANTS), ("sddit", {"method.decoder": "last_blocks"})]
)
def test_checkpoint_size(name, changes):
    """All but the fixed positional codes and the optimiser's counters."""
    experiment = presets.digits("XL/2", name).replace(changes)
    state = TrainState.create(experiment, build_method(experiment, (1, 8, 8), 10), torch.device("cpu"))
    run_step(state.method, [make_batch(state.method, 4)])
    state.optimizer.step()
    numbers = sum(t.numel() for group in state.groups().values() for k, t in group.items() if t.ndim and "pos" not in k)
    positions = sum(t.numel() for group in state.groups().values() for k, t in group.items() if "pos" in k)
    predicted = cost.checkpoint_bytes(experiment, (1, 8, 8), 10)
    assert 4 * numbers <= predicted * 1.001 and predicted <= 4 * 1.001 * (numbers + positions)


@pytest.mark.parametrize(
    ("steps", "every", "start", "left"),
    [(600, 200, 0, 3), (600, 200, 200, 2), (600, 200, 600, 0), (500, 200, 0, 3), (500, 200, 450, 1)],
)
def test_evaluations_left(steps, every, start, left):
    experiment = presets.digits().replace({"train.steps": steps, "eval.every": every})
    assert cost.num_evaluations(experiment, start) == left


def test_predictions_are_proportional():
    speed = cost.Speed(training=1e-10, sampling=1e-10)
    whole = presets.digits()
    seconds = speed.seconds(whole, (1, 8, 8))
    assert speed.seconds(whole.replace({"resources.workers": 2}), (1, 8, 8)) == pytest.approx(seconds / 2)
    assert speed.seconds(whole, (1, 8, 8), from_step=600) == 0
    assert 0 < speed.seconds(whole, (1, 8, 8), from_step=400) < seconds
