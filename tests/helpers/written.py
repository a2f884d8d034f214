"""What a sweep has left in its record, for comparison with another run of the same sweep."""

import contextlib
import sqlite3

import pandas as pd
import pytest

import sddit
from sddit import results

# What depends on the moment and the machine.
UNREPRODUCIBLE = ["train/images_per_s", "train/data_wait", "cost/device_hours", "run_id", "code"]


def table(name, uri):
    """The table of a sweep without what cannot be the same twice."""
    frame = sddit.load_results(name, uri)
    return frame.drop(columns=UNREPRODUCIBLE).sort_values(["identity", "step"]).reset_index(drop=True)


def assert_same(frame, expected):
    """Bit for bit."""
    pd.testing.assert_frame_equal(frame, expected)


def assert_close(frame, expected):
    """As with another number of workers: sums in another order, whose differences grow with the steps (1e-4 of the
    loss after 120)."""
    assert frame["identity"].tolist() == expected["identity"].tolist()
    assert frame["step"].tolist() == expected["step"].tolist()
    assert frame["eval/fid"].tolist() == pytest.approx(expected["eval/fid"].tolist(), rel=1e-3)
    assert frame["train/loss"].tolist() == pytest.approx(expected["train/loss"].tolist(), rel=1e-3)


def assert_once(database, name, uri, *, every, steps):
    """Every cell is done and has each point exactly once; returns the cells by identity."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        rows = opened.execute("SELECT run_uuid, key, step FROM metrics").fetchall()
    assert len(rows) == len(set(rows)), "a point twice"
    cells = results.load_cells(name, uri)
    assert set(cells["state"]) == {"done"} and set(cells["step"]) == {steps}
    for run in cells["run_id"]:
        logged = sorted(step for owner, key, step in rows if owner == run and key == "train/loss")
        assert logged == list(range(logged[0], steps + 1, logged[0])), "a point is missing"
        assert sorted(step for owner, key, step in rows if owner == run and key == "eval/fid") == [
            *range(every, steps + 1, every)
        ]
    return cells.set_index("identity")
