"""How long until a figure has the record of a large sweep: 500 cells, each evaluated 200 times.

Read as the figures do, once with an empty cache and once again, from the sqlite file and through `mlflow server`.
Without imports, which take two seconds more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sddit import presets, results
from sddit.serve import SETTINGS
from sddit.tracking import SweepRecord

CELLS, PARAMS, EVALUATIONS, EVERY = 500, 40, 200, 100
KEYS = ("eval/fid", "train/loss", "cost/flops", "cost/images")  # a figure asks for the first
SWEEP = "reading"


def make_record(uri: str) -> None:
    """The sweep as the tracker leaves it, but for the points and params, which come at once."""
    from mlflow.entities import Metric, Param

    record = SweepRecord(uri, SWEEP, question="How long does reading take?")
    owner = record.claim()
    record.set_tags({"sddit.axes": '["method.mask_ratio"]'})
    steps = range(EVERY, EVALUATIONS * EVERY + 1, EVERY)
    tags = {"mlflow.parentRunId": record.parent_id, "sddit.kind": "cell", "sddit.protocol": "0123456789ab",
            "sddit.step": str(steps[-1]), "sddit.steps": str(steps[-1]), "sddit.code": "0123456789abcdef"}  # fmt: skip
    base = presets.digits().digest_fields()
    for i in range(CELLS):
        varied = {"method.mask_ratio": i // 5 / 100, "seed": i % 5}
        params = [Param(k, str(v)) for k, v in list((varied | base | varied).items())[:PARAMS]]
        run = record.client.create_run(record.experiment_id, tags={**tags, "sddit.identity": f"{i:012x}"}).info
        points = [Metric(key, 1e5 / step + i, run.start_time + step, step) for key in KEYS for step in steps]
        record.client.log_batch(run.run_id, points, params)
        record.end_cell(run.run_id, "done")
    owner.release("FINISHED")


@contextlib.contextmanager
def server(uri: str) -> Iterator[str]:
    """The address of an `mlflow server` of this record."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port), "--backend-store-uri", uri
    ]  # fmt: skip
    process = subprocess.Popen(command, env=SETTINGS | os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.5)
        else:
            raise SystemExit("mlflow server did not start within a minute.")
        yield address
    finally:
        process.terminate()
        process.wait()


def read(uri: str) -> float:
    """Seconds."""
    begun = time.monotonic()
    table, cells, parent = results.read_sweep(SWEEP, uri, metrics=())
    seconds = time.monotonic() - begun
    if len(table) != CELLS * EVALUATIONS or len(cells) != CELLS or not parent.axes:
        raise SystemExit(f"{uri} gave {len(table)} rows of {len(cells)} cells.")
    return seconds


def report() -> list[str]:
    """A section of RESULTS.md."""
    rows = []
    before = os.environ.get("SDDIT_CACHE")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # artifacts go to the current folder
        os.environ["SDDIT_CACHE"] = f"{folder}/cache"
        try:
            uri = f"sqlite:///{Path(folder)}/mlflow.db"
            make_record(uri)
            results.sweep_names(uri)  # what is imported when it is needed, is
            rows += [("sqlite", read(uri), "5 s"), ("sqlite, again", read(uri), "2 s")]
            with server(uri) as address:
                results.sweep_names(address)
                rows += [("`mlflow server`", read(address), "12 s"), ("`mlflow server`, again", read(address), "2 s")]
        finally:
            os.environ.pop("SDDIT_CACHE") if before is None else os.environ.update(SDDIT_CACHE=before)
    return [
        "## Reading",
        "",
        f"The tables that a figure draws from (`read_sweep`): {CELLS} cells of {PARAMS} params, {len(KEYS)} metrics of "
        f"{EVALUATIONS} points each, of which it needs one; imports aside.",
        "",
        "| | measured | target |",
        "|---|---|---|",
        *(f"| {what} | {seconds:.1f} s | {target} |" for what, seconds, target in rows),
    ]
