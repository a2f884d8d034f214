"""SD-DiT's training step: oracles of methods.md §12.4 and §12.7; every field of its config does what it says."""

import contextlib
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_workers
from steps import is_gate, make_batch, moved_at_update, run_step, scramble_
from two_workers import WORLDS, build, step_of, untouched

from sddit import presets
from sddit.config import NotInDigest, SDDiT
from sddit.diffusion import edm
from sddit.errors import UsageError
from sddit.methods import discrimination as disc
from sddit.methods.sddit import SDDiTMethod
from sddit.models.layers import patchify


@torch.no_grad()
def equal_teacher(method: SDDiTMethod) -> None:
    torch._foreach_copy_(method._teacher_parameters, method._student_parameters)


# ------------------------------------------------------------------------------------------------------------- teacher


def test_teacher_is_a_copy_that_nothing_trains() -> None:
    method = untouched().train()
    teacher, student = method.teacher.state_dict(), method.network.state_dict()
    assert all(torch.equal(teacher[k], student[k]) for k in teacher)
    assert method.teacher_heads.state_dict().keys() == method.heads.state_dict().keys()
    assert not method.teacher.training and not method.teacher_heads.training and method.network.training
    run_step(method, [make_batch(method)])
    held = [*method.teacher.parameters(), *method.teacher_heads.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in held)
    trained = {name.split(".")[0] for name, p in method.named_parameters() if p.requires_grad}
    assert trained == {"network", "heads"}
    encoder = {"cls", "pos_embed", "patch_embed", "time_embed", "class_embed", "blocks"}
    assert {k.split(".")[0] for k in teacher} == encoder


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_teacher_follows_the_student(momentum: float) -> None:
    method = untouched(teacher_momentum=momentum)
    before = [p.clone() for p in method._teacher_parameters]
    scramble_(method.network)
    scramble_(method.heads)
    method.after_optimizer(0)
    for old, new, student in zip(before, method._teacher_parameters, method._student_parameters, strict=True):
        if momentum in (0, 1):
            assert torch.equal(new, old if momentum else student)
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * student)


@pytest.mark.parametrize(("momentum", "half_life"), [(0.996, 173), (0.9995, 1386)])
def test_half_life(momentum: float, half_life: int) -> None:
    method = untouched(teacher_momentum=momentum)
    with torch.no_grad():
        method.teacher.cls.fill_(1)
        method.network.cls.fill_(0)
    for step in range(half_life):
        method.after_optimizer(step)
    assert method.teacher.cls[0].item() == pytest.approx(0.5, abs=0.005)


def test_cosine_momentum() -> None:
    method = untouched(teacher_momentum=0.9, teacher_momentum_end=1.0, teacher_momentum_horizon=100)
    assert [round(method.teacher_momentum(s), 9) for s in (0, 50, 100, 200)] == [0.9, 0.95, 1.0, 1.0]
    assert untouched(teacher_momentum=0.9).teacher_momentum(77) == 0.9


def test_without_the_discriminative_loss_there_is_only_the_generator() -> None:
    method = untouched(lambda_d=0.0).train()
    assert {name.split(".")[0] for name in method.state_dict()} == {"network"}
    (losses,) = run_step(method, [make_batch(method)])
    method.after_optimizer(0)
    assert losses.parts.keys() == {"generative"} and not method.diagnostics()
    with pytest.raises(UsageError, match=r"method.stop_gradient is true and method.lambda_d is 0"):
        untouched(lambda_d=0.0, stop_gradient=True)


def test_samples_do_not_depend_on_head_centres_or_teacher() -> None:
    method = build()
    x, sigma, y = torch.randn(4, 1, 8, 8), torch.ones(4), torch.arange(4)
    before = method.process.evaluate(method.network, x, sigma, y)
    with torch.no_grad():
        for name, value in method.state_dict().items():
            if not name.startswith("network."):
                value.normal_()
    assert torch.equal(method.process.evaluate(method.network, x, sigma, y), before)


# --------------------------------------------------------------------------------------------------------------- views


def teacher_view(method: SDDiTMethod, batch: Any) -> dict[str, torch.Tensor]:
    """What the teacher was shown in a step."""
    seen: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name in ("patch_embed", "time_embed", "class_embed"):
            module = method.teacher.get_submodule(name)
            handle = module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
            hooks.callback(handle.remove)
        method.begin_step([batch], 0)
    return seen


def test_teacher_sees_the_image_almost_clean() -> None:
    """σ_T = 0.002: c_in = 1.999984 and c_noise = -1.553652 at σ_data = 0.5 (methods.md §6.3)."""
    fields = {"diffusion.sigma_data": 0.5, "model.size": "S/1", "method.lambda_d": 1.0}
    method = SDDiTMethod(presets.digits().replace(fields), (1, 8, 8), 10)
    batch = make_batch(method, 4)
    seen = teacher_view(method, batch)
    expected = 1.999984 * (batch.x0 + 0.002 * batch.draws["noise"])
    torch.testing.assert_close(seen["patch_embed"].view(4, 1, 8, 8), expected)
    torch.testing.assert_close(seen["time_embed"], torch.full((4,), -1.553652))


def test_teacher_sigma() -> None:
    batch = make_batch(untouched(teacher_sigma="drawn"), 64)
    student = torch.exp(-0.8 + 1.2 * batch.draws["sigma"])

    def sigma(**changes: Any) -> torch.Tensor:
        return (4 * teacher_view(untouched(**changes), batch)["time_embed"]).exp()

    torch.testing.assert_close(sigma(), torch.full((64,), 0.002))
    torch.testing.assert_close(sigma(teacher_sigma=0.3), torch.full((64,), 0.3))
    torch.testing.assert_close(sigma(teacher_sigma="student"), student)
    drawn = sigma(teacher_sigma="drawn")
    assert ((drawn >= 0.002) & (drawn <= student)).all()
    share = (drawn / 0.002).log() / (student / 0.002).log()
    torch.testing.assert_close(share, batch.draws["sigma_teacher"], rtol=1e-4, atol=1e-5)


def test_teacher_label() -> None:
    batch = make_batch(untouched(), 8)
    batch.draws["drop"] = torch.tensor([0.0, 1.0] * 4)
    dropped = torch.where(batch.draws["drop"] < 0.1, 10, batch.y)
    for label, expected in (("same", dropped), ("never_dropped", batch.y), ("always_dropped", torch.full((8,), 10))):
        assert torch.equal(teacher_view(untouched(teacher_label=label), batch)["class_embed"], expected)


def test_teacher_noise_coupling() -> None:
    method = untouched(teacher_sigma=1.0, noise_coupling="independent")
    batch = make_batch(method, 8)
    own = teacher_view(method, batch)["patch_embed"]
    batch.draws["noise"] = torch.zeros_like(batch.draws["noise"])
    assert torch.equal(teacher_view(method, batch)["patch_embed"], own)
    batch.draws["noise_teacher"] = torch.zeros_like(batch.draws["noise"])
    assert not torch.equal(teacher_view(method, batch)["patch_embed"], own)


def test_draws() -> None:
    plain = {"drop": ("uniform", ()), "sigma": ("normal", ()), "noise": ("normal", (1, 8, 8))}
    mask = {"mask": ("uniform", (16,))}
    assert untouched().draws() == plain | mask
    assert untouched(mask_ratio=0.0).draws() == plain
    extra = {"sigma_teacher": ("uniform", ()), "noise_teacher": ("normal", (1, 8, 8))}
    both: dict[str, Any] = {"teacher_sigma": "drawn", "noise_coupling": "independent"}
    assert untouched(**both).draws() == plain | mask | extra
    assert untouched(**both, lambda_d=0.0).draws() == plain | mask


# ---------------------------------------------------------------------------------------------------------- the losses


def test_discriminative_loss_by_hand() -> None:
    """Patches: the mean over the twelve visible tokens (§12.7); then over images; [CLS] with equal weight."""
    method = build()
    batch = make_batch(method, 5)
    (context,) = method.begin_step([batch], 0)
    assert context.targets is not None and context.targets.shape == (5, 13, 64)
    losses = method(batch, context, 0)
    network = method.network
    sigma = context.level[:, None, None, None]
    tokens = network.embed((batch.x0 + sigma * batch.draws["noise"]) / (sigma**2 + 0.75**2).sqrt())
    encoded = network.encode(tokens, network.condition(context.level.log() / 4, context.y), context.ids_keep)
    log_p = (method.heads(encoded) / 0.1).log_softmax(2)
    ce = -(context.targets * log_p).sum(2)
    torch.testing.assert_close(losses.parts["discriminative_cls"], ce[:, 0].mean())
    torch.testing.assert_close(losses.parts["discriminative_patch"], ce[:, 1:].sum() / (5 * 12))
    torch.testing.assert_close(losses.parts["discriminative"], ce[:, 0].mean() + ce[:, 1:].mean())
    expected = losses.parts["generative"] + 0.1 * losses.parts["discriminative"]
    torch.testing.assert_close(losses.total, expected)


