"""One cell from its specification to its record: joins data, method, store and tracking around the training loop.

Knows neither Tune nor Train: whoever calls it says how to report, which device to use and whether to stop.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sddit.config import Experiment
from sddit.errors import TrackingError, UsageError


@dataclass(frozen=True)
class CellSpec:
    """A cell as plain values, so that it travels to any process."""

    experiment: dict[str, Any]  # Experiment.model_dump()
    identity: str
    storage: str  # folder or URI of this cell's checkpoints
    tracking_uri: str
    run_id: str
    owned_run: str  # the run that carries the claim: the sweep's, or the cell's own
    token: str  # whose it was when the cell was handed out

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_cell(
    spec: CellSpec,
    report: Callable[[int, dict[str, float]], None],
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Trains, scores and records a cell on this worker, from its newest checkpoint on.

    Within a process group every worker calls it; rank and size are the group's. Returns plain values: 'step',
    'finished' (False where the driver asked it to stop), 'checkpoint' and the last evaluation's metrics.
    """
    experiment = Experiment.parse(spec.experiment)
    with _own_settings(experiment.resources.cpus_per_worker):
        return _run(spec, experiment, report, device)


def _run(
    spec: CellSpec, experiment: Experiment, report: Callable[[int, dict[str, float]], None], device: str
) -> dict[str, Any]:
    """`run_cell` within a process's own settings; what it holds is gone when it returns."""
    import torch

    from sddit.data import open_manifest
    from sddit.data.sampler import BatchSampler
    from sddit.data.shards import Shards
    from sddit.data.vae import decoder_of
    from sddit.filesystem import PATIENCE_SECONDS
    from sddit.methods import build_method
    from sddit.metrics import features
    from sddit.metrics.protocol import Protocol
    from sddit.metrics.reference import Reference, content_digest, noise_floor, reference_of
    from sddit.tracking import CellRecord, NullRecord
    from sddit.training import diagnostics, distributed, loop
    from sddit.training.store import CheckpointStore

    where = torch.device(device)
    manifest = open_manifest(experiment.data.path, patience_seconds=PATIENCE_SECONDS)
    identity = experiment.identity(content_digest(experiment, manifest))
    if identity != spec.identity:
        raise UsageError(
            f"The data at {experiment.data.path} are not those the cell was planned with "
            f"(identity {identity}, planned {spec.identity})."
        )
    metrics = diagnostics.metrics_of(experiment)
    extractor = features.get_extractor(experiment.eval.extractor, where, metrics)
    source = reference_of(experiment, manifest)
    record: CellRecord | NullRecord
    if distributed.rank() == 0:
        record = CellRecord(spec.tracking_uri, spec.run_id, owned_run=spec.owned_run, token=spec.token, report=report)
        protocol = Protocol.from_experiment(
            experiment,
            source.content_digest,
            extractor.digest,
            decoder=manifest.vae.digest if manifest.vae else "none",
            reference_images=source.count,
        )
        record.tag("sddit.protocol", protocol.digest)
        record.tag("sddit.protocol.text", protocol.describe())
        if source.count:
            record.tag("sddit.reference_images", str(source.count))
    else:
        record = NullRecord(report)

    @functools.cache
    def reference() -> Reference:
        """Asked for at the first evaluation, which says what real images would score as well."""
        if source.images and not source.statistics:
            floor = noise_floor(source, extractor, experiment.eval.samples)
            record.tag("sddit.noise_floor", json.dumps(floor))
        return source.load(extractor, metrics)

    store = CheckpointStore(spec.storage, fence=record.fence)
    method = build_method(experiment, manifest.shape, manifest.num_classes)
    method.decode = decoder_of(manifest.vae, experiment.data.vae, where)
    sampler = BatchSampler.of(experiment, Shards(manifest))
    try:
        result = loop.train(
            experiment,
            method,
            sampler,
            store=store,
            reporter=record,
            extractor=extractor,
            reference=reference,
            device=where,
            held_out=diagnostics.held_out_images(experiment, sampler),
            should_stop=lambda: record.stop_asked,
        )
    except BaseException as reason:
        # A scheduler ends a cell by an exception that is no error, and waits for it; an error is not to be hidden.
        with contextlib.suppress(TrackingError):
            record.close(min(60.0, PATIENCE_SECONDS) if isinstance(reason, Exception) else 5.0)
        raise
    record.close()
    record.fence()
    return {"step": result.step, "finished": result.finished, "checkpoint": result.checkpoint, **result.metrics}


@contextlib.contextmanager
def _own_settings(threads: int) -> Iterator[None]:
    """What a process keeps between cells is set at the start and given back at the end, so that nothing of one cell
    reaches the next."""
    import torch

    # A cell before this one may have been ended from outside, its tensors still held by what ended it.
    _free_memory()
    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)
        _free_memory()


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
