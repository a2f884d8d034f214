"""What every figure over the axes of a sweep keeps: files, protocol, half-finished sweeps, fresh seeds, noise floor."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from recorded import Recorded
from scipy import stats

from analysis import axis, common, style
from sddit.config import FRESH_SEED
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results

ROOT = Path(__file__).resolve().parents[2]
FLOOR = {"mean": 30.0, "sd": 1.25, "draws": 20}
HEALTH = ("train/information_cls", "train/information_patch")

# Figure → three settings: method, axis values, fields that follow.
FIGURES = {
    "mask_ratio": [("sddit", {"method.mask_ratio": ratio}, {}) for ratio in (0.0, 0.2, 0.5)],
    "teacher_sigma": [("sddit", {"method.teacher_sigma": sigma}, {}) for sigma in (0.002, "drawn", "student")],
    "model_size": [
        ("sddit", {"system": "SD-DiT", "model.size": "S/2"}, {}),
        ("sddit", {"system": "SD-DiT", "model.size": "B/2"}, {}),
        ("dit", {"system": "DiT (EDM)", "model.size": "S/2"}, {"diffusion.kind": "edm"}),
    ],
    "components": [
        ("sddit", {"component": "SD-DiT"}, {}),
        ("sddit", {"component": "no L_D"}, {"method.lambda_d": 0.0}),
        ("sddit", {"component": "no masking"}, {"method.mask_ratio": 0.0}),
    ],
    "temperatures": [
        ("sddit", {"method.tau_student": s, "method.tau_teacher": t}, {"method.tau_teacher_cls": t})
        for s, t in ((0.1, 0.04), (0.1, 0.07), (0.2, 0.04))
    ],
}


def fid(setting, seed, step):
    return 20_000 / step * (1 + setting / 10) + 2.0 * seed


def scores(setting, seed, steps=(200, 400, 600)):
    points = {"eval/fid": {step: fid(setting, seed, step) for step in steps}}
    points |= {name: dict.fromkeys(steps, 1.5 - 0.7 * setting) for name in HEALTH}
    return points | {"cost/flops": {step: 1e12 * step * (1 + setting) for step in steps}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a record with each figure's sweep (done, three seeds of which one is fresh), and for each figure
    NAME 'NAME-half', 'NAME-mixed' (two protocols) and 'NAME-started'."""
    record = Recorded(tmp_path_factory.mktemp("store"))

    def cell(sweep, figure, setting, **options):
        method, point, follows = FIGURES[figure][setting]
        changes = {name: value for name, value in point.items() if "." in name} | follows
        options = {"scores": scores(setting, options.get("seed", 0)), "noise_floor": FLOOR} | options
        record.cell(sweep, method, point=point, changes=changes, **options)

    for figure, settings in FIGURES.items():
        for sweep in (figure, f"{figure}-half", f"{figure}-mixed", f"{figure}-started"):
            excluded = {"sddit.excluded": '{"x=3": "the same as x=2"}'} if sweep == figure else {}
            record.sweep(sweep, axes=settings[0][1], **excluded)
        for setting in range(3):
            for seed in (0, 1):
                cell(figure, figure, setting, seed=seed)
        cell(figure, figure, 0, seed=FRESH_SEED)
        half = f"{figure}-half"
        cell(half, figure, 0)
        cell(half, figure, 1)
        cell(half, figure, 2, state="pruned", scores=scores(2, 0, (200,)))
        cell(half, figure, 0, seed=1, state="running", scores=scores(0, 1, (200, 400)))
        cell(half, figure, 1, seed=1, state="failed", scores={})
        cell(f"{figure}-mixed", figure, 0)
        cell(f"{figure}-mixed", figure, 1, protocol="other")
        cell(f"{figure}-started", figure, 0, state="running", scores={})
    return record.uri


@pytest.fixture(params=FIGURES)
def module(request):
    return importlib.import_module(f"analysis.plot_{request.param}")


def collected(module, store, suffix="", **options):
    sweep = module.QUESTION.name + suffix
    table = load_results(sweep, store, metrics=module.QUESTION.metrics)
    return module.collect(table, load_cells(sweep, store), **options)


