"""The one training loop: resume → batch → loss → optimiser → teacher, EMA, centre → evaluate → checkpoint → report.

A step is a pure function of (seed, step) over the global batch, so 1 or 8 workers, straight through or resumed, give
the same result. Knows torch and torch.distributed; reports through `Reporter` and imports neither ray nor mlflow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sddit import cost, seeding
from sddit.config import Experiment
from sddit.data.sampler import BatchSampler, ImageSet
from sddit.errors import CheckpointError, DivergedError
from sddit.methods.base import Batch, Method
from sddit.metrics.features import Extractor
from sddit.metrics.reference import Reference
from sddit.training import distributed, evaluation
from sddit.training.diagnostics import Setting, diagnose
from sddit.training.state import Clocks, TrainState
from sddit.training.store import CheckpointStore

log = logging.getLogger(__name__)
Metrics = dict[str, float]


class Reporter(Protocol):
    """Where a run's record goes. Called on rank 0 only, but for `evaluated`, which every worker calls."""

    def points(self, step: int, metrics: Metrics) -> None:
        """Metric values of a step, by their names in MLflow. Each (step, name) once over all starts of a run."""

    def grid(self, step: int, image: np.ndarray) -> None:
        """A sample grid, uint8 (H, W, C)."""

    def tag(self, name: str, value: str) -> None:
        """A fact about the run that may change."""

    def pending(self) -> list[Any]:
        """What is not yet recorded, as plain values that go into the checkpoint."""

    def restore(self, pending: list[Any]) -> None:
        """Takes back what `pending` gave before a kill."""

    def evaluated(self, step: int, metrics: Metrics) -> None:
        """An evaluation is done and its checkpoint durable. A scheduler may end the run here, by not returning."""


@dataclass(frozen=True)
class Result:
    """How a run ended. `finished` is False after a soft stop, which left a checkpoint."""

    step: int
    finished: bool
    metrics: Metrics
    checkpoint: str
    clocks: Clocks


