"""The experiment: a typed, validated, frozen tree, and the identity that follows from it.

Free of torch and of everything else in the project but `errors`. Every number that determines a result is a field
here; fields marked `NotInDigest` say where, how fast or how long an experiment runs and never change its identity.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from sddit.errors import UsageError, did_you_mean

FRESH_SEED = 1000  # seeds from here on are fresh: they confirm a best value that the seeds below it picked
SCHEMA = 1  # part of every identity: a default may change only together with it


class _NotInDigest:
    """Marks a field that cannot change a result (or, for `steps`, only how far it goes)."""


class _OnlyUnder(str):
    """Marks a field of one diffusion formulation, which is no part of an experiment under another."""


NotInDigest = _NotInDigest()
OnlyEDM, OnlyIDDPM = _OnlyUnder("edm"), _OnlyUnder("iddpm")
Kind = Literal["edm", "iddpm"]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------- methods


class DiT(Section):
    """Plain diffusion transformer on all tokens (Peebles & Xie, arXiv 2212.09748)."""

    published_kind: ClassVar[Kind] = "iddpm"
    name: Literal["dit"] = "dit"
    class_dropout: Probability = 0.1


class MaskDiT(Section):
    """Encoder on the visible tokens, light decoder with a mask token, MAE loss (Zheng et al., arXiv 2306.09305)."""

    published_kind: ClassVar[Kind] = "edm"
    name: Literal["maskdit"] = "maskdit"
    class_dropout: Probability = 0.1
    mask_ratio: Rate = 0.5
    mask_schedule: Literal["constant", "linear", "cosine4", "exp"] = "constant"  # from mask_ratio ...
    mask_ratio_end: Rate = 0.0  # ... to here ...
    mask_horizon: Count | None = None  # ... over this many steps from step 0
    lambda_mae: Annotated[float, Field(ge=0)] = 0.1  # 0: no mask token, zeros in its place

    @model_validator(mode="after")
    def _schedule_has_horizon(self) -> MaskDiT:
        if (self.mask_schedule == "constant") != (self.mask_horizon is None):
            raise ValueError("mask_horizon is needed with a mask_schedule other than 'constant', and only then")
        return self


class MDT(Section):
    """Masked pass beside the full pass, side-interpolater, relative position bias (Gao et al., arXiv 2303.14389).

    MDTv2 is `version` 'v2' with mask_ratio_max 0.5, decoder_layers 4, diffusion.min_snr_gamma 5, train.optimizer adan
    and train.grad_clip 1.
    """

    published_kind: ClassVar[Kind] = "iddpm"
    name: Literal["mdt"] = "mdt"
    class_dropout: Probability = 0.1
    version: Literal["v1", "v2"] = "v1"  # v2: U-Net skips in the encoder, the embedded input in each decoder block
    mask_ratio: Rate = 0.3
    mask_ratio_max: Rate | None = None  # drawn uniformly in [mask_ratio, mask_ratio_max], once a step
    decoder_layers: Count = 2  # how many of the model's blocks come after the side-interpolater

    @model_validator(mode="after")
    def _range_of_ratios(self) -> MDT:
        if self.mask_ratio_max is not None and self.mask_ratio_max < self.mask_ratio:
            raise ValueError(f"mask_ratio_max {self.mask_ratio_max} is below mask_ratio {self.mask_ratio}")
        return self


class SDDiT(Section):
    """SD-DiT (Zhu et al., arXiv 2403.17004). What the paper leaves open is a field: methods.md §6.3 and §13."""

    published_kind: ClassVar[Kind] = "edm"
    name: Literal["sddit"] = "sddit"
    class_dropout: Probability = 0.1
    mask_ratio: Rate = 0.2  # fraction removed; int(N (1 - M)) tokens stay visible
    # views
    teacher_sigma: Positive | Literal["drawn", "student"] = 0.002  # 'drawn': ln sigma_T uniform in [sigma_min, sigma_S]
    teacher_tokens: Literal["all", "visible"] = "all"
    teacher_label: Literal["same", "never_dropped", "always_dropped"] = "same"
    noise_coupling: Literal["same", "independent"] = "same"  # epsilon of the teacher's view
    # generator
    cls_init_std: Positive = 0.02
    cls_in_decoder: Literal["removed", "forwarded", "embedded"] = "removed"  # embedded: added to the condition
    cls_at_inference: bool = True
    masked_slots: Literal["noisy", "zeros", "nothing"] = "noisy"  # what the decoder receives where the encoder saw
    # nothing; 'nothing' decodes the visible tokens alone, so that L_G has no others
    generative_tokens: Literal["all", "visible"] = "all"  # tokens in L_G
    stop_gradient: bool = False  # True: L_G does not reach the encoder, its embedders included
    decoder: Literal["light", "last_blocks", "wide"] = "light"  # of model.decoder_*; the model's own last blocks, with
    # nothing between; or model.decoder_depth blocks as wide as the encoder's
    last_blocks: Count | None = None  # None: a third of the model's depth
    # discriminative loss
    lambda_d: Annotated[float, Field(ge=0)] = 1.0  # 0: no head, no teacher
    lambda_d_end: Annotated[float, Field(ge=0)] | None = None  # linear from lambda_d to here ...
    lambda_d_horizon: Count | None = None  # ... over this many steps
    discriminated_tokens: Literal["all", "cls", "patches"] = "all"  # tokens in L_D
    tau_student: Positive = 0.1
    tau_teacher: Positive = 0.07  # of the patches, after the warm-up
    tau_teacher_cls: Positive = 0.04
    tau_teacher_start: Positive = 0.04  # of the patches, at step 0
    tau_teacher_warmup_steps: Steps = 150_000
    centring: Literal["ema", "sinkhorn", "none"] = "ema"
    centre_momentum: Rate = 0.9
    centre_per_position: bool = False
    sinkhorn_iterations: Count = 3
    teacher_momentum: Probability = 0.9999
    teacher_momentum_end: Probability | None = None  # cosine from teacher_momentum to here ...
    teacher_momentum_horizon: Count | None = None  # ... over this many steps
    share_ema: bool = False  # True: the teacher is the sampling average (train.ema), and teacher_momentum is unused
    num_prototypes: Count = 8192
    head_layers: Count = 3
    head_hidden: Count = 2048
    head_bottleneck: Count = 256
    head_init: Literal["trunc_normal", "xavier"] = "trunc_normal"
    head_shared: bool = True  # one head for [CLS] and patches
    prototype_freeze_steps: Steps = 5004  # one epoch of ImageNet at batch 256
    collapse_threshold: Annotated[float, NotInDigest] = 0.1  # nat; below it the targets carry no information
    collapse_after: Annotated[Steps, NotInDigest] = 10_000  # steps of grace

    @model_validator(mode="after")
    def _consistent(self) -> SDDiT:
        for field in ("teacher_momentum", "lambda_d"):
            if (getattr(self, f"{field}_end") is None) != (getattr(self, f"{field}_horizon") is None):
                raise ValueError(f"{field}_end and {field}_horizon must be given together, or neither")
        if self.stop_gradient and not (self.discriminates and self.lambda_d_end != 0):
            raise ValueError(
                "method.stop_gradient is true and method.lambda_d is 0 or ends there, so that nothing would train the "
                "encoder. Change either"
            )
        if self.cls_in_decoder != "removed" and not self.cls_at_inference:
            raise ValueError(
                f"method.cls_in_decoder is {self.cls_in_decoder!r}, so [CLS] cannot be absent at inference. "
                "Set method.cls_at_inference to true, or method.cls_in_decoder to 'removed'"
            )
        return self

    @property
    def discriminates(self) -> bool:
        """Whether there is a discriminative loss at any step, and so a head and a teacher."""
        return self.lambda_d > 0 or bool(self.lambda_d_end)


METHOD_CONFIGS: dict[str, type[Section]] = {"dit": DiT, "maskdit": MaskDiT, "mdt": MDT, "sddit": SDDiT}

# ----------------------------------------------------------------------------------------------------- other sections

SAMPLERS: dict[str, tuple[str, ...]] = {"edm": ("heun", "euler"), "iddpm": ("ddpm", "ddim", "dpmpp")}

# depth, width, heads (methods.md §1.2 and §15)
SIZE_GRIDS: dict[str, dict[str, tuple[int, int, int]]] = {
    "paper": {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "H": (32, 1280, 16)},
    "tiny": {"S": (2, 64, 4), "B": (3, 96, 4), "L": (4, 96, 4), "XL": (4, 128, 4)},
}


class Model(Section):
    size: str = "S/2"  # letter / patch side; depth, width and heads follow from the grid
    grid: Literal["paper", "tiny"] = "paper"
    decoder_depth: Count = 8  # the decoder of MaskDiT and SD-DiT, the same for every size
    decoder_width: Count = 512
    decoder_heads: Count = 16

    @field_validator("size")
    @classmethod
    def _known_size(cls, size: str) -> str:
        letter, _, patch = size.partition("/")
        if letter not in SIZE_GRIDS["paper"] or patch not in ("1", "2", "4", "8"):
            raise ValueError("must be a letter of S, B, L, XL, H and a patch side of 1, 2, 4, 8, as in 'S/2'")
        return size

    @model_validator(mode="after")
    def _in_grid(self) -> Model:
        if self.size.partition("/")[0] not in SIZE_GRIDS[self.grid]:
            raise ValueError(f"size {self.size!r} is not in the {self.grid} grid: {', '.join(SIZE_GRIDS[self.grid])}")
        return self

    @property
    def dims(self) -> tuple[int, int, int]:
        """(depth, width, heads) of the encoder."""
        return SIZE_GRIDS[self.grid][self.size.partition("/")[0]]

    @property
    def patch(self) -> int:
        return int(self.size.partition("/")[2])

    def last_blocks(self, asked: int | None) -> int:
        """How many of the blocks are the decoder where SD-DiT's is 'last_blocks': as asked, or a third.

        Raises:
            UsageError: none would be left for the encoder.
        """
        depth = self.dims[0]
        if asked is not None and asked >= depth:
            raise UsageError(f"method.last_blocks is {asked}, but size {self.size!r} has {depth}: leave one at least.")
        return asked or max(1, depth // 3)


class Diffusion(Section):
    """EDM (Karras et al., arXiv 2206.00364) or IDDPM with learnt variance (Nichol & Dhariwal, arXiv 2102.09672).

    A field of the other formulation has no effect and is no part of the experiment's identity.
    """

    kind: Kind = "edm"  # as part of an experiment: the method's published one
    # EDM: preconditioning, training law of sigma, range of the sampler
    sigma_data: Annotated[Positive, OnlyEDM] = 0.5
    p_mean: Annotated[float, OnlyEDM] = -1.2
    p_std: Annotated[Positive, OnlyEDM] = 1.2
    sigma_min: Positive = 0.002  # under IDDPM only the lower end of a drawn teacher's noise
    sigma_max: Annotated[Positive, OnlyEDM] = 80.0
    rho: Annotated[Positive, OnlyEDM] = 7.0
    # IDDPM: a linear schedule, both ends included
    timesteps: Annotated[int, Field(ge=2), OnlyIDDPM] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1), OnlyIDDPM] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1), OnlyIDDPM] = 0.02
    min_snr_gamma: Annotated[Positive | None, OnlyIDDPM] = None  # weight min(SNR, gamma) / SNR (arXiv 2303.09556)

    @property
    def outputs(self) -> int:
        """Channels that the network puts out for each channel of the image: IDDPM also learns the variance."""
        return 2 if self.kind == "iddpm" else 1


class Data(Section):
    # A name in DATASETS, a folder with a manifest.json, or the address of one (s3://, gs://, …).
    path: Annotated[str, NotInDigest] = "digits"
    # Train on fewer images, the same ones whatever the seed; a larger number adds to them. What is scored against stays
    # the whole data set, or eval.reference.
    max_images: Count | None = None
    per_class: Count | None = None  # so many of each class
    flip: bool = False  # random horizontal flip
    hold_out: Rate = 0.0  # fraction of the images that is not trained on, for eval.final
    test_path: Annotated[str | None, NotInDigest] = None  # or a data set of held-out images
    vae: Annotated[str | None, NotInDigest] = None  # of latents, where it is not where their manifest says
    # What the data are where they are not at hand (counting parameters). Those that are must have this shape, if it is
    # given; their classes are what their manifest says.
    shape: Annotated[tuple[int, int, int] | None, NotInDigest] = None  # (C, H, W)
    num_classes: Annotated[Count | None, NotInDigest] = None

    @model_validator(mode="after")
    def _one_subset(self) -> Data:
        if self.max_images is not None and self.per_class is not None:
            raise ValueError(
                f"data.max_images {self.max_images} and data.per_class {self.per_class} cannot both be given. "
                "Leave one of them out"
            )
        return self


class Train(Section):
    steps: Annotated[Count, NotInDigest] = 400_000  # optimiser steps
    batch_size: Count = 256  # global, over all workers
    micro_batch: Annotated[Count | None, NotInDigest] = None  # per worker and pass; None: no accumulation
    optimizer: Literal["adamw", "adan"] = "adamw"
    lr: Positive = 1e-4
    warmup_steps: Steps = 0  # linear, then constant
    beta1: Rate = 0.9  # of AdamW; Adan keeps its own
    beta2: Rate = 0.999
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Positive | None = None  # norm
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; losses, EMA and statistics stay fp32
    ema: float | str = 0.9999  # a rate, or 'power:GAMMA' for (1 - 1/t)^(GAMMA + 1)
    compile: Annotated[bool, NotInDigest] = False
    log_every: Annotated[Count, NotInDigest] = 100

    def ema_beta(self, update: int) -> float:
        """The weight of the past at update 1, 2, … of the sampling average: the rate, or (1 − 1/t)^(GAMMA + 1)
        (EDM2, arXiv 2312.02696, eq. 127)."""
        if isinstance(self.ema, str):
            return (1 - 1 / update) ** (float(self.ema.removeprefix("power:")) + 1)
        return self.ema

    @field_validator("ema")
    @classmethod
    def _ema_rule(cls, ema: float | str) -> float | str:
        if isinstance(ema, str):
            if re.fullmatch(r"power:\d+(\.\d+)?", ema):
                return ema
            try:
                ema = float(ema)
            except ValueError:
                ema = -1.0
        if not 0 <= ema < 1:
            raise ValueError("must be a rate in [0, 1), or 'power:GAMMA' as in 'power:6.94'")
        return ema


class Eval(Section):
    every: Count = 50_000  # steps; evaluations and checkpoints fall on its multiples and on the last step
    samples: Annotated[int, Field(ge=2)] = 50_000
    extractor: str = "inception-v3-compat"
    # What is scored against: None is the data themselves; or pixels as for `sddit evaluate`, which latents need.
    reference: Annotated[str | None, NotInDigest] = None
    metrics: tuple[Literal["fid", "sfid", "is", "precision", "recall", "kid"], ...] = ("fid",)
    seed: Steps = 0
    weights: Literal["ema", "raw"] = "ema"
    labels: Literal["uniform", "cyclic"] = "uniform"  # drawn, or i mod num_classes
    # solver; `Experiment.solver` says what None stands for
    sampler: Literal["heun", "euler", "ddpm", "ddim", "dpmpp"] | None = None
    sampler_steps: Annotated[int, Field(ge=2)] | None = None
    # network evaluations a sample, where no steps are given
    nfe: Annotated[int | None, Field(ge=3), NotInDigest] = None
    churn: Annotated[float, Field(ge=0)] = 0.0  # S_churn of EDM
    # classifier-free guidance; `Experiment.guidance_rule` says what None stands for
    guidance: Annotated[float, Field(ge=0)] = 1.0  # scale; 1 is none
    guidance_rule: Literal["constant", "power-cosine"] | None = None
    guidance_power: Positive = 4.0  # of the power-cosine rule
    guidance_channels: Literal["all", "three"] | None = None
    guidance_interval: tuple[float, float] | None = None  # guided only where sigma is in (low, high]
    # asked for by name, at the last step
    final: tuple[Literal["probe", "copying", "denoising", "seeds"], ...] = ()
    final_seeds: Annotated[int, Field(ge=2)] = 4  # evaluation seeds of 'seeds'
    batch_size: Annotated[Count, NotInDigest] = 128  # samples made at once on one worker
    grid: Annotated[Count, NotInDigest] = 40  # samples in the recorded grid


class Resources(Section):
    """Where a cell runs. Never part of an identity, never changes a result beyond rounding."""

    workers: Annotated[Count, NotInDigest] = 1
    cpus_per_worker: Annotated[Count, NotInDigest] = 1  # also its threads
    gpus_per_worker: Annotated[float | None, Field(ge=0), NotInDigest] = None  # None: 1 where the cluster has GPUs


# --------------------------------------------------------------------------------------------------------- experiment


class Experiment(Section):
    """One training run with its evaluation. Change it with `replace`; read the values it rests on with `flatten`."""

    seed: Annotated[int, Field(ge=0)] = 0
    method: Annotated[DiT | MaskDiT | MDT | SDDiT, Field(discriminator="name")] = SDDiT()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    train: Train = Train()
    eval: Eval = Eval()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _published_kind(cls, values: Any) -> Any:
        """`diffusion.kind`, where it is not given, is the one the method was published with."""
        if not isinstance(values, dict):
            return values
        method, diffusion = values.get("method", {}), values.get("diffusion", {})
        name = method.get("name", "sddit") if isinstance(method, dict) else getattr(method, "name", None)
        if name not in METHOD_CONFIGS or not isinstance(diffusion, dict) or "kind" in diffusion:
            return values
        return {**values, "diffusion": {"kind": METHOD_CONFIGS[name].published_kind, **diffusion}}  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        kind, sampler = self.diffusion.kind, self.eval.sampler
        samplers = SAMPLERS[kind]
        if sampler not in (None, *samplers):
            raise ValueError(f"eval.sampler {sampler!r} is not for {kind} diffusion: use {' or '.join(samplers)}")
        if self.eval.churn and self.solver[0] not in SAMPLERS["edm"]:
            raise ValueError(f"eval.churn is for the samplers {' and '.join(SAMPLERS['edm'])} alone: leave it at 0")
        if self.eval.guidance_rule == "power-cosine" and kind != "iddpm":
            raise ValueError("eval.guidance_rule 'power-cosine' is for iddpm diffusion alone: use 'constant'")
        low, high = self.eval.guidance_interval or (0, 1)
        if low >= high:
            raise ValueError(f"eval.guidance_interval is ({low}, {high}], which is empty: give [low, high] in sigma")
        if kind == "iddpm":
            _check_steps(*self.solver, self.diffusion.timesteps)
        batch, workers = self.train.batch_size, self.resources.workers
        if batch % workers:
            divisors = [str(w) for w in range(1, batch + 1) if batch % w == 0]
            near = sorted({max(workers, batch - batch % workers), batch + workers - batch % workers})
            raise ValueError(
                f"batch_size {batch} is not divisible by {workers} workers. "
                f"Use {' or '.join(map(str, near))}, or --workers {' or '.join(_around(divisors, workers))}."
            )
        micro = self.train.micro_batch
        if micro and (batch // workers) % micro:
            raise ValueError(
                f"{batch // workers} images a worker are not divisible by train.micro_batch {micro}. "
                "Use a divisor, or leave it out."
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Experiment:
        """An experiment from a nested mapping, as `model_dump` gives it.

        Raises:
            UsageError: naming the field, the value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError("\n".join(_explain(e) for e in error.errors())) from None

    def replace(self, changes: Mapping[str, Any]) -> Experiment:
        """A copy with fields given by their dotted names changed, e.g. ``{"method.mask_ratio": 0.3}``.

        Raises:
            UsageError: for an unknown field (the nearest is offered), or a value outside what is allowed.
        """
        values = self.model_dump()
        for path, value in changes.items():
            *sections, field = path.split(".")
            node: Any = values
            for section in sections:
                node = node.get(section) if isinstance(node, dict) else None
            if not isinstance(node, dict) or field not in node or isinstance(node[field], dict):
                raise UsageError(f"Unknown field {path!r}. {did_you_mean(path, flatten(values))}")
            if path == "method.name" and value != self.method.name:
                if value not in METHOD_CONFIGS:
                    raise UsageError(f"Unknown method {value!r}. {did_you_mean(value, METHOD_CONFIGS)}")
                raise UsageError(
                    f"method.name is {self.method.name!r} and cannot be replaced by {value!r}, since each method has "
                    "its own fields. Build the preset for it, e.g. "
                    f"sddit.presets.digits(method={value!r}), or use --set method.name={value} on the command line."
                )
            node[field] = value
        return self.parse(values)

    @property
    def solver(self) -> tuple[str, int]:
        """Sampler and its steps. What is not given follows from the diffusion: as published, or by `eval.nfe`.

        As published: Heun with 40 steps under EDM, ancestral DDPM with 250 under IDDPM. By evaluations: Heun, which
        takes two a step but for the last, or DPM-Solver++, which takes one.
        """
        options, edm = self.eval, self.diffusion.kind == "edm"
        name = options.sampler or ("heun" if edm else "dpmpp" if options.nfe else "ddpm")
        if options.sampler_steps:
            return name, options.sampler_steps
        if options.nfe:
            return name, (options.nfe + 1) // 2 if name == "heun" else options.nfe
        return name, {"heun": 40, "euler": 40, "ddpm": 250, "ddim": 50, "dpmpp": 25}[name]

    @property
    def guidance_rule(self) -> tuple[str, str]:
        """How the guidance scale varies over the steps, and which channels it acts on, as the method's authors did.

        DiT and MDT, under IDDPM, guide the first three channels alone; MDT by a power-cosine.
        """
        method = self.method.name if self.diffusion.kind == "iddpm" else ""
        rule = self.eval.guidance_rule or ("power-cosine" if method == "mdt" else "constant")
        return rule, self.eval.guidance_channels or ("three" if method in ("dit", "mdt") else "all")

    def digest_fields(self) -> dict[str, Any]:
        """The fields that determine the result, by dotted name: the params in MLflow."""
        fields = flatten(_digest_fields(self))
        for name, info in Diffusion.model_fields.items():
            if any(isinstance(mark, _OnlyUnder) and mark != self.diffusion.kind for mark in info.metadata):
                del fields[f"diffusion.{name}"]
        fields["eval.sampler"], fields["eval.sampler_steps"] = self.solver
        fields["eval.guidance_rule"], fields["eval.guidance_channels"] = self.guidance_rule
        if isinstance(self.method, SDDiT) and self.method.decoder == "last_blocks":
            fields["method.last_blocks"] = self.model.last_blocks(self.method.last_blocks)
        return fields

    def identity(self, data_digest: str) -> str:
        """Twelve hexadecimal digits that name this experiment wherever and however long it runs.

        Only fields that differ from their class's default enter, so a field added later leaves finished cells
        finished. `data_digest` stands for the content of the data (see `sddit.data.open_manifest`).
        """
        plain = type(self)(method=type(self.method)(), diffusion=Diffusion(kind=self.diffusion.kind))
        defaults = plain.digest_fields() | {"diffusion.kind": Diffusion().kind}
        fields = {k: v for k, v in self.digest_fields().items() if v != defaults[k]}
        content = {"schema": SCHEMA, "data.digest": data_digest, "method.name": self.method.name, **fields}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _check_steps(sampler: str, steps: int, timesteps: int) -> None:
    """Refuses what would be a step of no length, or a start from pure noise where the process has signal."""
    what = f"{steps} steps of the sampler {sampler!r} (eval.sampler_steps, or eval.nfe)"
    if (largest := timesteps - 1 if sampler == "dpmpp" else timesteps) < steps:
        raise ValueError(f"{what} are more than diffusion.timesteps {timesteps} allow: use at most {largest}")
    stride = timesteps // steps
    if sampler == "ddim" and timesteps // stride != steps:
        raise ValueError(
            f"{what} do not fit diffusion.timesteps {timesteps}: strides of {stride} would leave the noisiest out. "
            f"Use {timesteps // (stride + 1)} or {timesteps // stride}"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def parse_assignment(text: str) -> tuple[str, Any]:
    """``section.field=value`` from the command line; the value is JSON where it can be, else text.

    >>> parse_assignment("method.mask_ratio=0.3")
    ('method.mask_ratio', 0.3)
    """
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise UsageError(f"--set {text!r} is not of the form section.field=value, e.g. --set train.lr=1e-4")
    try:
        return field.strip(), json.loads(value)
    except ValueError:
        return field.strip(), value


def _digest_fields(section: BaseModel) -> dict[str, Any]:
    """The nested values without the fields marked `NotInDigest`."""
    values: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            if nested := _digest_fields(value):
                values[name] = nested
        elif NotInDigest not in info.metadata:
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


def _around(divisors: list[str], workers: int) -> list[str]:
    below = [d for d in divisors if int(d) < workers][-1:]
    return below + [d for d in divisors if int(d) > workers][:1]


def _explain(error: Any) -> str:
    """One pydantic error in our words: field, value, what is allowed."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    # A union adds the name of the branch it tried; the methods' names are such branches.
    parts = [
        str(p) for p in error["loc"] if p not in METHOD_CONFIGS and not str(p).startswith(("literal[", "function"))
    ]
    path = ".".join(p for p in parts if p not in ("float", "str", "int", "constrained-float"))
    if kind == "extra_forbidden":
        section = Experiment.model_fields.get(parts[0])
        annotation = section.annotation if section else None
        known: list[str] = list(Experiment.model_fields)
        if parts[0] == "method":
            known = list(METHOD_CONFIGS.get(str(error["loc"][1]), DiT).model_fields)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            known = list(annotation.model_fields)
        return f"Unknown field {path!r}. {did_you_mean(parts[-1], known)}"
    if kind == "union_tag_invalid":
        return f"Unknown method {context['tag']!r}. {did_you_mean(context['tag'], METHOD_CONFIGS)}"
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        return f"{path} is {value!r}, but must be one of these. {did_you_mean(value, expected)}"
    if kind == "value_error":
        message = str(context["error"])
        return f"{path} is {value!r}, but {message}." if path and not isinstance(value, BaseModel | dict) else message
    bounds = {
        "greater_than": "> {gt}", "greater_than_equal": "≥ {ge}", "less_than": "< {lt}", "less_than_equal": "≤ {le}",
    }  # fmt: skip
    if kind in bounds:
        return f"{path} is {value}, but must be {_range_of(path) or bounds[kind].format(**context)}."
    return f"{path} is {value!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def check_value(path: str, value: Any) -> None:
    """Whether a field may hold a value by itself; an unknown one, of another version, may hold anything.

    Raises:
        ValueError: it may not.
    """
    try:
        _adapter(path).validate_python(value)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None


@functools.cache
def _adapter(path: str) -> TypeAdapter:
    section, _, name = path.rpartition(".")
    fields = [getattr(owner, "model_fields", {}).get(name) for owner in _owners(section)]
    kinds: Any = tuple(Annotated[field.annotation, Field(), *field.metadata] for field in fields if field)
    return TypeAdapter(Union[kinds or Any])  # type: ignore[arg-type]  # noqa: UP007


def _owners(section: str) -> list[Any]:
    """The classes whose fields a section may have."""
    if section == "method":
        return list(METHOD_CONFIGS.values())
    field = Experiment.model_fields.get(section)
    return [field.annotation if field else Experiment if not section else None]


def _range_of(path: str) -> str | None:
    """Both bounds of a field in words, e.g. 'in [0, 1)'."""
    section, _, name = path.rpartition(".")
    for owner in _owners(section):
        info = getattr(owner, "model_fields", {}).get(name)
        bounds = {
            k: getattr(m, k)
            for m in getattr(info, "metadata", [])
            for k in ("ge", "gt", "le", "lt")
            if hasattr(m, k) and getattr(m, k) is not None
        }
        low = f"[{bounds['ge']:g}" if "ge" in bounds else f"({bounds['gt']:g}" if "gt" in bounds else None
        high = f"{bounds['le']:g}]" if "le" in bounds else f"{bounds['lt']:g})" if "lt" in bounds else None
        if low and high:
            return f"in {low}, {high}"
    return None
