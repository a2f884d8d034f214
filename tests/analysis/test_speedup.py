"""How many times fewer steps and FLOPs than DiT: crossings, pairs, bounds, intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import speedup
from sddit.config import FRESH_SEED
from sddit.errors import SdditError, UsageError

STEPS = (100, 200, 400)
COST = {"dit": 10.0, "mdt": 20.0, "sddit": 5.0}  # FLOPs a step


def cell(method, fids, seed=0, *, kind="iddpm", state="done", steps=STEPS, **columns):
    """The rows of one cell, as `load_results` gives them."""
    return pd.DataFrame(
        [
            {
                "identity": f"{method}{kind}{seed}{sorted(columns.items())}", "run_id": "r", "state": state,
                "seed": seed, "step": step, "code": "c", "protocol": "p", "method.name": method, "diffusion.kind": kind,
                "model.size": "S/2", "eval/fid": fid, "cost/flops": COST[method] * step, **columns,
            }
            for step, fid in zip(steps, fids, strict=True)
        ]
    )  # fmt: skip


def row(*cells, reference="DiT", system="SD-DiT"):
    table = speedup.speedups(pd.concat(cells, ignore_index=True))
    (found,) = table[(table["reference"] == reference) & (table["system"] == system)].to_dict("records")
    return found


DIT = cell("dit", (90, 60, 30))


# -------------------------------------------------------------------------------------------------------- crossings


def test_the_crossing_lies_on_the_line_of_log_fid():
    found = row(DIT, cell("sddit", (90, 60, 15), kind="edm"))
    crossed = 200 + 200 * np.log(60 / 30) / np.log(60 / 15)
    assert found["steps"] == pytest.approx(400 / crossed) and found["steps"] == pytest.approx(400 / 300)
    assert found["flops"] == pytest.approx(4000 / (5 * 300))
    assert found["steps_text"] == "1.33×" and found["bound"] == "" and np.isnan(found["steps_low"])


def test_the_first_crossing_counts_even_if_the_curve_rises_again():
    found = row(DIT, cell("sddit", (90, 30, 50), kind="edm"))
    assert found["steps"] == 2 and found["not_reached"] == 0


def test_an_evaluation_at_the_level_is_a_crossing():
    assert row(DIT, cell("sddit", (30, 20, 10), kind="edm"))["steps_text"] == "4.00×"


def test_never_as_good_gives_an_upper_bound():
    found = row(DIT, cell("mdt", (90, 60, 40)), system="MDT")
    assert (found["steps"], found["flops"]) == (pytest.approx(1), pytest.approx(0.5))
    assert (found["steps_text"], found["flops_text"], found["not_reached"]) == ("< 1.00×", "< 0.50×", 1)


def test_as_good_at_the_first_evaluation_gives_a_lower_bound():
    found = row(DIT, cell("sddit", (20, 15, 10), kind="edm"))
    assert (found["steps_text"], found["flops_text"], found["at_first"]) == ("> 4.00×", "> 8.00×", 1)


def test_infinite_scores_are_not_on_the_line():
    assert row(DIT, cell("sddit", (np.inf, 60, 15), kind="edm"))["steps"] == pytest.approx(400 / 300)


def test_a_reference_that_had_been_as_good_before_is_told():
    found = row(cell("dit", (90, 20, 30)), cell("sddit", (90, 30, 10), kind="edm"))
    assert (found["steps"], found["early"]) == (2, 1)
    assert "DiT had been as good before its last step" in speedup.in_words(pd.DataFrame([found]))


# ------------------------------------------------------------------------------------------------------------ seeds


def test_seeds_are_paired_and_the_interval_is_of_the_log_ratio():
    finals = (30, 40, 20)
    references = [cell("dit", (90, 60, final), seed) for seed, final in enumerate(finals)]
    ours = [cell("sddit", (90, 45, 10 + seed), seed, kind="edm") for seed in range(3)]
    found = row(*references, *ours)
    crossed = [200 + 200 * np.log(45 / final) / np.log(45 / (10 + seed)) for seed, final in enumerate(finals)]
    logs = np.log(400 / np.array(crossed))
    low, high = np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
    np.testing.assert_allclose(
        [found["seeds"], found["steps"], found["steps_low"], found["steps_high"]], [3, np.exp(logs.mean()), low, high]
    )
    assert found["steps_text"] == f"{np.exp(logs.mean()):.2f}× [{low:.2f}, {high:.2f}]"


def test_seeds_without_a_counterpart_do_not_count():
    ours = cell("sddit", (90, 30, 10), kind="edm")
    assert row(DIT, cell("dit", (90, 60, 1), 1), ours, cell("sddit", (1, 1, 1), 2, kind="edm"))["seeds"] == 1
    assert speedup.speedups(pd.concat([DIT, ours.assign(seed=1)], ignore_index=True)).empty


def test_one_seed_that_never_gets_there_leaves_a_bound_and_no_interval():
    cells = [cell("dit", (90, 60, 30), seed) for seed in range(3)]
    ours = [cell("sddit", (90, 30, last), seed, kind="edm") for seed, last in enumerate((10, 10, 10))]
    ours[1] = cell("sddit", (90, 60, 40), 1, kind="edm")
    found = row(*cells, *ours)
    assert found["bound"] == "<" and found["not_reached"] == 1 and np.isnan(found["steps_low"])
    assert found["steps"] == pytest.approx((2 * 1 * 2) ** (1 / 3))
    assert "SD-DiT < 1.59× / < 3.17×, not reached by 1 of 3 seeds" in speedup.in_words(pd.DataFrame([found]))


def test_upper_and_lower_bounds_together_bound_nothing():
    cells = [cell("dit", (90, 60, 30), seed) for seed in range(2)]
    found = row(*cells, cell("sddit", (20, 15, 10), 0, kind="edm"), cell("sddit", (90, 60, 40), 1, kind="edm"))
    assert np.isnan(found["steps"]) and found["steps_text"] == "unknown" and found["bound"] == ""


# ------------------------------------------------------------------------------------------------------- what counts


def test_against_dit_as_published_and_against_the_control():
    control, ours = cell("dit", (90, 30, 20), kind="edm"), cell("sddit", (90, 30, 10), kind="edm")
    table = speedup.speedups(pd.concat([DIT, control, ours], ignore_index=True))
    assert list(zip(table["reference"], table["system"], strict=True)) == [
        ("DiT", "DiT (EDM)"), ("DiT", "SD-DiT"), ("DiT (EDM)", "DiT"), ("DiT (EDM)", "SD-DiT")
    ]  # fmt: skip
    assert list(table["steps_text"]) == ["2.00×", "2.00×", "< 1.00×", f"{table['steps'][3]:.2f}×"]
    words = speedup.in_words(table)
    assert "final FID of DiT, steps / FLOPs: DiT (EDM) 2.00× / 2.00×; SD-DiT 2.00× / 4.00×." in words
    assert "one seed, no interval" in words


@pytest.mark.parametrize("state", ["pruned", "failed", "running"])
def test_only_done_cells_count(state):
    table = pd.concat([DIT, cell("sddit", (90, 30, 10), kind="edm", state=state)], ignore_index=True)
    assert speedup.speedups(table).empty and speedup.in_words(speedup.speedups(table)) == ""


def test_only_default_rates_and_no_fresh_seeds_count():
    ours = cell("sddit", (90, 60, 15), kind="edm", lr="x1")
    other = cell("sddit", (1, 1, 1), kind="edm", lr="x2")
    fresh = cell("sddit", (1, 1, 1), FRESH_SEED, kind="edm", lr="x1")
    found = row(DIT.assign(lr="x1"), cell("dit", (9, 9, 9), FRESH_SEED, lr="x1"), ours, other, fresh)
    assert (found["seeds"], found["steps"]) == (1, pytest.approx(400 / 300))


def test_references_are_of_the_same_size():
    larger = cell("dit", (90, 60, 10)).assign(**{"model.size": "B/2", "identity": "larger"})
    ours = cell("sddit", (90, 30, 10), kind="edm")
    table = speedup.speedups(pd.concat([DIT, larger, ours], ignore_index=True))
    assert list(table["reference"]) == ["DiT, size S/2"]


def test_costs_that_are_not_recorded_are_unknown():
    table = pd.concat([DIT, cell("sddit", (90, 30, 10), kind="edm")], ignore_index=True)
    found = speedup.speedups(table.drop(columns="cost/flops")).iloc[0]
    assert (found["steps_text"], found["flops_text"]) == ("2.00×", "unknown")


def test_unlike_protocols_and_empty_tables_are_refused():
    with pytest.raises(UsageError, match="2 protocols"):
        speedup.speedups(pd.concat([DIT, cell("sddit", (3, 2, 1), kind="edm", protocol="q")], ignore_index=True))
    with pytest.raises(SdditError, match="Nothing to draw yet"):
        speedup.speedups(DIT[:0])
