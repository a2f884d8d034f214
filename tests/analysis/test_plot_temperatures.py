"""Temperatures: the numbers of the map, and what stands where there is none."""

from __future__ import annotations

from itertools import product

import matplotlib
import numpy as np
import pandas as pd

from analysis import common, health, plot_temperatures

STUDENTS, TEACHERS = (0.1, 0.2), (0.04, 0.07)


def a_table(seeds=(0, 1), information=1.0):
    return pd.DataFrame(
        {
            "identity": f"{student}-{teacher}-{seed}", "run_id": "r", "state": "done", "seed": seed, "step": 600,
            "code": "c", "protocol": "p", "method.name": "sddit", "method.tau_student": student,
            "method.tau_teacher": teacher, "method.tau_teacher_cls": teacher,
            "eval/fid": 20 + 100 * student + 100 * teacher + 2 * seed, **dict.fromkeys(health.METRICS, information),
        }
        for student, teacher, seed in product(STUDENTS, TEACHERS, seeds)
    )  # fmt: skip


def written(panel):
    """(τ_S, τ_T) → what stands there."""
    places = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in panel.texts}
    return {(STUDENTS[y], TEACHERS[x]): text.replace("\n", " ") for (y, x), text in places.items()}


def test_mean_and_half_of_the_interval_in_every_place():
    panel, *_ = plot_temperatures.draw(plot_temperatures.collect(a_table())).axes
    for (student, teacher), text in written(panel).items():
        mean, low, _ = common.t_interval(20 + 100 * student + 100 * teacher + 2 * seed for seed in (0, 1))
        assert text == f"{mean:.1f} ±{mean - low:.1f}"
    one = plot_temperatures.collect(a_table(seeds=(0,)))
    assert written(plot_temperatures.draw(one).axes[0])[0.1, 0.04] == "34.0"
    assert "±" not in plot_temperatures.draw(one).texts[0].get_text()


def test_places_without_a_number_say_why_and_are_hatched():
    table = a_table()
    here = (table["method.tau_student"] == 0.2) & (table["method.tau_teacher"] == 0.07)
    for state, text in (("pruned", "stopped early"), ("failed", "failed"), ("running", "unfinished")):
        table.loc[here, "state"] = state
        panel, *_ = plot_temperatures.draw(plot_temperatures.collect(table)).axes
        assert written(panel)[0.2, 0.07] == text
        assert [bool(patch.get_hatch()) for patch in panel.patches] == [False, False, False, True]
    absent = plot_temperatures.collect(table[~here])
    assert written(plot_temperatures.draw(absent).axes[0])[0.2, 0.07] == "not run"
    assert "Not recorded: τ_S 0.2 τ_T 0.07 seed 0; τ_S 0.2 τ_T 0.07 seed 1." in absent.caption


def test_places_known_from_their_cells_alone_are_in_the_map():
    table = a_table(seeds=(0,))
    cells = table.assign(steps=600, tags=[{}] * 4, params=[
        {name: row[name] for name in table if "." in name} for row in table.to_dict("records")
    ])  # fmt: skip
    cells.loc[cells["method.tau_student"] == 0.2, "state"] = "running"
    data = plot_temperatures.collect(table[table["method.tau_student"] == 0.1], cells)
    panel, *_ = plot_temperatures.draw(data).axes
    assert written(panel)[0.2, 0.04] == "unfinished" and written(panel)[0.1, 0.04] == "34.0"


def test_dead_targets_are_marked():
    table = a_table()
    table.loc[table["method.tau_teacher"] == 0.07, "train/information_patch"] = 0.04
    _, cls, patch = plot_temperatures.draw(plot_temperatures.collect(table)).axes
    assert not any("dead" in text for text in written(cls).values())
    assert {place for place, text in written(patch).items() if "dead" in text} == {(0.1, 0.07), (0.2, 0.07)}


def test_without_recorded_health_there_is_one_map():
    data = plot_temperatures.collect(a_table(information=np.nan))
    assert len(plot_temperatures.draw(data).axes) == 1 and "was not recorded" in data.caption


def test_colours_are_evenly_darker_in_grey():
    shades = matplotlib.colormaps[plot_temperatures.COLOURS](np.linspace(0, 1, 9))[:, :3]
    assert (np.diff(shades @ (0.299, 0.587, 0.114)) > 0.05).all()


def test_better_is_darker_in_every_map():
    table = a_table()
    table["train/information_cls"] = 2.0 - 5 * table["method.tau_student"]
    fid, cls, _ = plot_temperatures.draw(plot_temperatures.collect(table)).axes
    for panel in (fid, cls):
        first, *_, last = (np.dot(patch.get_facecolor()[:3], (0.299, 0.587, 0.114)) for patch in panel.patches)
        assert first < last
