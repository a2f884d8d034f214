"""SD-DiT: the diffusion loss through a decoder, self-distillation at the encoder (arXiv 2403.17004; methods.md §6).

The student's encoder sees the visible tokens of x0 + σ_S eps; the teacher, its moving average, sees x0 + σ_T eps with
σ_T near zero. What the paper leaves open is a field of `config.SDDiT`.

Letters: B batch, N tokens, K visible, P prototypes; S student, T teacher; L_G generative, L_D discriminative loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from sddit.config import Experiment
from sddit.config import SDDiT as SDDiTConfig
from sddit.methods import discrimination
from sddit.methods.base import Batch, Draws, Losses, Method
from sddit.models import build_network, masking
from sddit.models.layers import Encoder, keyed_init_, patchify
from sddit.models.sddit import SDDiT


@dataclass
class Context:
    """What a micro-batch's losses need beyond the batch."""

    y: Tensor  # (B,) labels, some dropped
    level: Tensor  # (B,) noise level of the student's view, in the unit of the process
    mask: masking.Mask | None  # None: all tokens are visible
    targets: Tensor | None = None  # (B, 1 + K, P): P_T of [CLS] and of the visible tokens in the mask's order

    @property
    def ids_keep(self) -> Tensor | None:
        return self.mask.ids_keep if self.mask else None