def train(
    experiment: Experiment,
    method: Method,
    sampler: BatchSampler,
    *,
    store: CheckpointStore,
    reporter: Reporter,
    extractor: Extractor,
    reference: Callable[[], Reference],
    device: torch.device,
    held_out: ImageSet | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """Trains to `experiment.train.steps`, from the newest checkpoint in `store` if there is one.

    Every worker of a process group calls this with the same arguments. `reference` gives the statistics of the
    reference set (rank 0), `held_out` the images for `eval.final`, by default those that the sampler sets aside.
    `should_stop` is asked after each step, with several workers where metrics are recorded; on any worker's True all
    stop after a checkpoint.

    Raises:
        DivergedError: a loss was not finite; names step, batch positions and the last good checkpoint.
        CheckpointError: the checkpoints were slimmed, or the workers do not see the same ones.
    """
    options, steps = experiment.train, experiment.train.steps
    rank, world_size = distributed.rank(), distributed.world_size()
    warn_if_slow(experiment, device)

    # Resume: the newest checkpoint that verifies.
    state = TrainState.create(experiment, method, device)
    last_metrics: Metrics = {}
    warned = False
    if found := store.latest():
        checkpoint, tensors = found
        state.restore(checkpoint.step, checkpoint.values, tensors)
        last_metrics, warned = checkpoint.values["metrics"], checkpoint.values["warned"]
        if rank == 0:
            reporter.restore(checkpoint.values["pending"])
            reporter.tag("sddit.continued_from", str(checkpoint.step))  # what came after it is computed again
        del found, checkpoint, tensors  # gigabytes, for as long as the cell runs
    if state.step != (first := distributed.broadcast_values(state.step)):
        raise CheckpointError(
            f"Worker {rank} sees step {state.step} under {store.root}, but worker 0 sees step {first}. "
            "Give --storage a place that every node can read, such as s3://bucket/path."
        )
    network = state.ema.network if experiment.eval.weights == "ema" else method.network
    if state.step == 0 and rank == 0:
        reporter.grid(0, evaluation.sample_grid(method, network, device))

    model: torch.nn.Module = method
    if options.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if world_size > 1:
        model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    flops_per_step = cost.training_flops_per_image(experiment, method.shape) * options.batch_size
    share = options.batch_size // world_size
    vae = sampler.shards.manifest.vae
    guard = FiniteGuard(store, rank * share, share)
    trainable = [p for p in method.parameters() if p.requires_grad]
    checkpoint_uri = f"{store.root}/step-{state.step:08d}"
    lap, clocks, waited = Lap(), state.clocks, 0.0
    logged_images, logged_seconds = state.step * options.batch_size, clocks.train_seconds
    stopped = False

    with contextlib.closing(_batches(experiment, method, sampler, state.step, device)) as batches:
        while state.step < steps and not stopped:
            asked = time.perf_counter()
            micro_batches = next(batches)
            waited += time.perf_counter() - asked
            step = state.step  # 0-based in schedules and streams; the points of this step are recorded at step + 1
            _set_learning_rate(state.optimizer, options.lr, options.warmup_steps, step)

            # Gradient over the global batch.
            contexts = method.begin_step(micro_batches, step)
            losses = []
            for i, (batch, context) in enumerate(zip(micro_batches, contexts, strict=True)):
                last = i == len(micro_batches) - 1
                unsynced = model.no_sync() if world_size > 1 and not last else contextlib.nullcontext()  # type: ignore[operator]
                with unsynced:
                    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                        loss = model(batch, context, step)
                    (loss.total / len(micro_batches)).backward()
                losses.append(loss)
            totals = torch.stack([loss.total.detach().float() for loss in losses])
            guard.check(step + 1, torch.cat([*(loss.per_image for loss in losses), totals]))
            method.after_backward(step)
            if options.grad_clip:
                torch.nn.utils.clip_grad_norm_(trainable, options.grad_clip)

            # Updates, in the order of architecture.md §1.1.
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            method.after_optimizer(step)
            state.ema.update(step + 1)
            method.end_step(step)
            state.step = step = step + 1

            if step % options.log_every == 0:
                parts = {"loss": totals.mean()}
                for name in losses[0].parts:
                    parts[f"loss_{name}"] = torch.stack([x.parts[name].float() for x in losses]).mean()
                means, health = distributed.mean(parts), method.diagnostics()  # collectives: every worker
                clocks.add(train=lap(), workers=world_size)
                metrics = {f"train/{k}": v for k, v in means.items()}
                metrics |= {f"train/{k}": float(v) for k, v in health.items()}
                images = step * options.batch_size
                seconds = clocks.train_seconds - logged_seconds
                metrics["train/images_per_s"] = (images - logged_images) / seconds
                metrics["train/data_wait"] = waited / seconds  # fraction of the time, on this worker
                logged_images, logged_seconds, waited = images, clocks.train_seconds, 0.0
                if rank == 0:
                    reporter.points(step, metrics)

            # Workers agree by a collective, which costs a step some time: where there are several, now and then.
            if should_stop is not None and step < steps and (world_size == 1 or step % options.log_every == 0):
                stopped = distributed.any_true(should_stop(), device)
            due = step % experiment.eval.every == 0 or step == steps
            if not (due or stopped):
                continue

            guard.flush_together(device)
            clocks.add(train=lap(), workers=world_size)
            if due:
                real = reference() if rank == 0 else None
                final = experiment.eval.final if step == steps else ()
                result = evaluation.evaluate(method, network, extractor, real, device, keep_features="copying" in final)
                if final:
                    unseen = sampler.held_out_images() if held_out is None else held_out
                    train_images = sampler.training_images()
                    setting = Setting(method, network, extractor, real, train_images, unseen, device, result)
                    result.metrics |= diagnose(final, setting)
                clocks.add(evaluation=lap(), workers=world_size)
                last_metrics, health = result.metrics, method.diagnostics()
                if rank == 0:
                    if not warned and (warning := collapse(experiment, step, health)):
                        warned = True
                        log.warning(warning)
                        warnings.warn(warning, stacklevel=2)
                        reporter.tag("sddit.collapse", warning)
                    if result.grid is not None:
                        reporter.grid(step, result.grid)
                    reporter.points(step, last_metrics | costs(state, options.batch_size, flops_per_step))
            if rank == 0:
                if stopped and not due:
                    reporter.tag("sddit.device_hours", f"{state.clocks.device_seconds / 3600:.6g}")
                checkpoint_uri = store.save(
                    step,
                    state.groups(),
                    {
                        "experiment": experiment.model_dump(mode="json"),
                        "shape": list(method.shape),
                        "num_classes": method.num_classes,
                        "vae": vae and vae.model_dump(mode="json"),
                        "clocks": dataclasses.asdict(state.clocks),
                        "metrics": last_metrics,
                        "warned": warned,
                        "pending": reporter.pending(),
                    },
                )
            if due:
                reporter.evaluated(step, last_metrics)
            lap()  # recording and checkpointing are neither training nor evaluation

    if rank == 0 and not stopped:
        store.prune(keep=1)
    return Result(state.step, state.step >= steps, last_metrics, checkpoint_uri, clocks)


class FiniteGuard:
    """Stops a run whose losses are not finite, one step late on a GPU so that the host never waits for the device.

    `first` and `count` are the worker's positions in the global batch.
    """

    def __init__(self, store: CheckpointStore, first: int, count: int) -> None:
        self.store, self.first, self.count = store, first, count
        self.waiting: tuple[int, Tensor] | None = None

    def check(self, step: int, losses: Tensor) -> None:
        """`losses` are those of the worker's images, followed by the totals of its micro-batches."""
        self.flush()
        self.waiting = (step, losses)
        if losses.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Looks at what waits on this worker."""
        if problem := self._problem():
            raise DivergedError(problem)

    def flush_together(self, device: torch.device) -> None:
        """Looks at what waits on all workers; called before every checkpoint, so none is written after a non-finite
        loss on any of them."""
        problem = self._problem()
        if distributed.any_true(problem is not None, device):
            raise DivergedError(problem or "The loss is not finite on another worker, whose message says where.")

    def _problem(self) -> str | None:
        if self.waiting is None:
            return None
        (step, losses), self.waiting = self.waiting, None
        finite = torch.isfinite(losses)
        if bool(finite.all()):
            return None
        positions = (torch.nonzero(~finite[: self.count]).flatten() + self.first).tolist()
        shown = ", ".join(map(str, positions[:8])) + (", …" if len(positions) > 8 else "")
        where = f"position {shown} of the batch" if positions else "no single image, so in the discriminative loss"
        good = self.store.checkpoints()[:1]
        last = f"The last good checkpoint is {good[0].uri}" if good else "There is no checkpoint yet"
        return (
            f"The loss at step {step} is not finite: {where}. {last}. "
            "Try a smaller train.lr, train.grad_clip=1, or train.precision=fp32."
        )


def collapse(experiment: Experiment, step: int, health: dict[str, Tensor]) -> str | None:
    """A sentence when the targets of the discriminative loss carry no information any more (methods.md §8.4(7))."""
    threshold = getattr(experiment.method, "collapse_threshold", None)
    if threshold is None or step < experiment.method.collapse_after:  # type: ignore[union-attr]
        return None
    dead = {k.removeprefix("information_"): float(v) for k, v in health.items() if float(v) < threshold}
    if not dead:
        return None
    which = " and ".join(f"{k} {v:.3f} nat" for k, v in dead.items())
    return f"The discriminative loss has collapsed at step {step}: information {which}, below {threshold:g} nat."


class Lap:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.mark = time.perf_counter()

    def __call__(self) -> float:
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before


def costs(state: TrainState, batch_size: int, flops_per_step: float) -> Metrics:
    """What the run has cost up to its step, over all its starts: images, device-hours and training FLOPs."""
    return {
        "cost/images": float(state.step * batch_size),
        "cost/device_hours": state.clocks.device_seconds / 3600,
        "cost/flops": state.step * flops_per_step,
    }


def warn_if_slow(experiment: Experiment, device: torch.device) -> None:
    """Says so when the asked precision is emulated on this processor; never changes it."""
    if experiment.train.precision == "bf16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        warnings.warn(
            "train.precision is bf16, but this processor has no bf16 instructions: expect it to be tens of times "
            "slower than fp32. Use --set train.precision=fp32 here.",
            stacklevel=2,
        )


def _set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, warmup_steps: int, step: int) -> None:
    """Linear warm-up over the first `warmup_steps` updates, constant after it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / max(1, warmup_steps))


