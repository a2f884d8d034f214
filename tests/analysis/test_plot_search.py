"""The figure of a search: what counts, what matters, what the lowest is worth, and scales for all kinds of axes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from recorded import Recorded

from analysis import parallel, plot_search
from analysis.importance import LEAST, importances
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results

ROOT = Path(__file__).resolve().parents[2]
AXES = [
    "method.mask_ratio", "method.teacher_sigma", "method.tau_teacher", "method.tau_teacher_cls", "method.lambda_d",
    "model.size",
]  # fmt: skip
FLOOR = {"mean": 3.0, "sd": 1.0, "draws": 5}
LOWEST = 2  # the cell with the lowest FID


def add(record, sweep, i, *, seed=0, state="done", steps=(200, 400, 600), **options):
    """Cell i as `sweeps/search.py` suggests it: of teacher noise a word or a number; one in four without the loss."""
    generator = np.random.default_rng(i)
    point = {"method.mask_ratio": round(0.012 * (17 * i % 63), 3), "model.size": ("S/2", "B/2")[i % 2]}
    changes = dict(point)
    point["discriminates"] = i % 4 != 3
    if point["discriminates"]:
        noise = ("drawn", "student", "fixed")[i % 3]
        point["teacher_noise"] = noise
        if noise == "fixed":
            noise = point["method.teacher_sigma"] = float(generator.uniform(0.002, 1))
        point["method.tau_teacher"] = tau = float(generator.uniform(0.01, 0.1))
        point["method.lambda_d"] = float(10 ** generator.uniform(-2, 0))
        changes |= {"method.teacher_sigma": noise, "method.tau_teacher": tau, "method.tau_teacher_cls": tau,
                    "method.lambda_d": point["method.lambda_d"]}  # fmt: skip
    else:
        changes["method.lambda_d"] = 0.0
    final = 15.0 if i == LOWEST else 20 + 20 * abs(changes["method.mask_ratio"] - 0.3) + (i % 2)
    final += (seed - 999) / 2 if seed else 0
    record.cell(
        sweep, seed=seed, point=point, changes=changes, state=state, noise_floor=FLOOR,
        scores={"eval/fid": {step: final * (600 / step) ** 2 for step in steps},
                "cost/flops": {step: (1e12 if i % 2 else 1.5e12) * step for step in steps}},
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sweeps of 3, 12 and 60 cells; the last with stopped, failed and unfinished ones and three fresh seeds."""
    record = Recorded(tmp_path_factory.mktemp("record"))
    record.sweep("three", axes=AXES)
    for i in range(3):
        add(record, "three", i)
    record.sweep("twelve", axes=AXES)
    for i in range(12):
        add(record, "twelve", i)
    record.sweep("search", axes=AXES)
    for i in range(60):
        stopped = i % 3 == 1
        add(record, "search", i, **({"state": "pruned", "steps": (200,)} if stopped else {}))
    add(record, "search", 60, state="failed", steps=(200, 400))
    add(record, "search", 61, state="running", steps=())
    add(record, "search", 62, steps=(200, 400))  # done before the sweep was extended
    for seed in (1000, 1001, 1002):
        add(record, "search", LOWEST, seed=seed)
    record.sweep("temperatures", axes=["method.tau_student", "method.tau_teacher"])
    for student in (0.05, 0.1, 0.2):
        for teacher in (0.02, 0.04):
            for seed in (0, 1):
                point = {"method.tau_student": student, "method.tau_teacher": teacher}
                scores = {"eval/fid": {600: 20 + 10 * student + teacher + seed / 100}}
                record.cell("temperatures", seed=seed, point=point, changes=point, scores=scores)
    record.sweep("systems", axes=["system", "lr"])
    for method, name in (("sddit", "SD-DiT"), ("dit", "DiT")):
        for lr in ("x1", "x2"):
            scores = {"eval/fid": {600: 20.0 + (lr == "x2")}, "cost/flops": {600: 1e15}}
            changes = {"train.lr": 0.001 * int(lr[1])}
            record.cell("systems", method, point={"system": name, "lr": lr}, changes=changes, scores=scores)
    record.sweep("mixed", axes=AXES[:1])
    for i in (0, 1):
        point = {"method.mask_ratio": i / 2}
        changes = point | {"eval.samples": 512 * (i + 1)}
        record.cell("mixed", point=point, changes=changes, scores={"eval/fid": {600: 20.0}})
    record.sweep("started", axes=AXES)
    add(record, "started", 0, state="running", steps=())
    return record.uri


