"""The experiment: a typed, validated, frozen tree, and the identity that follows from it.

Free of torch and of everything else in the project but `errors`. Every number that determines a result is a field
here; fields marked `NotInDigest` say where, how fast or how long an experiment runs and never change its identity.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sddit.errors import UsageError, did_you_mean

SCHEMA = 1  # part of every identity: a default may change only together with it


class _NotInDigest:
    """Marks a field that cannot change a result (or, for `steps`, only how far it goes)."""


NotInDigest = _NotInDigest()
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------- methods


class DiT(Section):
    """Plain diffusion transformer (methods.md §2), on all tokens."""

    name: Literal["dit"] = "dit"
    class_dropout: Probability = 0.1


class SDDiT(Section):
    """SD-DiT (methods.md §6). Everything that 6.3 calls inferred is a field; defaults are those of 6.3."""

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
    masked_slots: Literal["noisy", "zeros"] = "noisy"  # what the decoder receives where the encoder saw nothing
    generative_tokens: Literal["all", "visible"] = "all"  # tokens in L_G
    stop_gradient: bool = False  # True: L_G does not reach the encoder
    # discriminative loss
    lambda_d: Annotated[float, Field(ge=0)] = 1.0  # 0: no head, no teacher
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
    def _cosine_has_horizon(self) -> SDDiT:
        if (self.teacher_momentum_end is None) != (self.teacher_momentum_horizon is None):
            raise ValueError("teacher_momentum_end and teacher_momentum_horizon must be given together, or neither")
        return self


METHOD_CONFIGS: dict[str, type[Section]] = {"dit": DiT, "sddit": SDDiT}

# ----------------------------------------------------------------------------------------------------- other sections

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


class Diffusion(Section):
    """EDM (methods.md §3.2): preconditioning, the training law of sigma, and the range of the sampler."""

    kind: Literal["edm"] = "edm"
    sigma_data: Positive = 0.5
    p_mean: float = -1.2
    p_std: Positive = 1.2
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0


class Data(Section):
    path: Annotated[str, NotInDigest] = "digits"  # a name in DATASETS, or a folder with a manifest.json
    flip: bool = False  # random horizontal flip
    # Used only where the data are not at hand (counting parameters); a manifest always wins.
    shape: Annotated[tuple[int, int, int] | None, NotInDigest] = None  # (C, H, W)
    num_classes: Annotated[Count | None, NotInDigest] = None


class Train(Section):
    steps: Annotated[Count, NotInDigest] = 400_000  # optimiser steps
    batch_size: Count = 256  # global, over all workers
    micro_batch: Annotated[Count | None, NotInDigest] = None  # per worker and pass; None: no accumulation
    lr: Positive = 1e-4
    warmup_steps: Steps = 0  # linear, then constant
    beta1: Rate = 0.9
    beta2: Rate = 0.999
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Positive | None = None  # norm
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; losses, EMA and statistics stay fp32
    ema: float | str = 0.9999  # a rate, or 'power:GAMMA' for (1 - 1/t)^(GAMMA + 1)
    compile: Annotated[bool, NotInDigest] = False
    log_every: Annotated[Count, NotInDigest] = 100

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
    metrics: tuple[Literal["fid"], ...] = ("fid",)
    seed: Steps = 0
    guidance: Annotated[float, Field(ge=0)] = 1.0  # classifier-free guidance scale; 1 is none
    weights: Literal["ema", "raw"] = "ema"
    labels: Literal["uniform", "cyclic"] = "uniform"  # drawn, or i mod num_classes
    sampler: Literal["heun"] = "heun"
    sampler_steps: Annotated[int, Field(ge=2)] = 40
    churn: Annotated[float, Field(ge=0)] = 0.0  # S_churn of EDM
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
    method: Annotated[DiT | SDDiT, Field(discriminator="name")] = SDDiT()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    train: Train = Train()
    eval: Eval = Eval()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
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

    def digest_fields(self) -> dict[str, Any]:
        """The fields that determine the result, by dotted name: the params in MLflow."""
        return flatten(_digest_fields(self))

    def identity(self, data_digest: str) -> str:
        """Twelve hexadecimal digits that name this experiment wherever and however long it runs.

        Only fields that differ from their class's default enter, so a field added later leaves finished cells
        finished. `data_digest` stands for the content of the data (see `sddit.data.open_manifest`).
        """
        defaults = type(self)(method=type(self.method)()).digest_fields()
        fields = {k: v for k, v in self.digest_fields().items() if v != defaults[k]}
        content = {"schema": SCHEMA, "data.digest": data_digest, "method.name": self.method.name, **fields}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


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


def _range_of(path: str) -> str | None:
    """Both bounds of a field in words, e.g. 'in [0, 1)'."""
    section, _, name = path.rpartition(".")
    owners = METHOD_CONFIGS.values() if section == "method" else [Experiment.model_fields[section].annotation]
    for owner in owners:
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
