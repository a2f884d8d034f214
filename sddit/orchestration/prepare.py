"""``sddit prepare``: the shards of a data set made by Ray Data on all CPUs and GPUs of the cluster, with progress.

What a shard is, and what a killed run leaves, is `data/prepare.py`'s. One row is one shard. An actor on each CPU does
it all; for latents, where there are GPUs, tasks decode and an actor on each GPU encodes and writes. A worker
holds one shard, at most 256 MiB of pixels and half as much encoded; on the way to the GPUs wait at most two for each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sddit.data.job import PLAN, SHARD_BYTES, UNREADABLE, Job
from sddit.data.prepare import Report, Task, decode_shard, write_task
from sddit.errors import DataError, SdditError, UsageError
from sddit.filesystem import is_remote, open_filesystem
from sddit.orchestration import cluster
from sddit.orchestration.progress import duration, make_console

if TYPE_CHECKING:
    from ray.data import Dataset

WAITING = 2  # decoded shards for each GPU that encodes, on their way through Ray's object store
SAY_SECONDS = 10.0  # between two lines where there is no terminal
Batch = Any  # dict[str, np.ndarray], one row; Ray's own types are wider


def prepare(*, workers: int | None = None, gpus: int | None = None, **arguments: Any) -> None:
    """Prepares a data set, or goes on with it, and says what it does. Other arguments and errors are those of `Job`.

    Args:
        workers: shards made at once, at most; by default as many as the cluster has CPUs or can get (or GPUs that
            encode).
        gpus: actors that encode on a GPU each; by default one for each GPU there is now. More than there are let an
            autoscaling cluster start nodes; 0 encodes on CPUs.
    """
    console = make_console()
    for option, value, least in (("--workers", workers, 1), ("--gpus", gpus, 0)):
        if value is not None and value < least:
            raise UsageError(f"{option} is {value}, but must be at least {least}.")
    job = Job(**arguments)
    plan = job.plan
    if job.done:
        job.clean()
        console.print(f"{job.out.uri} is prepared already: {plan.count:,} images in {plan.shards:,} shards.")
        return
    kind, megabytes, pixels = plan.request.kind, plan.request.bytes / 1e6, "×".join(map(str, plan.shape))
    made = f"latents {'×'.join(map(str, job.shape))} (mean and std) of pixels" if job.vae else "pixels"
    console.print(
        f"{job.listing.uri}: {plan.count:,} images in {job.index.num_classes:,} classes ({kind}, {megabytes:,.1f} MB)\n"
        f"{job.out.uri}: {made} {pixels}, {plan.shards:,} shards of {plan.shard_images:,} images, "
        f"{job.bytes / 1e6:,.1f} MB"
    )
    if job.finished:
        console.print(f"Going on: {len(job.finished):,} shards are there already.")
    begun = time.monotonic()
    try:
        with _Shown(job, console) as shown:
            manifest = job.run(lambda tasks: run_on_ray(tasks, workers, gpus, console), shown.tell)
    except KeyboardInterrupt:
        console.print("Whole shards are kept: the same command goes on.")
        raise
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
    if manifest.count < plan.count:
        lost = plan.count - manifest.count
        console.print(f"{lost:,} images could not be read and are left out: {job.out.uri}/{UNREADABLE}")
    console.print(f"Prepared {manifest.count:,} images in {duration(time.monotonic() - begun)}.")
    console.print(f"Train on them with: --set data.path={job.out.uri}")


def run_on_ray(
    tasks: Iterable[Task], workers: int | None, gpus: int | None, console: Console
) -> Generator[Report, None, None]:
    """Makes shards on the cluster of `RAY_ADDRESS`, or on one of this machine alone (a `data.job.Run`).

    Raises:
        SdditError: no cluster answers, a node does not see what it needs, or a shard cannot be made.
    """
    begun = time.monotonic()
    cluster.connect(dashboard=False)
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    _quiet(context)
    now, growth = cluster.alive(), cluster.growth()
    cpus, there = (int(sum(getattr(node, name) for node in now)) for name in ("cpus", "gpus"))
    largest = growth.grown(now, lambda node: node.cpus) if growth else now  # waiting actors make a cluster grow
    texts = [task.model_dump_json() for task in tasks]
    first = Task.model_validate_json(texts[0])
    vae = [first.vae] if first.vae and Path(first.vae).is_dir() else []
    _check_seen([first.uri, f"{first.out}/{PLAN}", *vae])
    gpus = there if gpus is None else gpus
    each: dict[str, Any] = {"batch_size": 1, "batch_format": "numpy"}
    rows = ray.data.from_items([{"task": text, "error": ""} for text in texts], override_num_blocks=len(texts))
    if not (first.vae and gpus):
        count = min(workers or max(1, int(sum(node.cpus for node in largest))), len(texts))
        done = rows.map_batches(_Maker, num_cpus=1, compute=_pool(count), **each)
        how = f"up to {count} actors, each on a CPU"
    else:
        count = min(workers or gpus, gpus, len(texts))
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
            object_store_memory=(cpus + WAITING * count) * SHARD_BYTES
        )
        decoded = rows.map_batches(_decode, num_cpus=1, **each)
        done = decoded.map_batches(_Encoder, num_cpus=0, num_gpus=1, compute=_pool(count), **each)
        how = f"{count} actors that encode, each on a GPU, and tasks that decode"
    console.print(f"Ray is ready after {duration(time.monotonic() - begun)}: {cpus} CPU, {there} GPU; {how}.")
    yield from _reports(done)


def _reports(done: Dataset) -> Iterator[Report]:
    """What the workers tell, as it comes."""
    import ray

    try:
        rows = iter(done.iter_rows())
        with cluster._quiet_stderr():  # Ray warns there of each actor it starts
            first = next(rows)
        for row in itertools.chain([first], rows):
            if row["error"]:
                raise DataError(row["error"])
            yield Report.model_validate_json(row["report"])
    except (ray.exceptions.RayError, ray.data.exceptions.SystemException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SdditError(
            f"A worker failed: {lines[-1] if lines else error!r}. Whole shards are kept: the same command goes on."
        ) from error


# What workers do. A user's error travels as words: as an exception it would come wrapped in Ray's, after retries.


class _Maker:
    """Decodes, encodes and writes; keeps the autoencoder from shard to shard (`data.prepare`).

    An actor, also where there is nothing to keep: the next shards wait in its queue, whereas a task is followed by the
    next only when Ray Data looks again, each 0.1 s."""

    def __call__(self, batch: Batch) -> Batch:
        task = _task(batch)
        return _told(lambda: write_task(task, *decode_shard(task)))


def _decode(batch: Batch) -> Batch:
    try:
        pixels, unreadable = decode_shard(_task(batch))
    except SdditError as error:
        return {"task": batch["task"], "error": np.array([str(error)])}
    return {**batch, "pixels": pixels[None], "unreadable": np.array([json.dumps(unreadable)])}


class _Encoder:
    """Encodes and writes what others have decoded."""

    def __call__(self, batch: Batch) -> Batch:
        if error := str(batch["error"][0]):
            return _answer(error=error)
        unreadable = [(int(i), name, reason) for i, name, reason in json.loads(str(batch["unreadable"][0]))]
        return _told(lambda: write_task(_task(batch), batch["pixels"][0], unreadable))


def _task(batch: Batch) -> Task:
    return Task.model_validate_json(str(batch["task"][0]))


def _told(make: Callable[[], Report]) -> Batch:
    try:
        return _answer(report=make().model_dump_json())
    except SdditError as error:
        return _answer(error=str(error))


def _answer(report: str = "", error: str = "") -> Batch:
    return {"report": np.array([report]), "error": np.array([error])}


def _pool(count: int) -> Any:
    """Actors that start as they are needed, so that the first ones work while a cluster grows."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(min_size=1, max_size=count, initial_size=count)


