"""FID as training goes on: what is collected, what is drawn, what the caption says, and the files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from PIL import Image
from recorded import Recorded
from scipy import stats

from analysis import paper, plot_convergence, speedup, style
from sddit import presets
from sddit.config import FRESH_SEED
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results

ROOT = Path(__file__).resolve().parents[2]
STEPS = (200, 400, 600)
SYSTEMS = {"DiT": ("dit", {}), "DiT (EDM)": ("dit", {"diffusion.kind": "edm"}), "SD-DiT": ("sddit", {})}
LEVEL = {"DiT": 60, "DiT (EDM)": 45, "SD-DiT": 30}
FLOPS = {"dit": 10.0, "mdt": 20.0, "sddit": 25.0}  # of an image
FLOOR = {"mean": 8.0, "sd": 1.1, "draws": 5}


def fid(system, seed, step, factor=1.0):
    return LEVEL[system] * 200 / step * (1.1 - 0.1 * factor) + seed


def add(record, sweep, system, seed=0, *, rate=None, steps=STEPS, named=True, **options):
    """A cell of the digits preset."""
    method, changes = SYSTEMS[system]
    factor = float(rate[1:]) if rate else 1.0
    point = {"system": system} | ({"lr": rate} if rate else {}) if named else {}
    batch = {"cost/images": 64.0, "cost/flops": 64 * FLOPS[method], "cost/device_hours": 1e-3 * (1 + seed)}  # a step
    scores = {"eval/fid": {step: fid(system, seed, step, factor) for step in steps}}
    scores |= {name: {step: value * step for step in steps} for name, value in batch.items()}
    return record.cell(
        sweep, method, seed=seed, point=point, changes={**changes, "train.lr": 7e-3 * factor}, scores=scores,
        noise_floor=FLOOR, sampling_flops=f"{FLOPS[method] * 19e6}", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a store with the sweeps 'convergence' (3 seeds, learning rates), 'half', 'plain' and 'started'."""
    record = Recorded(tmp_path_factory.mktemp("store"))
    for name in ("convergence", "half", "plain", "started"):
        record.sweep(name)
    for seed in range(3):
        for system in SYSTEMS:
            add(record, "convergence", system, seed, rate="x1")
        add(record, "convergence", "SD-DiT", seed, rate="x2")
        add(record, "convergence", "DiT", seed, rate="x0.5", state="done" if seed else "pruned")
    add(record, "convergence", "SD-DiT", FRESH_SEED, rate="x2")
    add(record, "half", "DiT")
    add(record, "half", "DiT", 1, state="running", steps=STEPS[:2])
    add(record, "half", "DiT (EDM)", steps=STEPS[:2])
    add(record, "half", "SD-DiT", state="pruned", steps=STEPS[:1])
    add(record, "half", "SD-DiT", 1, state="failed", steps=())
    add(record, "plain", "DiT", named=False)
    add(record, "plain", "DiT (EDM)", named=False)
    add(record, "started", "DiT", state="running", steps=())
    for name, changes in (("imagenet", {}), ("larger", {"model.size": "L/2"}), ("batch", {"train.batch_size": 512})):
        add_published(record, name, changes)
    return record.uri


def add_published(record, sweep, changes):
    """DiT and SD-DiT under the paper's protocol."""
    record.sweep(sweep)
    for method in ("dit", "sddit"):
        published = presets.imagenet256("S/2", method).digest_fields()
        alike = {name: published[name] for name in ("eval.extractor", "eval.samples", "eval.labels", "model.grid")}
        changed = alike | {"train.batch_size": 256} | changes
        scores = {"eval/fid": 50.0, "cost/images": 400_000.0 * changed["train.batch_size"], "cost/flops": 4e18}
        points = {name: {400_000: value} for name, value in scores.items()}
        record.cell(sweep, method, changes=changed, images=paper.IMAGES, steps=400_000, scores=points)


def tables(store, sweep):
    return load_results(sweep, store, metrics=speedup.COSTS), load_cells(sweep, store)