def test_targets_belong_to_the_visible_tokens() -> None:
    """The target of a visible token is the teacher's, at the same place."""
    method = build(centring="none")
    batch = make_batch(method, 3)
    (context,) = method.begin_step([batch], 50)
    logits = method._teacher_logits(batch, context)
    assert logits.shape == (3, 17, 64)
    for b in range(3):
        torch.testing.assert_close(context.targets[b, 0], (logits[b, 0] / 0.04).softmax(0))
        for k, place in enumerate(context.ids_keep[b].tolist()):
            torch.testing.assert_close(context.targets[b, 1 + k], (logits[b, 1 + place] / 0.07).softmax(0))


def test_equal_views_and_weights_give_equal_tokens() -> None:
    """§12.7: with M = 0, one σ and one ε, L_D is the cross-entropy of P_S with its own sharpened version."""
    method = build(mask_ratio=0.0, teacher_sigma="student", centring="none", tau_teacher_warmup_steps=0)
    equal_teacher(method)
    batch = make_batch(method, 4)
    seen = {}
    handles = [
        heads.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, heads in (("student", method.heads), ("teacher", method.teacher_heads))
    ]
    (context,) = method.begin_step([batch], 0)
    losses = method(batch, context, 0)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["student"], seen["teacher"])
    z = method.heads(seen["student"])
    p_t = torch.cat([(z[:, :1] / 0.04).softmax(2), (z[:, 1:] / 0.07).softmax(2)], 1)
    ce = -(p_t * (z / 0.1).log_softmax(2)).sum(2)
    torch.testing.assert_close(losses.parts["discriminative"], (ce[:, 0] + ce[:, 1:].mean(1)).mean())


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_generative_loss_on_visible_tokens(ratio: float) -> None:
    everywhere, visible = (build(generative_tokens=t, mask_ratio=ratio) for t in ("all", "visible"))
    batch = make_batch(visible, 4)
    outputs = []
    visible.network.final.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    (context,) = visible.begin_step([batch], 0)
    losses = visible(batch, context, 0)
    target = edm.raw_target(batch.x0, batch.draws["noise"], context.level, 0.75)
    error = (outputs[0] - patchify(target, 2)).square().mean(2)
    kept = torch.stack([row[ids].mean() for row, ids in zip(error, context.ids_keep, strict=True)])
    torch.testing.assert_close(losses.parts["generative"], kept.mean().detach())
    (reference,) = run_step(everywhere, [batch])
    torch.testing.assert_close(reference.parts["generative"], error.mean().detach())


def encoder_gradients(method: SDDiTMethod, batch: Any) -> torch.Tensor:
    run_step(method, [batch])
    names = dict(method.teacher.named_parameters())
    grads = [p.grad.flatten() for name, p in method.network.named_parameters() if name in names and p.requires_grad]
    return torch.cat(grads)


def test_stop_gradient_keeps_the_generative_loss_out_of_the_encoder() -> None:
    batch = make_batch(untouched(), 8)
    small, large = (build(stop_gradient=True, lambda_d=v) for v in (0.1, 0.2))
    torch.testing.assert_close(
        encoder_gradients(large, batch), 2 * encoder_gradients(small, batch), rtol=1e-4, atol=1e-7
    )
    open_ = build()
    assert not torch.allclose(encoder_gradients(open_, batch), encoder_gradients(small, batch), rtol=1e-2)
    for name, p in small.network.named_parameters():
        if name.startswith(("bridge", "decoder_blocks", "final")):
            torch.testing.assert_close(p.grad, open_.network.get_parameter(name).grad)


@pytest.mark.parametrize("shared", [True, False])
def test_prototypes_are_frozen_at_first(shared: bool) -> None:
    method = build(prototype_freeze_steps=3, head_shared=shared)
    for step in range(5):
        run_step(method, [make_batch(method)], step)
        for name, p in method.heads.named_parameters():
            assert (p.grad is None) == ("prototypes" in name and step < 3)