def collected(store, sweep, axes=AXES, **options):
    return plot_search.collect(load_results(sweep, store), load_cells(sweep, store), axes, **options)


# ---------------------------------------------------------------------------------------------------------- collect


def test_only_cells_done_at_the_last_step_count(store):
    data = collected(store, "search")
    frame = data.frame
    assert len(frame) == 62 and (frame["seed"] < 1000).all()
    assert frame["counts"].sum() == 40
    assert (frame.loc[frame["counts"], "step"] == 600).all() and (frame.loc[frame["counts"], "state"] == "done").all()
    assert not frame.loc[~frame["counts"], "front"].any()
    for part in (
        "40 of 63 cells done at step 600", "20 stopped early", "1 failed", "1 fewer steps",
        "Not evaluated: 1 cell (1 unfinished)", "stopped cells are left out", "FID 3 ± 1", "no intervals",
    ):  # fmt: skip
        assert part in data.caption


def test_best_so_far_falls_to_the_lowest_and_stays(store):
    frame = collected(store, "search").frame
    so_far = frame["best_so_far"].dropna()
    assert (so_far.diff().dropna() <= 0).all() and so_far.iloc[-1] == 15.0
    reached = frame.loc[frame["best_so_far"] == 15.0].iloc[0]
    assert reached["eval/fid"] == 15.0 and reached["counts"]


def test_pareto_front(store):
    frame = collected(store, "search").frame
    done, front = frame[frame["counts"]], frame[frame["front"]]
    for cell in done.itertuples():
        better = (done["eval/fid"] <= done.loc[cell.Index, "eval/fid"]) & (
            done["cost/flops"] <= done.loc[cell.Index, "cost/flops"]
        )
        assert (better.sum() == 1) == cell.front or done.loc[better, "eval/fid"].nunique() == 1
    assert len(front) == 2 and front["eval/fid"].min() == 15.0  # one for each cost


def test_the_lowest_is_a_lucky_draw_until_fresh_seeds_confirm_it(store):
    caption = collected(store, "twelve").caption
    assert "with FID 15.00 (mask ratio 0.408, " in caption and "teacher sigma 0." in caption
    assert "lowest of 12, picked, so itself a lucky draw until fresh seeds confirm it." in caption
    caption = collected(store, "search").caption
    assert "lowest of 40, picked, so itself a lucky draw; its 3 fresh seeds" in caption
    assert "give 16.00 (95% t-interval 14.76 to 17.24)" in caption  # 15.5, 16 and 16.5


def test_values_of_axes(store):
    data = collected(store, "search")
    assert data.axes == [axis for axis in AXES if axis != "method.tau_teacher_cls"]
    assert "Equal to another axis throughout: tau teacher cls." in data.caption
    off = data.frame["method.lambda_d"] == 0
    assert off.sum() == 15 and data.frame.loc[off, ["method.teacher_sigma", "method.tau_teacher"]].isna().all(axis=None)
    assert data.frame.loc[~off, "method.teacher_sigma"].map(type).isin([str, float]).all()
    assert {"drawn", "student"} < set(data.frame["method.teacher_sigma"])


def test_importance_needs_cells(store):
    few = collected(store, "three")
    assert few.importance is None and f"Importance needs {LEAST} cells" in few.caption
    data = collected(store, "search")
    assert next(iter(data.importance)) == "method.mask_ratio" and sum(data.importance.values()) == pytest.approx(1)
    assert data.importance == collected(store, "search").importance  # the same twice
    twelve = collected(store, "twelve")
    assert "method.mask_ratio" in twelve.importance and "a hint at most" in twelve.caption


