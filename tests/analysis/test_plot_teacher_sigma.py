"""The teacher's noise: the order of its values, and the health of the targets beside FID."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import health, plot_teacher_sigma

SIGMAS = ("student", 0.5, "drawn", 0.002, 0.1)  # in no order


def a_table(information=1.0, methods=("sddit",)):
    return pd.DataFrame(
        {
            "identity": f"{method}-{sigma}-{seed}", "run_id": "r", "state": "done", "seed": seed, "step": step,
            "code": "c", "protocol": "p", "method.name": method, "method.teacher_sigma": sigma,
            "eval/fid": 20_000 / step + seed + i, **dict.fromkeys(health.METRICS, information),
        }
        for method in methods for i, sigma in enumerate(SIGMAS) for seed in (0, 1) for step in (400, 600)
    )  # fmt: skip


def test_fixed_values_come_before_those_that_follow_the_student():
    figure = plot_teacher_sigma.draw(plot_teacher_sigma.collect(a_table()))
    labels = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_xticklabels()]
    assert labels == ["0.002", "0.1", "0.5", "drawn in [σ$_{min}$, σ$_S$]", "σ$_S$"]


def test_health_at_the_last_step_beside_fid():
    table = a_table()
    table.loc[table["step"] == 400, list(health.METRICS)] = 9.0
    table.loc[table["method.teacher_sigma"] == "student", "train/information_cls"] = 0.02
    data = plot_teacher_sigma.collect(table)
    _, panel = plot_teacher_sigma.draw(data).axes
    cls, patch = (container.lines[0].get_ydata(orig=False) for container in panel.containers)
    np.testing.assert_allclose(cls, [1, 1, 1, 1, 0.02])
    np.testing.assert_allclose(patch, 1)
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["[CLS]", "patch", "dead"]
    assert "below 0.1 nat the targets are dead" in data.caption


@pytest.mark.parametrize("methods", [("sddit",), ("sddit", "other")])
def test_one_panel_of_health_for_each_of_fid(methods):
    figure = plot_teacher_sigma.draw(plot_teacher_sigma.collect(a_table(methods=methods)))
    assert [panel.get_ylabel() for panel in figure.axes].count("information of the targets (nat)") == len(methods)
    assert len(figure.axes) == 2 * len(methods)


def test_without_recorded_health_there_is_fid_alone():
    data = plot_teacher_sigma.collect(a_table(information=np.nan))
    assert len(plot_teacher_sigma.draw(data).axes) == 1
    assert "information of the targets at the last step was not recorded" in data.caption
