"""Components: which setting is the reference, and the differences to it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from recorded import Recorded
from scipy import stats

from analysis import common, plot_components

SETTINGS = {
    "no L_D": {"method.lambda_d": 0.0},  # recorded before the reference, as happens when cells run side by side
    "SD-DiT": {"method.lambda_d": 0.1},
    "no masking": {"method.lambda_d": 0.1, "method.mask_ratio": 0.0},
    "DiT (EDM)": {"method.name": "dit", "diffusion.kind": "edm"},
}


def a_table(settings=SETTINGS, seeds=(0, 1, 2), state="done"):
    own = {"method.name": "sddit", "method.mask_ratio": 0.2, "method.last_blocks": None, "diffusion.kind": "edm"}
    return pd.DataFrame(
        {
            "identity": f"{name}-{seed}", "run_id": "r", "state": state, "seed": seed, "step": 600, "code": "c",
            "protocol": "p", "component": name, "eval/fid": 20.0 + 4 * i + 10 * seed + (i * seed) % 3,
            **({} if "method.name" in fields else own), **fields,
        }
        for i, (name, fields) in enumerate(settings.items()) for seed in seeds
    )  # fmt: skip


def series(data):
    return list(data.frame["series"].cat.categories)


def test_reference_is_what_the_others_are_changes_of():
    assert series(plot_components.collect(a_table())) == ["SD-DiT", "no L_D", "no masking", "DiT (EDM)"]
    pair = {name: SETTINGS[name] for name in ("SD-DiT", "DiT (EDM)")}
    assert series(plot_components.collect(a_table(pair))) == ["SD-DiT", "DiT (EDM)"]
    assert series(plot_components.collect(a_table(dict(reversed(pair.items()))))) == ["SD-DiT", "DiT (EDM)"]


def test_reference_of_the_record_comes_first(tmp_path, monkeypatch):
    record = Recorded(tmp_path)
    record.sweep("components", axes=["component"], **{"sddit.reference": '{"component": "no L_D"}'})
    for name in ("SD-DiT", "no L_D", "no masking"):
        record.cell("components", point={"component": name}, changes=SETTINGS[name], scores={"eval/fid": {600: 20.0}})
    drawn = []
    monkeypatch.setattr(common, "save", lambda figure, frame, *_: drawn.append(frame))
    plot_components.figure("components", record.uri, tmp_path)
    assert drawn[0]["series"].iloc[0] == "no L_D"


def test_differences_are_paired_over_common_seeds():
    table = a_table()
    table = table[(table["component"] != "no masking") | (table["seed"] != 2)]
    frame = plot_components.collect(table).frame
    scores = table.set_index(["component", "seed"])["eval/fid"]
    for name, seeds in (("no L_D", [0, 1, 2]), ("no masking", [0, 1])):
        a, b = (scores[component].loc[seeds] for component in (name, "SD-DiT"))
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        rows = frame.loc[frame["series"] == name, plot_components.DIFFERENCE]
        np.testing.assert_allclose(rows, [[(a - b).mean(), low, high, len(seeds)]] * len(seeds))
    assert frame.loc[frame["series"] == "SD-DiT", plot_components.DIFFERENCE].isna().all(axis=None)


def texts(data):
    """Setting → what stands at its right."""
    figure = plot_components.draw(data)
    (panel,) = figure.axes
    return {
        label.get_text(): text.get_text() for label, text in zip(panel.get_yticklabels(), panel.texts, strict=False)
    }


def test_one_seed_has_a_difference_without_interval():
    data = plot_components.collect(a_table(seeds=(0,)))
    assert "one seed, no interval" in data.caption and "one seed is no evidence of a difference" in data.caption
    assert texts(data)["no L_D"] == "−4.0, n=1"


def test_settings_without_a_done_cell_keep_their_row():
    table = a_table()
    table.loc[table["component"] == "no masking", "state"] = "pruned"
    data = plot_components.collect(table)
    assert texts(data) | {"no masking": "no cell done", "SD-DiT": "reference"} == texts(data)
    assert data.frame.loc[data.frame["series"] == "no masking", plot_components.DIFFERENCE].isna().all(axis=None)
    table.loc[table["component"] == "SD-DiT", "state"] = "failed"
    assert texts(plot_components.collect(table))["no L_D"] == "no seed in common"


def test_a_stopped_cell_far_off_does_not_press_the_rows_flat():
    table = a_table(seeds=(0,))
    table.loc[table["component"] == "no masking", ["state", "step", "eval/fid"]] = ["pruned", 200, 5000.0]
    figure = plot_components.draw(plot_components.collect(table))
    assert figure.axes[0].get_xlim()[1] < 100
    assert "Faded marks at its edge are beyond it." in figure.texts[0].get_text().replace("\n", " ")