def test_importance_by_kind_of_axis():
    """It finds the axis that decides, be it of numbers, of words, or one that only some cells have."""
    generator = np.random.default_rng(0)
    count = 80
    frame = pd.DataFrame({
        "rate": 10 ** generator.uniform(-4, -1, count),
        "word": generator.choice(["a", "b", "c"], count),
        "mixed": [["drawn", float(v)][int(v > 0.5)] for v in generator.uniform(0, 1, count)],
        "some": [[None, float(v)][int(v > 0.4)] for v in generator.uniform(0, 1, count)],
        "rare": [1.0 * i if i < LEAST - 1 else None for i in range(count)],
    })  # fmt: skip
    scores = {
        "rate": (np.log10(frame["rate"]) + 2.5).abs(),
        "word": (frame["word"] == "b") * -2.0,
        "mixed": (frame["mixed"] == "drawn") * -2.0,
        "some": frame["some"].astype(float).sub(0.7).abs().mul(9).fillna(3.0),
    }
    for axis, score in scores.items():
        found = importances(frame.assign(**{"eval/fid": score + generator.normal(0, 0.1, count)}), list(frame))
        assert max(found, key=found.get) == axis, (axis, found)
        assert "rare" not in found


def test_a_grid_and_named_axes(store):
    grid = collected(store, "temperatures", ["method.tau_student", "method.tau_teacher"])
    assert len(grid.frame) == 12 and next(iter(grid.importance)) == "method.tau_student"
    systems = collected(store, "systems", ["system", "lr"])
    assert set(systems.frame["system"]) == {"SD-DiT", "DiT"} and systems.axes == ["system", "lr"]
    by_fields = collected(store, "temperatures", ())
    assert {"method.tau_student", "method.tau_teacher"} <= set(by_fields.axes)


def test_refusals(store):
    with pytest.raises(UsageError, match="2 protocols"):
        collected(store, "mixed")
    with pytest.raises(SdditError, match="Nothing to draw yet: 1 cell recorded"):
        collected(store, "started")


# ----------------------------------------------------------------------------------------------------------- scales


def test_scale_of_numbers():
    where, marks = parallel.scale([0.2, 0.0, 0.8])
    np.testing.assert_allclose(where, [0.25, 0, 1])
    assert marks == {0.0: "0", 0.25: "0.2", 1.0: "0.8"}
    where, marks = parallel.scale([0.001, 0.01, 0.1])
    np.testing.assert_allclose(where, [0, 0.5, 1])
    where, marks = parallel.scale([0.9, 0.99, 0.999])
    np.testing.assert_allclose(where, [0, 0.5, 1])
    assert list(marks.values()) == ["0.9", "0.99", "0.999"]


def test_scale_of_words_absent_values_and_a_zero():
    where, marks = parallel.scale(["XL/2", "S/2", "B/2"])
    np.testing.assert_allclose(where, [1, 0, 0.5])
    where, marks = parallel.scale([0.001, "drawn", 1.0, None])
    assert where[0] == 0 and 0 < where[2] < where[1] == 1 and where[3] < 0
    assert marks[where[1]] == "drawn" and marks[where[3]] == "none"
    where, marks = parallel.scale([0.0, 0.01, 1.0, float("nan")])  # a logarithm has no zero
    assert where[0] == 0 and marks[0.0] == "0" and 0 < where[1] < where[2] == 1 and where[3] < 0
    where, _ = parallel.scale([True, False, True])
    assert set(where) == {0.0, 1.0}
    assert parallel.scale([0.5])[1] == {0.5: "0.5"}


