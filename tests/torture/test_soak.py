"""Two hundred cells of one sweep: what the driver and the head hold must not grow with the cells they have seen."""

import contextlib
import re
import time
from statistics import median

import psutil
import pytest
from commands import MASK_RATIO, Running, no_traceback
from tiny import set_flags
from written import assert_once

pytestmark = [pytest.mark.slow, pytest.mark.torture, pytest.mark.timeout(1800)]

SEEDS, STEPS = 34, 3  # of each of six ratios
MB, CEILING_GB = 1e6, 0.4  # a slimmed cell of the digits takes 1.4 MB, a whole one five times as much
GROWTH_MB = 60  # from a quarter of the cells to all: less than half a megabyte a cell


def held(process):
    """Bytes that are its own, handles and threads."""
    with process.oneshot():
        return process.memory_full_info().uss, process.num_fds(), process.num_threads()


def test_two_hundred_cells_leave_nothing_behind(tmp_path):
    flags = set_flags(eval__every=STEPS, eval__samples=40, eval__grid=10)
    running = Running(MASK_RATIO, *flags, "--steps", STEPS, "--seeds", SEEDS, "--max-disk-gb", CEILING_GB, cwd=tmp_path)
    driver = psutil.Process(running.process.pid)
    cells, seen, series, disk = 6 * SEEDS, set(), [], 0
    while running.process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = driver.children(recursive=True)
            seen |= set(family)
            head = [p for p in family if p.name() in ("gcs_server", "raylet")]
            assert not [p for p in family if p.status() == psutil.STATUS_ZOMBIE and p.ppid() == driver.pid]
            done = len(re.findall(r": done, step", running.output))
            if head and done:
                parts = [held(p) for p in (driver, *head)]
                series.append((done, len(family), *map(sum, zip(*parts, strict=True)), parts[0][0]))
        disk = max(disk, sum(f.stat().st_size for f in (tmp_path / "runs").glob("*/*/step-*/*") if f.exists()))
        time.sleep(1)
    assert running.process.returncode == 0, running.output
    assert_once(tmp_path / "mlflow.db", "mask_ratio", f"sqlite:///{tmp_path}/mlflow.db", every=STEPS, steps=STEPS)
    no_traceback(running.output)

    early = [row for row in series if 0.2 * cells < row[0] < 0.3 * cells]
    late = [row for row in series if row[0] > 0.95 * cells]
    names = ("processes", "bytes", "handles", "threads", "bytes of the driver")
    medians = {name: tuple(median(row[i] for row in rows) for rows in (early, late)) for i, name in enumerate(names, 1)}
    print(f"\nfrom a quarter to all of {cells} cells: {medians}; at most {disk / MB:.0f} MB of checkpoints")
    assert medians["bytes"][1] - medians["bytes"][0] < GROWTH_MB * MB
    for name in ("processes", "handles", "threads"):
        assert medians[name][1] <= medians[name][0] + 2, name
    # A cell that ends has written its last checkpoint before older ones are slimmed.
    assert disk < 1.2 * CEILING_GB * 1000 * MB
    alive = psutil.wait_procs(seen, timeout=30)[1]
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive
