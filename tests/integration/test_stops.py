"""Cells that ASHA stops give back what they held: their workers in the cluster, their memory in the process."""

import gc
import subprocess
import sys

import pytest
from commands import environment, run, script
from tiny import experiment, set_flags

from sddit import results
from sddit.cell import CellSpec, run_cell
from sddit.data import open_manifest
from sddit.tracking import SweepRecord

# The scheduler stops every cell at its first report; after each, the groups that hold workers are counted.
COUNTING = """
import runpy, sys
from sddit.orchestration import cluster

cluster.configure_environment(remote=False)  # before ray is imported
from ray.util import placement_group_table
from sddit.orchestration import driver, searcher

ended = driver.Driver.ended

def count(self, config, state, result):
    ended(self, config, state, result)
    live = [g for g in placement_group_table().values() if g["state"] not in ("REMOVED", "PENDING")]
    print(f"GROUPS {len(live)} after {state}", flush=True)

driver.Driver.ended = count
searcher.CellASHA.on_trial_result = lambda self, controller, trial, result: self.STOP
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def second_ray():
    """Another cluster on this machine, as of another user's sweep."""
    command = "import ray; ray.init(num_cpus=1, include_dashboard=False); print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", command], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "up\n"
        yield
        process.stdin.close()  # ends it


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "ratios",
    [[0, 0.8], pytest.param([0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 0.65, 0.75, 0.8], marks=pytest.mark.torture)],
    ids=len,
)
def test_stopped_cells_of_two_workers_leave_no_placement_group(ratios, second_ray, tmp_path):
    flags = set_flags(method__mask_ratio=str(ratios), eval__every=1, eval__samples=40)
    (tmp_path / "counting.py").write_text(COUNTING)
    done = run(
        "counting.py", script("mask_ratio"), *flags, "--workers", "2", "--asha", "--steps", "27",
        cwd=tmp_path, timeout=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cells = results.load_cells("mask_ratio", f"sqlite:///{tmp_path}/mlflow.db")
    assert cells["state"].tolist() == ["pruned"] * len(ratios) and (cells["step"] < 27).all(), done.stdout
    groups = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("GROUPS")]
    assert len(groups) == len(ratios) and max(groups) <= 2, "a cell's own and its workers', never those of cells before"


@pytest.mark.slow
def test_nothing_of_a_stopped_cell_reaches_the_next(tmp_path, monkeypatch):
    import torch

    class Stopped(BaseException):
        """As Tune ends a trial: from within the report."""

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.nn.Parameter) for o in gc.get_objects())

    monkeypatch.chdir(tmp_path)
    record = SweepRecord(f"sqlite:///{tmp_path}/mlflow.db", "stops")
    owner = record.claim()
    seen, threads = [], torch.get_num_threads()
    for ratio in (0.2, 0.5, 0.75):
        cell = experiment(method__mask_ratio=ratio)
        digest = open_manifest("digits").digest
        run_id = record.start_cell(
            cell, identity=cell.identity(digest), data_digest=digest, label=str(ratio), run_id=None
        )
        spec = CellSpec(
            cell.model_dump(mode="json"), cell.identity(digest), str(tmp_path / str(ratio)), record.uri, run_id,
            record.parent_id, owner.token,
        )  # fmt: skip

        def stop(step, metrics):
            seen.append(tensors())
            raise Stopped

        before = tensors()
        torch.set_default_dtype(torch.float64)  # what a careless cell might leave behind
        with pytest.raises(Stopped):
            run_cell(spec, stop)
        assert torch.get_default_dtype() is torch.float64, "given back as it was"
        torch.set_default_dtype(torch.float32)
        assert tensors() == before and torch.get_num_threads() == threads
    assert seen[0] == seen[1] == seen[2] > 0, "while a cell trains, the tensors are its own alone"
    owner.release()