def collected(store, sweep, **options):
    return plot_convergence.collect(*tables(store, sweep), **options)


def a_table(methods=("dit", "sddit"), seeds=(0,), steps=STEPS, **columns):
    """Results and cells without a store."""
    rows = [
        {
            "identity": f"{method}-{seed}", "run_id": "r", "state": "done", "seed": seed, "step": step, "code": "c",
            "protocol": "p", "method.name": method, "diffusion.kind": "edm" if method == "sddit" else "iddpm",
            "model.size": "S/2", "eval/fid": 100 * len(method) / step + seed, "cost/images": 64.0 * step,
            "cost/flops": 1e6 * step, "cost/device_hours": 1e-3 * step, **columns,
        }
        for method in methods for seed in seeds for step in steps
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    cells = table.drop_duplicates("identity")[["identity", "state", "seed", "protocol"]]
    return table, cells.assign(params=[{} for _ in range(len(cells))], tags=[{} for _ in range(len(cells))], steps=600)


# ---------------------------------------------------------------------------------------------------------- collect


def test_means_and_intervals_over_seeds(store):
    frame = collected(store, "convergence").frame
    default = frame[frame["line"] == "default"]
    assert list(default["system"].unique()) == ["DiT", "DiT (EDM)", "SD-DiT"]
    for (system, step), rows in default.groupby(["system", "step"]):
        values = [fid(system, seed, step) for seed in range(3)]
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        for column, expected in {"seeds": 3, "mean": np.mean(values), "low": low, "high": high}.items():
            np.testing.assert_allclose(rows[column], expected, rtol=1e-12)


def test_the_best_rate_is_drawn_beside_the_default(store):
    data = collected(store, "convergence")
    best = data.frame[data.frame["line"] == "best"]
    assert set(best["system"]) == {"SD-DiT"} and set(best["lr"]) == {"x2"} and set(best["seed"]) == {0, 1, 2}
    rest = data.frame[data.frame["line"] == "not drawn"]
    assert set(rest["system"]) == {"DiT"} and set(rest["lr"]) == {"x0.5"}  # it lacks a seed, so it is no candidate
    assert "best at the last step (SD-DiT x2 of 2), picked on the same seeds, which flatters it." in data.caption
    assert "Not drawn, at other learning rates: 1 stopped early." in data.caption


def test_caption_of_a_whole_sweep(store):
    data = collected(store, "convergence")
    for part in (
        "FID at each evaluation, S/2: mean and 95% t-interval (bands) over 3 seeds", "14 of 15 cells done",
        "1 cell of fresh seeds left out", "Batch size 64", "Noise floor, real images against real ones: FID 8 ± 1.1",
        "edm, heun with 10 steps, weight average power:6.94 (DiT (EDM) 190 MFLOPs, SD-DiT 475 MFLOPs)",
        "Protocol " + data_protocol(store), "Saved on the way to the final FID of DiT, steps / FLOPs: DiT (EDM) 1.",
    ):  # fmt: skip
        assert part in data.caption
    for part in ("Faded", "Not evaluated", "fewer steps than", "Published"):
        assert part not in data.caption


def data_protocol(store):
    return load_cells("convergence", store).loc[0, "protocol"]


def test_one_seed_has_no_interval_and_systems_are_told_by_method_and_formulation(store):
    data = collected(store, "plain")
    assert data.frame["low"].isna().all() and list(data.frame["system"].unique()) == ["DiT", "DiT (EDM)"]
    assert "one seed, no interval" in data.caption and "learning rate" not in data.caption


def test_half_finished_sweep(store):
    data = collected(store, "half")
    unfinished = data.frame["state"] != "done"
    assert unfinished.sum() == 2 + 1 and data.frame.loc[unfinished, "mean"].isna().all()
    assert (data.frame.loc[~unfinished, "seeds"] == 1).all()
    for part in (
        "2 of 5 cells done", "Not recorded: DiT (EDM), seed 1.",
        "Faded, and in no line or mean: 1 unfinished (DiT, seed 1), 1 stopped early (SD-DiT, seed 0)",
        "Done, but with fewer steps than 600: DiT (EDM), seed 0.", "Not evaluated yet: 1 cell (1 failed).",
    ):  # fmt: skip
        assert part in data.caption
    assert list(data.speedups["system"]) == ["DiT (EDM)", "DiT"]  # nothing of a cell that is not done


def test_nothing_to_draw_yet(store):
    with pytest.raises(SdditError, match="Nothing to draw yet: 1 cell recorded"):
        collected(store, "started")
    table, cells = tables(store, "convergence")
    with pytest.raises(SdditError, match="default learning rate"):
        plot_convergence.collect(table[table["lr"] == "x2"], cells)


def test_unlike_protocols_are_refused():
    table, cells = a_table()
    table.loc[table["method.name"] == "dit", "protocol"] = "q"
    with pytest.raises(UsageError, match="2 protocols"):
        plot_convergence.collect(table, cells)


# ------------------------------------------------------------------------------------------------------------ paper


def test_why_published_values_are_not_drawn(store):
    data = collected(store, "plain", paper=True)
    assert data.published.empty
    assert "Published values are not drawn. Not comparable with the paper's values: other features" in data.caption


def test_published_values_are_drawn_where_they_are_comparable(store, tmp_path):
    data = collected(store, "imagenet", paper=True)
    expected = [row for row in paper.TABLE_1 if row.model in ("DiT-S/2", "SD-DiT-S/2")]
    for column, values in {
        "step": [row.steps for row in expected], "cost/images": [row.images for row in expected],
        "cost/flops": [row.flops for row in expected], "eval/fid": [row.fid for row in expected],
    }.items():  # fmt: skip
        assert list(data.published[column]) == values
    assert "Open markers: the paper's Table 1." in data.caption and paper.SDDIT in data.caption
    assert "paper" in labels(plot_convergence.draw(data))
    paths = plot_convergence.figure("imagenet", store, tmp_path, paper=True)
    assert list(pd.read_csv(paths[2])["source"]) == ["ours", "ours", "paper", "paper"]
    assert plot_convergence.collect(*tables(store, "imagenet")).published.empty


@pytest.mark.parametrize("sweep", ["larger", "batch"])
def test_published_values_of_other_sizes_and_batches_are_not_drawn(sweep, store):
    data = collected(store, sweep, paper=True)
    assert data.published.empty
    assert "The paper has no value for these methods, sizes and batch sizes." in data.caption


# ------------------------------------------------------------------------------------------------------------- draw


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_four_panels_against_four_costs(store):
    figure = plot_convergence.draw(collected(store, "convergence"))
    assert [panel.get_xlabel() for panel in figure.axes] == list(plot_convergence.PANELS.values())
    assert labels(figure) == ["DiT", "DiT (EDM)", "SD-DiT", "SD-DiT, lr x2", "noise floor"]
    for panel, name in zip(figure.axes, plot_convergence.PANELS, strict=True):
        ours = [line for line in panel.lines if same_color(line.get_color(), style.COLOURS["sddit"])]
        drawn = max(ours, key=lambda line: line.get_linewidth())
        seeds = [1, 2, 3] if name == "cost/device_hours" else [1]
        per_step = {"step": 1, "cost/images": 64, "cost/flops": 64 * 25, "cost/device_hours": 1e-3 * np.mean(seeds)}
        np.testing.assert_allclose(drawn.get_xdata(), np.array(STEPS) * per_step[name])
        np.testing.assert_allclose(
            drawn.get_ydata(), [np.mean([fid("SD-DiT", s, at) for s in range(3)]) for at in STEPS]
        )
        assert len(panel.collections) == 3  # a band a system


def test_what_is_not_done_is_faded(store):
    figure = plot_convergence.draw(collected(store, "half"))
    assert labels(figure) == ["DiT", "DiT (EDM)", "SD-DiT", "unfinished", "stopped early"]
    faded = [line for line in figure.axes[0].lines if line.get_alpha() == style.STATE_ALPHA]
    assert {len(line.get_xdata()) for line in faded} == {1, 2}
    assert not figure.axes[0].collections  # one seed each: no band


def test_a_cost_that_is_not_recorded_has_no_panel():
    table, cells = a_table()
    figure = plot_convergence.draw(plot_convergence.collect(table.drop(columns="cost/device_hours"), cells))
    assert [panel.get_xlabel() for panel in figure.axes] == ["optimiser steps", "training images", "training FLOPs"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("methods", [("dit",), ("dit", "maskdit", "mdt", "sddit")])
def test_no_text_overlaps(methods, seeds):
    figure = plot_convergence.draw(plot_convergence.collect(*a_table(methods, seeds)))
    figure.draw_without_rendering()
    width, _ = figure.bbox.size
    caption = figure.texts[0].get_window_extent()
    assert caption.x1 <= width and caption.y0 >= 0
    for panel in figure.axes:
        assert panel.get_tightbbox().y0 > caption.y1
        assert panel.get_tightbbox().x1 <= figure.legends[0].get_window_extent().x0


def test_axis_is_logarithmic_beyond_a_decade():
    wide, narrow = (plot_convergence.draw(plot_convergence.collect(*a_table(steps=s))) for s in ((10, 900), (400, 600)))
    assert {panel.get_yscale() for panel in wide.axes} == {"log"}
    assert {panel.get_yscale() for panel in narrow.axes} == {"linear"}


def test_two_systems_of_one_method_are_told_apart():
    table, cells = a_table(("sddit",), system="SD-DiT")
    other = table.assign(system="SD-DiT, no loss", identity="other")
    data = plot_convergence.collect(
        pd.concat([table, other], ignore_index=True), pd.concat([cells, cells.assign(identity="other")])
    )
    handles = plot_convergence.draw(data).legends[0].get_lines()
    assert len({handle.get_color() for handle in handles}) == 2


# ------------------------------------------------------------------------------------------------------------ files


def test_files(store, tmp_path, capsys):
    paths = plot_convergence.figure("convergence", store, tmp_path / "figures")
    names = ["convergence.png", "convergence.pdf", "convergence.csv", "convergence-speedup.csv"]
    assert [path.name for path in paths] == names
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    with Image.open(paths[0]) as image:
        assert image.width > 500 and np.asarray(image.convert("L")).std() > 5
    drawn = pd.read_csv(paths[2])
    assert len(drawn) == 15 * 3 and set(drawn["line"]) == {"default", "best", "not drawn"}
    for row in drawn[drawn["line"] == "default"].itertuples():
        assert drawn.loc[row.Index, "eval/fid"] == fid(row.system, row.seed, row.step)
    factors = pd.read_csv(paths[3])
    assert list(factors["reference"] + "|" + factors["system"]) == [
        "DiT|DiT (EDM)", "DiT|SD-DiT", "DiT (EDM)|DiT", "DiT (EDM)|SD-DiT"
    ]  # fmt: skip
    assert (factors["seeds"] == 3).all() and factors["steps_low"].notna().sum() == 3


def test_names_follow_the_sweep_and_bytes_the_data(store, tmp_path):
    first, second = (plot_convergence.figure("half", store, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [
        f"convergence-half{end}" for end in (".png", ".pdf", ".csv", "-speedup.csv")
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.slow
def test_script_neither_needs_nor_imports_torch_or_ray(store, tmp_path):
    code = (
        "import sys; sys.argv[0] = 'plot_convergence.py'\n"
        "from analysis import common, plot_convergence\n"
        "common.run(plot_convergence.main)\n"
        "assert not {'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "--sweep", "half", "--tracking-uri", store, "--paper"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "INFO" not in ran.stderr and "Traceback" not in ran.stderr
    assert len(list((tmp_path / "figures").iterdir())) == 4
