"""What runs a cell inside a Tune trial: the trial's own process for one worker, a TorchTrainer for more.

Both end in `sddit.cell.run_cell` and give the same result. Imports no torch, which the trials' own processes of
nested cells never need.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from sddit.cell import CellSpec
from sddit.errors import SdditError, TrackingError

log = logging.getLogger(__name__)
RETRIES = 2  # restarts after a worker was lost; where a cell trains in its trial's process, its own errors are final
UNWIND_SECONDS = 120  # a cell that was stopped may take so long to leave a process that is kept for the next


def train_in_process(config: dict[str, Any]) -> dict[str, Any] | None:
    """A Tune trial with one worker: trains here, in a process that is kept for the next cell.

    A cause that another try cannot change comes back as 'error'; anything else raises, and Tune tries again.
    """
    from ray import tune

    os.environ["OMP_NUM_THREADS"] = str(config["per_worker"]["CPU"])
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(UNWIND_SECONDS)  # else the next cell is lost (ray.md §4)
    try:
        _run(config, tune.report, "cuda:0" if config["per_worker"].get("GPU") else "cpu")
    except TrackingError:
        raise  # an outage: another try
    except SdditError as error:
        log.error("%s", error)
        return {"error": str(error)}
    return None  # Tune would take anything else for one more report


def train_on_workers(config: dict[str, Any]) -> dict[str, Any] | None:
    """A Tune trial with several workers: Ray Train places them anywhere in the cluster and restarts them together."""
    # Read by the controller and the workers from this process's environment.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # a report waits up to so long
    if config["one_node"]:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less; spot nodes need it
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = "120"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    per_worker = config["per_worker"]
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=300),  # a rank that hangs in a collective ends the group
        scaling_config=train.ScalingConfig(
            num_workers=config["workers"], use_gpu=bool(per_worker.get("GPU")), resources_per_worker=per_worker
        ),
        run_config=train.RunConfig(
            name=config["identity"],
            storage_path=config["scratch"],
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            failure_config=train.FailureConfig(max_failures=RETRIES, controller_failure_limit=20),  # type: ignore[call-arg]
        ),
    )
    try:
        trainer.fit()
    except train.TrainingFailedError as error:
        return {"error": _worker_error(error)}
    return None


def _worker(config: dict[str, Any]) -> None:
    """One worker of a TorchTrainer, inside its process group. Any error ends the group: the others wait for nobody."""
    from ray import train
    from ray.train.torch import get_device

    _run(config, train.report, str(get_device()))


def _run(config: dict[str, Any], report: Callable[[dict[str, Any]], None], device: str) -> None:
    from sddit.cell import run_cell

    reported: list[int] = []

    def report_evaluation(step: int, metrics: dict[str, float]) -> None:
        reported.append(step)
        report({"step": step, **metrics})

    result = run_cell(CellSpec(**config["spec"]), report_evaluation, device=device)
    if not result["finished"]:
        report({"step": result["step"], "interrupted": True})
    elif not reported:  # a resume found everything in the last checkpoint
        report({k: v for k, v in result.items() if k == "step" or k.startswith("eval/")})


def _worker_error(error: Exception) -> str:
    """The cause in one line: of the lowest rank that failed, else the last line of the message."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = failures[min(failures)] if failures else error
    return str(cause).strip().splitlines()[-1]