class SDDiTMethod(Method):
    network: SDDiT

    def __init__(self, experiment: Experiment, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(experiment, shape, num_classes)
        assert isinstance(experiment.method, SDDiTConfig)
        self.options = options = experiment.method
        network = build_network(experiment, shape, num_classes)
        assert isinstance(network, SDDiT)
        self.network = network
        self.keep = masking.keep_count(network.num_tokens, options.mask_ratio)
        self.decoded = "visible" if options.masked_slots == "nothing" else "all"
        self.targets_of_step: Tensor | None = None
        if not options.discriminates:
            return

        self.heads = discrimination.Heads(options, network.width)
        keyed_init_(self.heads, experiment.seed)
        groups = network.num_tokens if options.centre_per_position else 1
        self.targets_cls = discrimination.Targets(options)
        self.targets_patch = discrimination.Targets(options, groups)

        depth, (_, width, heads) = len(network.blocks), experiment.model.dims
        self.teacher = Encoder(
            shape, num_classes, depth, width, heads, network.patch, null_row=False, cls_std=options.cls_init_std
        )
        self.teacher_heads = discrimination.Heads(options, network.width)
        student = network.state_dict()
        self.teacher.load_state_dict({name: student[name] for name in self.teacher.state_dict()})
        self.teacher_heads.load_state_dict(self.heads.state_dict())
        trained = dict(chain(network.named_parameters(), self.heads.named_parameters(prefix="heads")))
        followers = dict(chain(self.teacher.named_parameters(), self.teacher_heads.named_parameters(prefix="heads")))
        names = [name for name in followers if trained[name].requires_grad]
        self._student_parameters: list[Tensor] = [trained[name] for name in names]
        self._teacher_parameters: list[Tensor] = [followers[name].requires_grad_(False) for name in names]
        if experiment.train.compile:
            self._teacher_logits = torch.compile(self._teacher_logits)  # type: ignore[method-assign]

    def train(self, mode: bool = True) -> SDDiTMethod:
        super().train(mode)
        if self.options.discriminates:
            self.teacher.eval()
            self.teacher_heads.eval()
        return self

    def draws(self) -> Draws:
        draws = super().draws()
        if self.keep < self.network.num_tokens:
            draws["mask"] = ("uniform", (self.network.num_tokens,))
        if self.options.discriminates and self.options.teacher_sigma == "drawn":
            draws["sigma_teacher"] = ("uniform", ())
        if self.options.discriminates and self.options.noise_coupling == "independent":
            draws["noise_teacher"] = ("normal", self.shape)
        return draws

    # ------------------------------------------------------------------------------------------- before the gradient

    @torch.no_grad()
    def begin_step(self, batches: list[Batch], step: int) -> list[Context]:
        """Masks, and the teacher's targets, which may depend on every token of the global batch."""
        contexts = [self._context(batch) for batch in batches]
        if not self.options.discriminates:
            return contexts
        parts = [self._teacher_logits(batch, context) for batch, context in zip(batches, contexts, strict=True)]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        masks = [context.mask for context in contexts if context.mask]
        ids_keep = torch.cat([mask.ids_keep for mask in masks]) if masks else None
        targets = self._targets(logits, ids_keep, step)
        for context, part in zip(contexts, targets.split([len(batch.x0) for batch in batches]), strict=True):
            context.targets = part
        self.targets_of_step = targets
        return contexts

    def _context(self, batch: Batch) -> Context:
        mask = masking.random_mask(batch.draws["mask"], self.keep) if "mask" in batch.draws else None
        return Context(self.drop_labels(batch.y, batch.draws["drop"]), self.process.level(batch.draws), mask)

    def _teacher_logits(self, batch: Batch, context: Context) -> Tensor:
        """(B, 1 + N, P) of the cleaner view; only 1 + K tokens where the teacher sees what the student sees."""
        options = self.options
        level = self._teacher_level(batch, context)
        eps = batch.draws["noise" if options.noise_coupling == "same" else "noise_teacher"]
        y = {
            "same": context.y,
            "never_dropped": batch.y,
            "always_dropped": torch.full_like(batch.y, self.num_classes),
        }[options.teacher_label]
        x = self.process.network_input(batch.x0, eps, level)
        bf16 = self.experiment.train.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            tokens, c = self.teacher.embed(x), self.teacher.condition(self.process.condition(level), y)
            encoded = self.teacher.encode(tokens, c, context.ids_keep if options.teacher_tokens == "visible" else None)
            return self.teacher_heads(encoded)

    def _teacher_level(self, batch: Batch, context: Context) -> Tensor:
        if self.options.teacher_sigma == "student":
            return context.level
        sigma = self.process.sigma(context.level)
        if self.options.teacher_sigma == "drawn":  # ln σ_T uniform between ln σ_min and ln σ_S
            low = math.log(self.experiment.diffusion.sigma_min)
            return self.process.level_of((low + batch.draws["sigma_teacher"] * (sigma.log() - low)).exp())
        return self.process.level_of(torch.full_like(sigma, self.options.teacher_sigma))

    def _targets(self, logits: Tensor, ids_keep: Tensor | None, step: int) -> Tensor:
        """P_T (B, 1 + K, P). Centre and balance over all tokens that the teacher saw, then keep the visible ones."""
        options, (b, n, p) = self.options, logits[:, 1:].shape
        drop = ids_keep if options.teacher_tokens == "all" else None  # what is left to leave out
        positions = None
        if options.centre_per_position:
            everywhere = torch.arange(n, device=logits.device).expand(b, n)
            positions = everywhere if drop is not None or ids_keep is None else ids_keep
        tau_cls, tau_patch = options.tau_teacher_cls, self.tau_teacher(step)
        if options.centring == "sinkhorn":
            cls = self.targets_cls(logits[:, 0], tau_cls)
            flat = positions.flatten() if positions is not None else None
            patch = self.targets_patch(logits[:, 1:].flatten(0, 1), tau_patch, flat).view(b, n, p)
            return torch.cat([cls[:, None], patch if drop is None else masking.gather(patch, drop)], dim=1)
        self.targets_cls.observe(logits[:, :1])
        self.targets_patch.observe(logits[:, 1:], positions)
        if drop is not None:
            logits = masking.gather(logits, torch.cat([torch.zeros_like(drop[:, :1]), drop + 1], dim=1))
            positions = drop if positions is not None else None
        self.targets_cls.centre_(logits[:, :1], tau_cls)
        self.targets_patch.centre_(logits[:, 1:], tau_patch, positions)
        return torch.softmax(logits, dim=2)

    def tau_teacher(self, step: int) -> float:
        """τ_T of the patches: linear warm-up, then constant."""
        options = self.options
        return discrimination.ramp(
            options.tau_teacher_start, options.tau_teacher, step, options.tau_teacher_warmup_steps
        )

    # ------------------------------------------------------------------------------------------------------ the loss

    def forward(self, batch: Batch, context: Context, step: int) -> Losses:
        network, options, process = self.network, self.options, self.process
        x0, eps, level = batch.x0, batch.draws["noise"], context.level
        tokens = network.embed(process.network_input(x0, eps, level))
        c = network.condition(process.condition(level), context.y)
        encoded = network.encode(tokens, c, context.ids_keep)

        # Embedders are part of the encoder: with stop_gradient, L_G reaches none of what the teacher copies.
        shared = (encoded, tokens, c)
        if options.stop_gradient:
            shared = (encoded.detach(), tokens.detach(), c.detach())
        output = network.decode(*shared, context.ids_keep)
        error = process.error(output, x0, eps, level)
        if context.mask and "visible" in (options.generative_tokens, self.decoded):
            visible = 1 - context.mask.removed
            per_image = (patchify(error, network.patch).mean(dim=2) * visible).sum(dim=1) / self.keep
        else:
            per_image = error.mean(dim=(1, 2, 3))
        total = per_image.mean()
        parts = {"generative": total.detach()}

        if context.targets is not None:
            tokens_ce = discrimination.cross_entropy(self.heads(encoded, options.tau_student), context.targets)
            cls, patch = tokens_ce[:, 0], tokens_ce[:, 1:].mean(dim=1)
            # A weight of 0, not a term left out: every parameter gets a gradient, as DistributedDataParallel asks.
            in_loss = [float(options.discriminated_tokens in ("all", kind)) for kind in ("cls", "patches")]
            discriminative = (in_loss[0] * cls + in_loss[1] * patch).mean()
            total = total + self.lambda_d(step) * discriminative
            parts |= {"discriminative_cls": cls.detach().mean(), "discriminative_patch": patch.detach().mean()}
            parts["discriminative"] = discriminative.detach()
        return Losses(total, per_image.detach(), parts)

    def lambda_d(self, step: int) -> float:
        options = self.options
        if options.lambda_d_end is None or options.lambda_d_horizon is None:
            return options.lambda_d
        return discrimination.ramp(options.lambda_d, options.lambda_d_end, step, options.lambda_d_horizon)

    # -------------------------------------------------------------------------------------------- after the gradient

    def after_backward(self, step: int) -> None:
        if self.options.discriminates and step < self.options.prototype_freeze_steps:
            for head in self.heads.values():
                head.get_parameter("prototypes.weight").grad = None

    @torch.no_grad()
    def after_optimizer(self, step: int) -> None:
        if self.options.discriminates:
            torch._foreach_lerp_(self._teacher_parameters, self._student_parameters, 1 - self.teacher_momentum(step))

    def teacher_momentum(self, step: int) -> float:
        """a in θ̄ ← a θ̄ + (1 - a) θ."""
        options = self.options
        if options.share_ema:
            return self.experiment.train.ema_beta(step + 1)
        if options.teacher_momentum_end is None or options.teacher_momentum_horizon is None:
            return options.teacher_momentum
        end, horizon = options.teacher_momentum_end, options.teacher_momentum_horizon
        return discrimination.cosine(options.teacher_momentum, end, step, horizon)

    def end_step(self, step: int) -> None:
        if self.options.discriminates:
            self.targets_cls.update()
            self.targets_patch.update()

    def diagnostics(self) -> dict[str, Tensor]:
        """The information of the step's targets: healthy or collapsed (methods.md §8.4(7))."""
        if self.targets_of_step is None:
            return {}
        cls, patch = self.targets_of_step[:, 0], self.targets_of_step[:, 1:].flatten(0, 1)
        names = ("information_cls", "information_patch")
        return dict(zip(names, discrimination.information(cls, patch), strict=True))