# --------------------------------------------------------------------------------------------------------- contract


def test_files(module, store, tmp_path, capsys):
    name = module.QUESTION.name
    paths = module.figure(name, store, tmp_path)
    assert [path.name for path in paths] == [f"{name}.png", f"{name}.pdf", f"{name}.csv"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    with Image.open(paths[0]) as image:
        assert image.width > 500 and np.asarray(image.convert("L")).std() > 5
    pdf = paths[1].read_bytes()
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    drawn = pd.read_csv(paths[2])
    assert sorted(drawn["seed"].unique()) == [0, 1]
    assert len(drawn) == (6 if module.QUESTION.at_end else 18)
    for setting, (_, point, _) in enumerate(FIGURES[name]):
        here = drawn["step"] == 600
        for column, value in point.items():
            short = "series" if column in ("system", "component") else column.rpartition(".")[2]
            here &= drawn[short].astype(str) == str(value)
        rows = drawn[here].sort_values("seed")
        values = [fid(setting, seed, 600) for seed in (0, 1)]
        low, high = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
        np.testing.assert_allclose(rows["eval/fid"], values)
        np.testing.assert_allclose(rows[["seeds", "mean", "low", "high"]].iloc[0], [2, np.mean(values), low, high])


def test_caption_of_a_whole_sweep(module, store):
    caption = collected(module, store, paper=True).caption
    for part in (
        "95% t-interval over 2 seeds", "6 cells done, 600 steps", "Batch size 64", "Protocol ", "1,024 samples against",
        "FID 30 ± 1.2 (standard deviation over 20 draws)", "1 cell with fresh seeds", "paper",
    ):  # fmt: skip
        assert part in caption
    for part in ("Faded", "In no mean", "Not evaluated", "revisions"):
        assert part not in caption


def test_excluded_cells_are_named(module, store, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(common, "save", lambda figure, *_: drawn.append(figure))
    module.figure(module.QUESTION.name, store, tmp_path)
    assert "Not part of the sweep: x=3 (the same as x=2)." in drawn[0].texts[0].get_text().replace("\n", " ")


def test_half_finished_sweep(module, store):
    data = collected(module, store, "-half")
    uncounted = data.frame["state"] != "done"
    assert uncounted.any() and data.frame.loc[uncounted, axis.INTERVAL].isna().all(axis=None)
    assert (data.frame.loc[~uncounted, "seeds"] == 1).all()  # the running and failed second seeds do not count
    for part in (
        "one seed, no interval", "2 of 5 cells done", "1 stopped early (", "1 unfinished (",
        "Not evaluated yet: 1 cell (1 failed)", "Not recorded: ",
    ):  # fmt: skip
        assert part in data.caption
    module.draw(data).draw_without_rendering()


def test_without_cells_what_was_evaluated_is_drawn(module, store):
    table = load_results(module.QUESTION.name, store, metrics=module.QUESTION.metrics)
    data = module.collect(table)
    pd.testing.assert_series_equal(data.frame["eval/fid"], collected(module, store).frame["eval/fid"])
    assert data.floor is None
    module.draw(data).draw_without_rendering()


def test_unlike_protocols_are_refused(module, store):
    with pytest.raises(UsageError, match=r"(?s)2 protocols.*other: 1 cell"):
        collected(module, store, "-mixed")


def test_nothing_to_draw_is_a_sentence_and_status_1(module, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it
    name = module.QUESTION.name
    with pytest.raises(SystemExit) as caught:
        common.run(lambda: module.figure(f"{name}-started", store, tmp_path))
    message = capsys.readouterr().err
    assert caught.value.code == 1
    assert "Nothing to draw yet: 1 cell recorded" in message and f"python sweeps/{name}.py" in message
    assert list(tmp_path.iterdir()) == []


def test_only_fresh_seeds_are_nothing_to_draw(module, store):
    table = load_results(module.QUESTION.name, store, metrics=module.QUESTION.metrics)
    with pytest.raises(SdditError, match="Nothing to draw yet"):
        module.collect(table[table["seed"] >= FRESH_SEED])


@pytest.mark.parametrize("suffix", ["", "-half"])
def test_same_data_same_bytes_and_no_text_overlaps(module, store, tmp_path, suffix):
    data = collected(module, store, suffix, paper=True)
    figures = [module.draw(data) for _ in "ab"]
    first, second = (common.save(f, data.frame, "x", tmp_path / n) for f, n in zip(figures, "ab", strict=True))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    figure = figures[0]
    with style.context():
        figure.draw_without_rendering()
        caption = figure.texts[0].get_window_extent()
        legends = [legend.get_window_extent() for legend in figure.legends]
        panels = [panel.get_tightbbox() for panel in figure.axes]
    assert caption.x1 <= figure.bbox.width and caption.y0 >= 0
    for i, panel in enumerate(panels):
        assert panel.y0 > caption.y1 - 1 and panel.x0 >= -1 and panel.x1 <= figure.bbox.width + 1
        assert not any(panel.overlaps(other) for other in [*panels[:i], *legends])


@pytest.mark.parametrize(("times", "shown"), [(0.1, False), (1.0, True), (100.0, False)])
def test_noise_floor_is_drawn_where_it_is_in_the_frame(module, store, times, shown):
    data = collected(module, store)
    last = data.counting.loc[data.counting["step"] == 600, "eval/fid"]
    data = replace(data, floor=common.NoiseFloor(times * last.median(), 1.0, 20))
    figure = module.draw(data)
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert ("noise floor" in labels) == (shown and module.QUESTION.each_cell)  # a map has no axis of FID


@pytest.mark.slow
def test_scripts_neither_need_nor_import_torch_or_ray(store, tmp_path):
    code = (
        "import importlib, sys\n"
        "from analysis import common\n"
        f"for name in {list(FIGURES)}:\n"
        f"    sys.argv = [name, '--sweep', f'{{name}}-half', '--tracking-uri', {store!r}, '--no-paper']\n"
        "    common.run(importlib.import_module(f'analysis.plot_{name}').main)\n"
        "assert not {'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stderr
    assert {Path(line).name for line in ran.stdout.split()} == {
        f"{name}-{name}-half.{kind}" for name in FIGURES for kind in ("png", "pdf", "csv")
    }


# ------------------------------------------------------------------------------------------------------------ words


def test_more_series_than_can_be_shown_are_refused(store):
    module = importlib.import_module("analysis.plot_temperatures")
    table = load_results("temperatures", store, metrics=module.QUESTION.metrics)
    other = table.assign(identity=table["identity"] + "b", **{"train.lr": 1.0})
    with pytest.raises(UsageError, match=r"train\.lr, which makes 2 maps, and at most 1"):
        module.collect(pd.concat([table, other], ignore_index=True))


def test_a_field_that_is_missing_in_some_cells_does_not_split_a_series(store):
    """Columns of several methods hold blanks, which a half-finished sweep must not read as another setting."""
    module = importlib.import_module("analysis.plot_model_size")
    assert set(collected(module, store, "-half").frame["series"]) == {"SD-DiT", "DiT (EDM)"}


# ------------------------------------------------------------------------------------------------------- statistics


def test_paired_difference_is_that_of_scipy():
    generator = np.random.default_rng(0)
    a = pd.Series(generator.normal(size=6), index=[0, 1, 2, 3, 4, 5])
    b = pd.Series(generator.normal(size=5), index=[5, 4, 3, 2, 9])  # seeds 2 to 5 in common
    found = common.paired_difference(a, b)
    test = stats.ttest_rel(a.loc[[2, 3, 4, 5]], b.loc[[2, 3, 4, 5]])
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose(found, [(a - b).mean(), low, high, 4])


def test_paired_difference_of_one_seed_of_none_and_of_infinite_values():
    one = common.paired_difference(pd.Series([3.0, np.inf], [0, 1]), pd.Series([1.0, 2.0], [0, 1]))
    assert one.mean == 2.0 and np.isnan(one.low) and one.seeds == 1
    assert common.paired_difference(pd.Series([1.0], [0]), pd.Series([1.0], [1])).seeds == 0
    with pytest.raises(ValueError, match="twice"):
        common.paired_difference(pd.Series([1.0, 2.0], [0, 0]), pd.Series([1.0], [0]))