# ------------------------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("sweep", ["three", "twelve", "search", "systems", "temperatures"])
def test_no_text_overlaps(store, sweep):
    axes = {"systems": ["system", "lr"], "temperatures": ["method.tau_student", "method.tau_teacher"]}.get(sweep, AXES)
    data = collected(store, sweep, axes)
    figure = plot_search.draw(data)
    figure.draw_without_rendering()
    history, pareto, importance, lines, *_ = figure.axes
    assert [panel.get_title(loc="left") for panel in (history, pareto, importance, lines)] == [
        "(a)",
        "(b)",
        "(c)",
        "(d)",
    ]
    caption = figure.texts[0].get_window_extent()
    width, _ = figure.bbox.size
    assert caption.x1 <= width and caption.y0 >= 0
    boxes = [panel.get_tightbbox() for panel in (history, pareto, importance)]
    for left, right in pairwise(boxes):
        assert left.x1 <= right.x0
    assert min(box.y0 for box in boxes) >= lines.get_tightbbox().y1 - 1 and lines.get_tightbbox().y0 > caption.y1
    assert figure.legends[0].get_window_extent().y0 >= max(panel.bbox.y1 for panel in (history, pareto, importance))
    if len(data.axes) > 1:
        names = [t for t in lines.texts if t.get_position()[1] > 1.05]
        assert len(names) == len(data.axes)
        for left, right in pairwise(names):
            assert left.get_window_extent().x1 < right.get_window_extent().x0


def test_one_line_a_cell_dark_for_low_and_grey_for_stopped(store):
    data = collected(store, "search")
    figure = plot_search.draw(data)
    drawn = [line for line in figure.axes[3].lines if len(line.get_xdata()) == len(data.axes) and line.get_zorder() < 5]
    assert len(drawn) == len(data.frame)
    grey = [line for line in drawn if line.get_color() == plot_search.UNFINISHED]
    assert len(grey) == (~data.frame["counts"]).sum()

    def light(colour):
        return float(np.dot(colour[:3], (0.299, 0.587, 0.114)))

    coloured = [light(line.get_color()) for line in drawn if line not in grey]
    assert (np.diff(coloured) <= 1e-9).all()  # from high to low FID, so that the lowest lie on top
    assert (np.diff([light(plot_search.COLOURS(i)) for i in np.linspace(0, 1, 20)]) > 0.01).all()


def test_stopped_cells_do_not_flatten_the_others(store):
    data = collected(store, "search")
    figure = plot_search.draw(data)
    _, high = figure.axes[0].get_ylim()
    done = data.frame.loc[data.frame["counts"], "eval/fid"]
    assert done.max() < high < 1.6 * done.max() < data.frame["eval/fid"].max()
    assert "At the upper edge of (a) and (b): 22 cells with FID up to" in figure.texts[0].get_text().replace("\n", " ")


def test_what_is_missing_is_said_in_its_panel(store):
    figure = plot_search.draw(collected(store, "three"))
    assert f"needs {LEAST} finished cells,\n3 so far" in [text.get_text() for text in figure.axes[2].texts]
    figure = plot_search.draw(collected(store, "temperatures", ["method.tau_student"]))
    assert "no FLOPs recorded" in [text.get_text() for text in figure.axes[1].texts]
    assert "needs two axes that vary" in [text.get_text() for text in figure.axes[3].texts]


# ------------------------------------------------------------------------------------------------------------ files


def test_files(store, tmp_path, capsys):
    paths = plot_search.figure("search", store, tmp_path / "a", paper=True)
    assert [path.name for path in paths] == ["search.png", "search.pdf", "search.csv"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    with Image.open(paths[0]) as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 5
    drawn = pd.read_csv(paths[2])
    data = collected(store, "search")
    assert len(drawn) == len(data.frame) + 1
    last = drawn.iloc[-1]
    assert last["state"] == "importance" and float(last["model.size"]) == pytest.approx(data.importance["model.size"])
    again = plot_search.figure("search", store, tmp_path / "b", paper=True)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    other = plot_search.figure("temperatures", store, tmp_path)
    assert [path.name for path in other] == [f"search-temperatures.{kind}" for kind in ("png", "pdf", "csv")]


@pytest.mark.slow
def test_script_neither_needs_nor_imports_torch_or_ray(store, tmp_path):
    code = (
        "import sys; sys.argv[0] = 'plot_search.py'\n"
        "from analysis import common, plot_search\n"
        "assert 'optuna' not in sys.modules\n"
        "common.run(plot_search.main)\n"
        "assert not {'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "--sweep", "twelve", "--tracking-uri", store],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "INFO" not in ran.stderr and "Traceback" not in ran.stderr and "Warning" not in ran.stderr
    assert (tmp_path / "figures" / "search-twelve.png").is_file()