def _quiet(context: Any) -> None:
    """Progress is shown here; failures are shown in one line, and are in Ray's logs."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False


def _check_seen(paths: Iterable[str]) -> None:
    """Whether every node sees the local ones among `paths`; where there is one node, there is nothing to ask."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    local = [path for path in paths if not is_remote(path)]
    alive = [node for node in ray.nodes() if node["Alive"]]
    if not local or len(alive) < 2:
        return
    ask, asked = ray.remote(_missing), {}
    for node in alive:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[node["NodeManagerAddress"]] = ask.options(num_cpus=0, scheduling_strategy=there).remote(local)
    for address, answer in asked.items():
        if missing := ray.get(answer):
            raise UsageError(
                f"The node {address} does not see {missing[0]}. On a cluster of several machines, source, --out and "
                "--vae must be on object storage (s3://…), in a shared folder, or under the same path on every node."
            )


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(open_filesystem(path)[1]).exists()]


class _Shown:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, job: Job, console: Console) -> None:
        self.images, self.shards, self.console = job.plan.count, job.plan.shards, console
        self.made, self.whole = 0, len(job.finished)
        self.done = sum(report.images for report in job.finished)
        self.unreadable = sum(len(report.unreadable) for report in job.finished)
        self.first: float | None = None  # when the first shard was made here: what came before is the start
        self.begun = self.said = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images,"),
            TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.shown = self.bar.add_task("Preparing", total=self.images, completed=self.done, speed="")

    def __enter__(self) -> _Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.bar.stop()

    def tell(self, report: Report) -> None:
        now = time.monotonic()
        self.whole += 1
        self.done += report.images
        self.unreadable += len(report.unreadable)
        if self.first is None:
            self.first = now
        else:
            self.made += report.images
        speed = self.made / (now - self.first) if now > self.first else 0.0
        self.bar.update(self.shown, completed=self.done, speed=f"{speed:,.0f}/s" if speed else "")
        if not self.console.is_terminal and (now - self.said > SAY_SECONDS or self.whole == self.shards):
            self.said = now
            left = f", {duration((self.images - self.done) / speed)} left" if speed and self.done < self.images else ""
            broken = f", {self.unreadable:,} unreadable" if self.unreadable else ""
            elapsed = time.strftime("%H:%M:%S", time.gmtime(now - self.begun))
            self.console.print(
                f"[{elapsed}] {self.done:,}/{self.images:,} images, {self.whole:,}/{self.shards:,} shards, "
                f"{speed:,.0f} images/s{left}{broken}"
            )
