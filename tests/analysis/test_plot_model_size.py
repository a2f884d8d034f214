"""Model sizes: their order, the cost of training, and when the paper's values are overlaid."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import paper as published
from analysis import plot_model_size
from sddit.config import Eval

SIZES = ("XL/2", "S/2", "B/2", "L/2")
PROTOCOL = Eval()  # its defaults are the paper's
COMPARABLE = {
    "eval.extractor": PROTOCOL.extractor, "eval.samples": PROTOCOL.samples, "eval.labels": PROTOCOL.labels,
    "model.grid": "paper", "train.batch_size": 256,
}  # fmt: skip


def a_table(steps=400_000, flops=1e18, **columns):
    return pd.DataFrame(
        {
            "identity": f"{method}-{size}", "run_id": "r", "state": "done", "seed": 0, "step": step, "code": "c",
            "protocol": "p", "method.name": method, "diffusion.kind": "edm", "model.size": size,
            "eval/fid": 20 + 10 * i + (step < steps) * 50, "cost/flops": flops * (i + 1) * step / steps, **columns,
        }
        for method in ("sddit", "dit") for i, size in enumerate(SIZES) for step in (steps // 2, steps)
    )  # fmt: skip


def cells_of(table, images=published.IMAGES):
    last = table.groupby("identity", sort=False).tail(1)
    params = [{k: row[k] for k in row if "." in k} for row in last.to_dict("records")]
    tags = [{"sddit.reference_images": str(images)} for _ in params]
    return last[["identity", "run_id", "state", "seed", "step"]].assign(steps=last["step"], params=params, tags=tags)


def test_sizes_from_small_to_large_one_line_a_system_at_the_last_step():
    figure = plot_model_size.draw(plot_model_size.collect(a_table()))
    sizes, costs = figure.axes
    assert [label.get_text() for label in sizes.get_xticklabels()] == ["S/2", "B/2", "L/2", "XL/2"]
    for container in sizes.containers:
        np.testing.assert_allclose(container.lines[0].get_ydata(orig=False), [30, 40, 50, 20])
    np.testing.assert_allclose(costs.containers[0].lines[0].get_xdata(orig=False), np.array([1, 2, 3, 4]) * 1e18)
    assert costs.get_xscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DiT (EDM)", "SD-DiT"]


def test_without_recorded_flops_sizes_stand_alone():
    assert len(plot_model_size.draw(plot_model_size.collect(a_table(flops=np.nan))).axes) == 1


@pytest.mark.parametrize(("steps", "beside"), [(400_000, ["DiT", "MDT", "SD-DiT"]), (300_000, [])])
def test_comparable_values_of_the_paper_are_overlaid_and_marked(steps, beside):
    table = a_table(steps, **COMPARABLE)
    data = plot_model_size.collect(table, cells_of(table), paper=True)
    theirs = data.frame[data.frame["source"] == "paper"]
    expected = [row for row in published.TABLE_1 if row.size in SIZES]
    assert sorted(theirs["eval/fid"]) == sorted(row.fid for row in expected)
    assert theirs["seeds"].isna().all() and theirs["series"].str.endswith(" (paper)").all()
    assert "Stars: the paper's values" in data.caption and published.SOURCE in data.caption
    sizes, costs = plot_model_size.draw(data).axes
    stars = {panel: [line for line in panel.lines if line.get_marker() == "*"] for panel in (sizes, costs)}
    assert sum(len(line.get_xdata()) for line in stars[costs]) == len(expected)
    assert sum(len(line.get_xdata()) for line in stars[sizes]) == 2 * len(beside)  # S/2 and B/2 of each at 400,000
    plain = plot_model_size.collect(table, cells_of(table))
    assert set(plain.frame["source"]) == {"ours"} and "Stars" not in plain.caption


@pytest.mark.parametrize(
    ("changes", "images", "why"),
    [({"eval.samples": 1024}, published.IMAGES, "1,024 samples instead"), ({}, 50_000, "other data")],
)
def test_other_values_of_the_paper_are_refused_with_the_reason(changes, images, why):
    table = a_table(**COMPARABLE | changes)
    data = plot_model_size.collect(table, cells_of(table, images), paper=True)
    assert set(data.frame["source"]) == {"ours"}
    assert why in data.caption and "None of them is overlaid." in data.caption


def test_batches_unlike_the_papers_are_not_beside_it_over_the_size():
    table = a_table(**COMPARABLE | {"train.batch_size": 128})
    sizes, _ = plot_model_size.draw(plot_model_size.collect(table, cells_of(table), paper=True)).axes
    assert not any(len(line.get_xdata()) for line in sizes.lines if line.get_marker() == "*")