def _batches(
    experiment: Experiment, method: Method, sampler: BatchSampler, first_step: int, device: torch.device
) -> Generator[list[Batch]]:
    """This worker's micro-batches of each step, the next ones made while a step runs."""
    size = experiment.train.batch_size // distributed.world_size()
    lo = distributed.rank() * size
    micro = experiment.train.micro_batch or size
    draws = method.draws()

    def make(step: int) -> list[Batch]:
        arrays = dict(zip(("x0", "y"), sampler.batch(step, lo, lo + size), strict=True))
        for stream, (law, shape) in draws.items():
            draw = getattr(seeding, law)(experiment.seed, stream, step, lo, lo + size, shape)
            arrays[stream] = draw.astype(np.float32, copy=False)
        tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
        if device.type == "cuda":
            tensors = {k: v.pin_memory().to(device, non_blocking=True) for k, v in tensors.items()}
        x0, y = tensors.pop("x0"), tensors.pop("y")
        cuts = range(0, size, micro)
        return [
            Batch(x0[i : i + micro], y[i : i + micro], {k: v[i : i + micro] for k, v in tensors.items()}) for i in cuts
        ]

    # To draw a batch takes a core some 40 ms per million numbers, which a GPU may be done with sooner.
    ahead = 4 if device.type == "cuda" else 1
    with ThreadPoolExecutor(ahead, thread_name_prefix="batches") as pool:
        futures: deque[Future[list[Batch]]] = deque(pool.submit(make, first_step + i) for i in range(ahead))
        for step in itertools.count(first_step + ahead):
            batches = futures.popleft().result()
            futures.append(pool.submit(make, step))
            yield batches
