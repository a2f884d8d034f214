"""FID against mask ratio: what is collected, what is drawn, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import common, plot_mask_ratio, style
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results

ROOT = Path(__file__).resolve().parents[2]
START = 1_700_000_000_000  # ms; points are recorded at START + step, as the tracker does
RATIOS = (0.0, 0.3, 0.5)
STEPS = (200, 400, 600)


def score(ratio, seed, step):
    return 36_000 / step * (1 + (ratio - 0.3) ** 2) + 3.0 * seed


def add_cell(client, experiment, parent, ratio, seed, state, steps=STEPS, **changed):
    """A cell as the contract records it."""
    from mlflow.entities import Metric

    identity = f"{int(ratio * 100):02d}{seed:02d}ab12cd34"
    values = {"protocol": "1a2b3c4d5e6f", "code": "0123456789abcdef", "method": "sddit"} | changed
    tags = {
        "mlflow.parentRunId": parent,
        "sddit.kind": "cell",
        "sddit.identity": identity,
        "sddit.state": state,
        "sddit.steps": "600",
        "sddit.step": str(max(steps, default=0)),
        "sddit.protocol": values["protocol"],
        "sddit.protocol.text": "1,024 samples, digits-cnn",
        "sddit.code": values["code"],
    }
    name = f"{ratio}-{values['method']}-s{seed}-{identity}"
    run = client.create_run(experiment, start_time=START, tags=tags, run_name=name).info.run_id
    params = {
        "method.name": values["method"], "method.mask_ratio": ratio, "model.size": "S/2", "train.batch_size": 64,
        "eval.extractor": "digits-cnn", "seed": seed,
    }  # fmt: skip
    for key, value in params.items():
        client.log_param(run, key, value)
    if steps:
        client.log_batch(run, [Metric("eval/fid", score(ratio, seed, step), START + step, step) for step in steps])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a store with the sweeps 'mask_ratio' (done, 3 seeds), 'half', 'mixed' and 'started'."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    client = MlflowClient(uri)

    def sweep(name):
        experiment = client.create_experiment(name)
        return client, experiment, client.create_run(experiment, tags={"sddit.kind": "sweep"}).info.run_id

    whole = sweep("mask_ratio")
    for ratio in RATIOS:
        for seed in range(3):
            add_cell(*whole, ratio, seed, "done")
    half = sweep("half")
    add_cell(*half, 0.0, 0, "done")
    add_cell(*half, 0.3, 0, "done", code="fedcba9876543210-dirty")
    add_cell(*half, 0.5, 0, "pruned", STEPS[:1])
    add_cell(*half, 0.0, 1, "running", STEPS[:2])
    add_cell(*half, 0.3, 1, "failed", STEPS[:1])
    add_cell(*half, 0.75, 0, "running", ())
    mixed = sweep("mixed")
    add_cell(*mixed, 0.0, 0, "done")
    add_cell(*mixed, 0.3, 0, "done", protocol="other")
    add_cell(*mixed, 0.5, 0, "done", protocol="other")
    started = sweep("started")
    add_cell(*started, 0.0, 0, "running", ())
    return uri


def collected(store, sweep, **options):
    return plot_mask_ratio.collect(load_results(sweep, store), load_cells(sweep, store), **options)


def a_table(methods=("sddit",), ratios=RATIOS, seeds=(0,), steps=STEPS, **columns):
    """Results without a store."""
    rows = [
        {
            "identity": f"{method}-{ratio}-{seed}", "run_id": "r", "state": "done", "seed": seed, "step": step,
            "code": "c", "protocol": "p", "method.name": method, "method.mask_ratio": ratio,
            "eval/fid": score(ratio, seed, step), **columns,
        }
        for method in methods for ratio in ratios for seed in seeds for step in steps
    ]  # fmt: skip
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------- collect


def test_means_and_intervals_over_seeds(store):
    from scipy import stats

    data = collected(store, "mask_ratio")
    for (ratio, step), rows in data.frame.groupby(["mask_ratio", "step"]):
        values = [score(ratio, seed, step) for seed in range(3)]
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        for column, expected in {"seeds": 3, "mean": np.mean(values), "low": low, "high": high}.items():
            np.testing.assert_allclose(rows[column], expected, rtol=1e-12)
    assert "95% t-interval over 3 seeds" in data.caption


def test_one_seed_has_no_interval():
    data = plot_mask_ratio.collect(a_table())
    assert data.frame["low"].isna().all() and (data.frame["mean"] == data.frame["eval/fid"]).all()
    assert "one seed, no interval" in data.caption


def test_caption_of_a_whole_sweep(store):
    caption = collected(store, "mask_ratio", paper=True).caption
    for part in (
        "SD-DiT S/2", "9 cells done, 600 steps", "Batch size 64", "Protocol 1a2b3c4d5e6f (1,024 samples, digits-cnn)",
        "Figure 5",
    ):  # fmt: skip
        assert part in caption
    for part in ("Faded", "Not evaluated", "Not recorded", "revisions"):
        assert part not in caption


def test_half_finished_sweep(store):
    data = collected(store, "half")
    unfinished = data.frame["state"] != "done"
    assert unfinished.sum() == 1 + 2 + 1
    assert data.frame.loc[unfinished, ["seeds", "mean", "low", "high"]].isna().all(axis=None)
    assert (data.frame.loc[~unfinished, "seeds"] == 1).all()  # the failed and running second seeds do not count
    for part in (
        "2 of 6 cells done", "1 stopped early (ratio 0.5 seed 0)", "1 unfinished (ratio 0 seed 1)",
        "1 failed (ratio 0.3 seed 1)", "Not evaluated yet: 1 cell (1 unfinished)",
        "Not recorded: ratio 0.5 seed 1; ratio 0.75 seed 1", "0123456789 (4 cells), fedcba9876-dirty (1 cell)",
    ):  # fmt: skip
        assert part in data.caption


def test_unlike_protocols_are_refused(store):
    with pytest.raises(UsageError, match=r"(?s)1a2b3c4d5e6f: 1 cell\n.*other: 2 cells"):
        collected(store, "mixed")


def test_nothing_to_draw_yet(store):
    with pytest.raises(SdditError, match="Nothing to draw yet: 1 cell recorded"):
        collected(store, "started")
    with pytest.raises(SdditError, match="Nothing to draw yet"):
        plot_mask_ratio.collect(a_table().assign(**{"eval/fid": np.inf}))


def test_other_fields_are_never_averaged_over():
    table = pd.concat([a_table(**{"model.size": "S/2"}), a_table(**{"model.size": "B/2"})], ignore_index=True)
    data = plot_mask_ratio.collect(table)
    assert list(data.frame["series"].unique()) == ["SD-DiT, size B/2", "SD-DiT, size S/2"]
    assert (data.frame["seeds"] == 1).all()
    many = pd.concat([a_table(**{"train.lr": lr}) for lr in range(1, 9)], ignore_index=True)
    with pytest.raises(UsageError, match=r"train\.lr, which makes 8 lines"):
        plot_mask_ratio.collect(many)


def test_cells_without_a_mask_ratio_are_counted():
    table = pd.concat([a_table(), a_table(methods=("dit",), ratios=(np.nan,))], ignore_index=True)
    data = plot_mask_ratio.collect(table)
    assert set(data.frame["method"]) == {"sddit"}
    assert "not drawn: 1 cell." in data.caption


# ------------------------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize(
    "methods", [("sddit",), ("maskdit", "mdt", "sddit"), ("dit", "maskdit", "mdt", "sddit"), ("unknown",)]
)
def test_one_panel_a_method_and_no_text_overlaps(methods, seeds):
    figure = plot_mask_ratio.draw(plot_mask_ratio.collect(a_table(methods, seeds=seeds)))
    assert len(figure.axes) == len(methods)
    figure.draw_without_rendering()
    width, _ = figure.bbox.size
    caption = figure.texts[0].get_window_extent()
    assert caption.x1 <= width and caption.y0 >= 0
    for panel in figure.axes:
        assert panel.get_tightbbox().y0 > caption.y1
        assert panel.get_tightbbox().x1 <= figure.legends[0].get_window_extent().x0


def test_axis_is_logarithmic_beyond_a_decade():
    wide = plot_mask_ratio.draw(plot_mask_ratio.collect(a_table(steps=(100, 2000))))
    narrow = plot_mask_ratio.draw(plot_mask_ratio.collect(a_table(steps=(400, 600))))
    assert (wide.axes[0].get_yscale(), narrow.axes[0].get_yscale()) == ("log", "linear")


def test_line_breaks_where_nothing_is_done():
    table = a_table(steps=(600,))
    table.loc[table["method.mask_ratio"] == 0.3, "state"] = "pruned"
    figure = plot_mask_ratio.draw(plot_mask_ratio.collect(table))
    drawn = figure.axes[0].containers[0].lines[0].get_ydata(orig=False)
    assert list(np.isnan(drawn)) == [False, True, False]


def test_wide_intervals_do_not_flatten_the_lines():
    figure = plot_mask_ratio.draw(plot_mask_ratio.collect(a_table(seeds=(0, 5), steps=(600,))))
    _, high = figure.axes[0].get_ylim()
    assert high < 2 * score(0.0, 5, 600)
    assert "Some intervals reach beyond the frame." in figure.texts[0].get_text().replace("\n", " ")


def test_shades_are_told_apart_in_grey():
    def grey(colour):
        return float(np.dot(colour, (0.299, 0.587, 0.114)))

    for colour in style.COLOURS.values():
        lightness = [grey(shade) for shade in style.shades(colour, 5)]
        assert (np.diff(lightness) < -0.03).all()


# ------------------------------------------------------------------------------------------------------------ files


def test_files(store, tmp_path, capsys):
    paths = plot_mask_ratio.figure("mask_ratio", store, tmp_path / "figures")
    assert [path.name for path in paths] == ["mask_ratio.png", "mask_ratio.pdf", "mask_ratio.csv"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(path.name for path in paths)
    with Image.open(paths[0]) as image:
        assert image.width > 500 and np.asarray(image.convert("L")).std() > 5
    pdf = paths[1].read_bytes()
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    drawn = pd.read_csv(paths[2])
    assert len(drawn) == 27
    for row in drawn.itertuples():
        assert drawn.loc[row.Index, "eval/fid"] == score(row.mask_ratio, row.seed, row.step)


def test_same_data_same_bytes(tmp_path):
    data = plot_mask_ratio.collect(a_table())
    first, second = (
        common.save(plot_mask_ratio.draw(data), data.frame, "mask_ratio", tmp_path / name) for name in ("a", "b")
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_names_follow_the_sweep(store, tmp_path):
    paths = plot_mask_ratio.figure("half", store, tmp_path)
    assert [path.name for path in paths] == ["mask_ratio-half.png", "mask_ratio-half.pdf", "mask_ratio-half.csv"]
    assert common.output_name("mask_ratio", "a/b c", "mask_ratio") == "mask_ratio-a_b_c"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").touch()
    data = plot_mask_ratio.collect(a_table())
    with pytest.raises(UsageError, match="--out"):
        common.save(plot_mask_ratio.draw(data), data.frame, "mask_ratio", tmp_path / "taken")


# ----------------------------------------------------------------------------------------------------------- script


def script(*arguments, code=None, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = ["-c", code] if code else [str(ROOT / "analysis" / "plot_mask_ratio.py")]
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_script_neither_needs_nor_imports_torch_or_ray(store, tmp_path):
    code = (
        "import sys; sys.argv[0] = 'plot_mask_ratio.py'\n"
        "from analysis import common, plot_mask_ratio\n"
        "common.run(plot_mask_ratio.main)\n"
        "assert not {'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    ran = script("--sweep", "half", "--tracking-uri", store, "--paper", code=code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "INFO" not in ran.stderr and "Traceback" not in ran.stderr


def test_script_without_a_record(tmp_path):
    ran = script(cwd=tmp_path)
    assert ran.returncode == 1 and "No MLflow record at" in ran.stderr and "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_script_from_the_command_line(store, tmp_path):
    ran = script("--tracking-uri", store, "--out", str(tmp_path / "out"), "--no-paper", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert {Path(line).name for line in ran.stdout.split()} == {f"mask_ratio.{k}" for k in ("png", "pdf", "csv")}


def test_errors_become_messages_and_exit_statuses(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it

    def interrupted():
        raise KeyboardInterrupt

    for main, status, message in (
        (lambda: plot_mask_ratio.figure("mask_rato", store, tmp_path), 2, "Did you mean 'mask_ratio'?"),
        (lambda: plot_mask_ratio.figure("started", store, tmp_path), 1, "Nothing to draw yet"),
        (interrupted, 130, ""),
    ):
        with pytest.raises(SystemExit) as caught:
            common.run(main)
        assert caught.value.code == status and message in capsys.readouterr().err