def test_reachability_of_the_generator() -> None:
    """§12.4, as MaskDiT without its mask token: nothing reaches the encoder before the third update."""
    method = untouched(lambda_d=0.0)
    first = moved_at_update(method, updates=5)
    trainable = {name for name, p in method.named_parameters() if p.requires_grad}
    assert first.keys() == trainable
    assert {n for n, u in first.items() if u == 1} == {"network.final.linear.weight", "network.final.linear.bias"}
    modulations = {n for n in trainable if n.startswith("network.final.modulation")}
    gates = {n for n in trainable if is_gate(n) and "decoder" in n}
    bridge = {"network.bridge.linear.weight", "network.bridge.linear.bias"}
    assert {n for n, u in first.items() if u == 2} == modulations | gates | bridge
    third = {n for n, u in first.items() if u == 3}
    assert third >= {n for n in trainable if is_gate(n) or "_embed." in n} - gates


def test_reachability_of_the_discriminative_loss() -> None:
    """L_D reaches [CLS], the patch embedding, the gates and the head from the first update."""
    first = moved_at_update(untouched(lambda_d=1.0), updates=1)
    names = {"network.cls", "network.patch_embed.weight", "network.patch_embed.bias"}
    names |= {n for n, _ in untouched().named_parameters() if n.startswith("heads.")}
    names |= {n for n, _ in untouched().network.named_parameters(prefix="network") if n.startswith("network.blocks.")
              and is_gate(n)}  # fmt: skip
    assert first.keys() >= names


# ------------------------------------------------------------------------------------------------ statistics of a step


@pytest.mark.parametrize("centring", ["ema", "sinkhorn"])
def test_cls_says_nothing_at_first(centring: str) -> None:
    method = untouched(centring=centring)
    run_step(method, [make_batch(method, 32)])
    information = method.diagnostics()
    assert information.keys() == {"information_cls", "information_patch"}
    assert information["information_cls"].item() == pytest.approx(0, abs=1e-4)
    assert information["information_patch"].item() > 0.01


def test_information_is_that_of_the_targets() -> None:
    method = build()
    (context,) = method.begin_step([make_batch(method, 8)], 0)
    cls, patch = disc.information(context.targets[:, 0], context.targets[:, 1:].reshape(-1, 64))
    assert method.diagnostics() == {"information_cls": cls, "information_patch": patch}


def test_centres_move_at_the_end_of_the_step() -> None:
    method = build()
    batch = make_batch(method, 8)
    (context,) = method.begin_step([batch], 0)
    logits = method._teacher_logits(batch, context)
    method(batch, context, 0)
    method.after_optimizer(0)
    assert not method.targets_cls.centre.any() and not method.targets_patch.centre.any()
    method.end_step(0)
    torch.testing.assert_close(method.targets_cls.centre[0], 0.1 * logits[:, 0].mean(0))
    torch.testing.assert_close(method.targets_patch.centre[0], 0.1 * logits[:, 1:].mean((0, 1)))  # all sixteen
    assert {"targets_cls.centre", "targets_patch.centre"} <= method.state_dict().keys()


def test_centre_of_a_position_whatever_the_teacher_sees() -> None:
    for teacher_tokens in ("all", "visible"):
        method = build(centre_per_position=True, centre_momentum=0.0, teacher_tokens=teacher_tokens)
        batch = make_batch(method, 8)
        (context,) = method.begin_step([batch], 0)
        logits = method._teacher_logits(batch, context)[:, 1:]
        places = context.ids_keep if teacher_tokens == "visible" else torch.arange(16).expand(8, 16)
        method.end_step(0)
        for position in range(16):
            expected = logits[places == position].mean(0)
            torch.testing.assert_close(method.targets_patch.centre[position], expected, rtol=1e-4, atol=1e-6)


def test_workers_and_accumulation_change_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(two_workers.__file__)]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    straight = []
    for changes in WORLDS:
        method = build(**changes)
        straight.append(step_of(method, method, sizes=[16], first=0))
    assert [p.wait(120) for p in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for one, a, b in zip(straight, *ranks, strict=True):
        for key in ("targets", "per_image"):
            torch.testing.assert_close(torch.cat([a[key], b[key]]), one[key], rtol=1e-5, atol=1e-6)
        for key in ("gradients", "centres", "information"):
            assert a[key].keys() == b[key].keys() == one[key].keys()
            for name, value in one[key].items():
                torch.testing.assert_close(a[key][name], value, rtol=1e-4, atol=3e-6)
                assert torch.equal(a[key][name], b[key][name])


# ---------------------------------------------------------------------------------------------- every field is alive

PARTS = (
    "draws", "initial", "head", "generative", "discriminative", "targets", "encoder_gradient", "prototype_gradient",
    "teacher", "centres", "targets_next", "samples",
)  # fmt: skip
DISTILLED = {"discriminative", "encoder_gradient", "prototype_gradient"}
TARGETS = DISTILLED | {"targets", "targets_next"}
VIEW = TARGETS | {"centres"}
HEAD = VIEW | {"head", "teacher"}
DECODER = {"initial", "generative", "encoder_gradient", "samples"}
# field, or field:alternative → (base, alternative, parts of the step that change); the others must not. Step 5 of a
# trained network; 'samples' is what inference gives.
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "class_dropout": ({}, {"class_dropout": 0.9}, VIEW | {"generative"}),
    "mask_ratio": ({}, {"mask_ratio": 0.5}, TARGETS | {"generative"}),
    "teacher_sigma": ({}, {"teacher_sigma": 0.5}, VIEW),
    "teacher_tokens": ({}, {"teacher_tokens": "visible"}, VIEW),
    "teacher_label": ({}, {"teacher_label": "always_dropped"}, VIEW),
    "noise_coupling": ({"teacher_sigma": 0.5}, {"noise_coupling": "independent"}, VIEW | {"draws"}),
    "cls_init_std": ({}, {"cls_init_std": 0.5}, {"initial", "teacher", "targets_next"}),
    "masked_slots": ({}, {"masked_slots": "zeros"}, {"generative", "encoder_gradient"}),
    "masked_slots:nothing": ({}, {"masked_slots": "nothing"}, {"generative", "encoder_gradient"}),
    "cls_in_decoder": ({}, {"cls_in_decoder": "forwarded"}, DECODER - {"initial"}),
    "cls_in_decoder:embedded": ({}, {"cls_in_decoder": "embedded"}, DECODER),
    "cls_at_inference": ({}, {"cls_at_inference": False}, {"samples"}),
    "decoder": ({"model.size": "B/2"}, {"decoder": "wide"}, DECODER),
    "decoder:last_blocks": ({}, {"decoder": "last_blocks"}, DECODER | VIEW | {"teacher"}),
    "last_blocks": (
        {"decoder": "last_blocks", "last_blocks": 1, "model.size": "B/2"},
        {"last_blocks": 2},
        DECODER | VIEW | {"teacher"},
    ),
    "generative_tokens": ({}, {"generative_tokens": "visible"}, {"generative", "encoder_gradient"}),
    "stop_gradient": ({}, {"stop_gradient": True}, {"encoder_gradient"}),
    "discriminated_tokens": ({}, {"discriminated_tokens": "cls"}, DISTILLED),
    "discriminated_tokens:patches": ({}, {"discriminated_tokens": "patches"}, DISTILLED),
    "lambda_d": ({}, {"lambda_d": 0.2}, {"encoder_gradient", "prototype_gradient"}),
    "lambda_d_end": (
        {"lambda_d_end": 0.1, "lambda_d_horizon": 10},
        {"lambda_d_end": 0.2},
        {"encoder_gradient", "prototype_gradient"},
    ),
    "lambda_d_horizon": (
        {"lambda_d_end": 0.2, "lambda_d_horizon": 10},
        {"lambda_d_horizon": 20},
        {"encoder_gradient", "prototype_gradient"},
    ),
    "tau_student": ({}, {"tau_student": 0.2}, DISTILLED),
    "tau_teacher": ({}, {"tau_teacher": 0.1}, TARGETS),
    "tau_teacher_cls": ({}, {"tau_teacher_cls": 0.05}, TARGETS),
    "tau_teacher_start": ({}, {"tau_teacher_start": 0.05}, TARGETS),
    "tau_teacher_warmup_steps": ({}, {"tau_teacher_warmup_steps": 40}, TARGETS),
    "centring": ({}, {"centring": "sinkhorn"}, VIEW),
    "centring:none": ({}, {"centring": "none"}, {"centres", "targets_next"}),  # the centre starts at 0
    "centre_momentum": ({}, {"centre_momentum": 0.5}, {"centres", "targets_next"}),
    "centre_per_position": ({}, {"centre_per_position": True}, {"centres", "targets_next"}),
    "sinkhorn_iterations": ({"centring": "sinkhorn"}, {"sinkhorn_iterations": 1}, TARGETS),
    "teacher_momentum": ({}, {"teacher_momentum": 0.5}, {"teacher", "targets_next"}),
    "teacher_momentum_end": (
        {"teacher_momentum_end": 0.97, "teacher_momentum_horizon": 10},
        {"teacher_momentum_end": 1.0},
        {"teacher", "targets_next"},
    ),
    "teacher_momentum_horizon": (
        {"teacher_momentum_end": 0.5, "teacher_momentum_horizon": 10},
        {"teacher_momentum_horizon": 20},
        {"teacher", "targets_next"},
    ),
    "share_ema": ({}, {"share_ema": True}, {"teacher", "targets_next"}),
    "num_prototypes": ({}, {"num_prototypes": 32}, HEAD),
    "head_layers": ({}, {"head_layers": 2}, HEAD),
    "head_hidden": ({}, {"head_hidden": 32}, HEAD),
    "head_bottleneck": ({}, {"head_bottleneck": 16}, HEAD),
    "head_init": ({}, {"head_init": "trunc_normal"}, {"head", "teacher", "targets_next"}),
    "head_shared": ({}, {"head_shared": False}, HEAD),
    "prototype_freeze_steps": ({}, {"prototype_freeze_steps": 9}, {"prototype_gradient"}),
}


