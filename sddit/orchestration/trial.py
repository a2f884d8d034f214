"""What runs a cell inside a Tune trial: the trial's own process for one worker, a TorchTrainer for more.

Both end in `sddit.cell.run_cell` and give the same result. Imports no torch, which the trials' own processes of
nested cells never need.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections.abc import Callable
from typing import Any

from sddit.cell import CellSpec
from sddit.environment import check_source
from sddit.errors import OutageError, SdditError, StorageError, TrackingError
from sddit.filesystem import PATIENCE_SECONDS

log = logging.getLogger(__name__)
# Restarts after a worker or its node was lost, without an evaluation in between; where a cell trains in its trial's
# process, its own errors are final.
RETRIES = 2
OUTAGES = (OutageError, StorageError, TrackingError)  # nothing is wrong with the cell: the next command goes on
START_TRIES = 24 * 60  # of a minute each: how long a cell of several workers waits for its nodes
UNWIND_SECONDS = 120  # a cell that was stopped may take so long to leave a process that is kept for the next


def train_in_process(config: dict[str, Any]) -> dict[str, Any] | None:
    """A Tune trial with one worker: trains here, in a process that is kept for the next cell.

    A cause that another try cannot change comes back as 'error', with 'interrupted' where an outage of the storage or
    the record outlasted the cell's patience; anything else raises, and Tune tries again.
    """
    from ray import tune

    os.environ["OMP_NUM_THREADS"] = str(config["per_worker"]["CPU"])
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(UNWIND_SECONDS)  # else the next cell is lost (ray.md §4)
    _set_imports_aside()
    try:
        _run(config, tune.report, "cuda:0" if config["per_worker"].get("GPU") else "cpu")
    except SdditError as error:
        log.error("%s", error)
        return _ended_by(str(error), isinstance(error, OUTAGES))
    return None  # Tune would take anything else for one more report


@functools.cache
def _set_imports_aside() -> None:
    """What looks for garbage around each cell need not look at what was imported: most of what this process holds."""
    import torch._dynamo  # noqa: F401 - by torch.optim at its first step, if not here

    gc.freeze()


def train_on_workers(config: dict[str, Any]) -> dict[str, Any] | None:
    """A Tune trial with several workers: Ray Train places them anywhere in the cluster and restarts them together."""
    # Read by the controller and the workers from this process's environment.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # a report waits up to so long
    if config["one_node"]:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less; spot nodes need it
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = "120"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal import constants
    from ray.tune.integration.ray_train import TuneReportCallback

    # What frees the workers of a cell that was stopped asks for the cluster by this name, and fails where a second
    # one runs on the machine: the next cell would wait for ever.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    per_worker = config["per_worker"]
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        # A rank that hangs in a collective ends the group; one that waits for the storage to come back does not hang.
        torch_config=TorchConfig(timeout_s=int(PATIENCE_SECONDS) + 300),
        scaling_config=train.ScalingConfig(
            num_workers=config["workers"], use_gpu=bool(per_worker.get("GPU")), resources_per_worker=per_worker
        ),
        run_config=train.RunConfig(
            name=config["identity"],
            storage_path=config["scratch"],
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            # Its start-up waits a minute for workers and is tried again: nodes that were lost may take long to come.
            failure_config=train.FailureConfig(max_failures=RETRIES, controller_failure_limit=START_TRIES),  # type: ignore[call-arg]
        ),
    )
    while True:
        before = _reached(config)
        try:
            trainer.fit()
        except train.TrainingFailedError as error:
            if _reached(config) > before:
                continue  # losses count in a row: a long cell may meet many
            cause = _worker_error(error)
            return _ended_by(cause, any(f"{kind.__name__}: " in cause for kind in OUTAGES))
        return None


def _worker(config: dict[str, Any]) -> None:
    """One worker of a TorchTrainer, inside its process group. Any error ends the group: the others wait for nobody."""
    from ray import train
    from ray.train.torch import get_device

    _run(config, train.report, str(get_device()))


def _run(config: dict[str, Any], report: Callable[[dict[str, Any]], None], device: str) -> None:
    from sddit.cell import run_cell

    if config["source"]:
        check_source(config["source"])
    reported: list[int] = []

    def report_evaluation(step: int, metrics: dict[str, float]) -> None:
        reported.append(step)
        report({"step": step, **metrics})

    result = run_cell(CellSpec(**config["spec"]), report_evaluation, device=device)
    if not result["finished"]:
        report({"step": result["step"], "interrupted": True})
    elif not reported:  # a resume found everything in the last checkpoint
        report({k: v for k, v in result.items() if k == "step" or k.startswith("eval/")})


def _reached(config: dict[str, Any]) -> int:
    """The step of the cell's newest checkpoint; 0 while there is none that can be read."""
    from sddit.training.store import CheckpointStore

    try:
        return max((c.step for c in CheckpointStore(config["spec"]["storage"]).checkpoints()), default=0)
    except SdditError:
        return 0


def _worker_error(error: Exception) -> str:
    """The cause in one line: of the lowest rank with an error of our own, else of the lowest that failed."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = [str(failures[rank]).strip().splitlines()[-1] for rank in sorted(failures)]
    return next((line for line in lines if line.startswith("sddit.errors.")), lines[0])


def _ended_by(cause: str, outage: bool) -> dict[str, Any]:
    """The last report of a cell that could not go on."""
    return {"error": cause, **({"interrupted": True} if outage else {})}