def digest(value: Any) -> str:
    """Of any nest of tensors and plain values, bit for bit."""
    if isinstance(value, torch.Tensor):
        value = (tuple(value.shape), hashlib.sha256(value.detach().numpy().tobytes()).hexdigest())
    elif isinstance(value, dict):
        value = {k: digest(v) for k, v in value.items()}
    return repr(value)


def fingerprint(**changes: Any) -> dict[str, str]:
    method, parts = untouched(**changes), {}
    parts["draws"] = method.draws()
    parts["initial"], parts["head"] = dict(method.network.state_dict()), dict(method.heads.state_dict())
    parts = {k: digest(v) for k, v in parts.items()}
    scramble_(method.network)
    scramble_(method.heads)
    lagging = [p.clone() for p in method._teacher_parameters]
    equal_teacher(method)
    batch = make_batch(method, 16)
    batch.draws["drop"] = (torch.arange(16) + 0.5) / 16
    (context,) = method.begin_step([batch], 5)
    losses = method(batch, context, 5)
    losses.total.backward()
    method.after_backward(5)
    values: dict[str, Any] = {key: losses.parts[key] for key in ("generative", "discriminative")}
    values["targets"] = context.targets
    encoder = dict(method.teacher.named_parameters())
    values["encoder_gradient"] = {k: p.grad for k, p in method.network.named_parameters() if k in encoder}
    values["prototype_gradient"] = {k: p.grad for k, p in method.heads.named_parameters() if "prototypes" in k}
    with torch.no_grad():
        torch._foreach_copy_(method._teacher_parameters, lagging)
    method.after_optimizer(5)
    method.end_step(5)
    values["teacher"] = {str(i): p for i, p in enumerate(method._teacher_parameters)}
    values["centres"] = {k: v for k, v in method.named_buffers() if "centre" in k}
    noise, y = torch.linspace(-1, 0.5, 16), batch.y
    values["samples"] = method.network(batch.x0, noise, y)
    values["targets_next"] = method.begin_step([batch], 5)[0].targets
    return parts | {k: digest(v) for k, v in values.items()}


def test_the_table_has_every_field_that_counts() -> None:
    fields = {k for k, info in SDDiT.model_fields.items() if NotInDigest not in info.metadata} - {"name"}
    assert {key.partition(":")[0] for key in FIELDS} == fields


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_changes_what_it_names_and_nothing_else(field: str) -> None:
    base, alternative, expected = FIELDS[field]
    before, after = fingerprint(**base), fingerprint(**(base | alternative))
    assert set(before) == set(PARTS)
    changed = {part for part in PARTS if before[part] != after[part]}
    assert changed == expected
