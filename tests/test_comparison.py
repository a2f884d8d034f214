"""``sddit compare``: which settings are meant, what is paired, what the numbers allow to say, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
from recorded import Recorded
from scipy import stats

from sddit import cli
from sddit.comparison import compare
from sddit.comparison.report import report
from sddit.comparison.settings import Sweep
from sddit.comparison.statistics import holm, paired
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells

STEPS = (200, 400, 600)
# Ratio → final FID of seeds 0, 1, …: 0.5 is higher at every seed, 0.75 is not to be told from 0.2.
FINAL = {0.2: [20.0, 24.0, 22.0, 26.0], 0.5: [25.1, 28.9, 27.2, 30.8], 0.75: [22.0, 21.0, 25.0, 24.0]}


def points(final, steps=STEPS, metric="eval/fid"):
    return {metric: {step: final * steps[-1] / step for step in steps}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    record = Recorded(tmp_path_factory.mktemp("record"))
    ratio = "method.mask_ratio"

    def add(sweep, value, seed, final, at=STEPS, changes=None, **options):
        changes = {ratio: value} | (changes or {})
        record.cell(sweep, seed=seed, point={ratio: value}, changes=changes, scores=points(final, at), **options)

    record.sweep("mask_ratio", axes=[ratio])
    for value, finals in FINAL.items():
        for seed, final in enumerate(finals):
            add("mask_ratio", value, seed, final)
    add("mask_ratio", 0.2, 4, 21.0)
    add("mask_ratio", 0.2, 5, 90.0, STEPS[:1], state="pruned")
    add("mask_ratio", 0.5, 6, 90.0, STEPS[:2], state="running")
    add("mask_ratio", 0.5, 7, float("inf"))
    add("mask_ratio", 0.9, 0, 30.0, code="fedcba987654-dirty")

    record.sweep("convergence", axes=["system", "lr"])
    for system, method, kind in (("DiT (EDM)", "dit", "edm"), ("SD-DiT", "sddit", "edm")):
        for lr, value in (("x1", 1e-3), ("x2", 2e-3)):
            for seed in (0, 1, 1000):
                record.cell(
                    "convergence", method, seed=seed, point={"system": system, "lr": lr},
                    changes={"train.lr": value, "diffusion.kind": kind},
                    scores=points(20.0 + seed % 7 + 3 * (lr == "x2")) | points(0.9, metric="eval/precision"),
                )  # fmt: skip

    record.sweep("longer", axes=[ratio])
    add("longer", 0.2, 0, 20.0)
    add("longer", 0.2, 1, 21.0)
    add("longer", 0.5, 0, 15.0, (*STEPS, 800, 1200), steps=1200)
    add("longer", 0.5, 1, 16.0, (*STEPS, 800, 1200), steps=1200)

    record.sweep("other", axes=[ratio])
    for seed in (0, 1):
        add("other", 0.2, seed, 20.0, changes={"eval.samples": 512})
    record.sweep("started", axes=[ratio])
    for value in (0.2, 0.5):
        add("started", value, 0, 90.0, STEPS[:1], state="running")
    record.sweep("wide", axes=["train.lr"])
    for i in range(25):
        lr = 0.001 * (i + 1)
        record.cell("wide", point={"train.lr": lr}, changes={"train.lr": lr}, scores=points(20.0))
    return record.uri


# ------------------------------------------------------------------------------------------------------- statistics


def test_holm_by_hand():
    # in order 0.01, 0.02, 0.03, 0.04: ×4, ×3, ×2, ×1 = 0.04, 0.06, 0.06, 0.04, and none below the one before
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.7, 0.9]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.03, np.nan, 0.01]), [0.03, np.nan, 0.02])  # what was not tested is no test
    assert holm([]) == []


def test_paired_over_matched_seeds():
    a, b = {0: 20.0, 1: 24.0, 2: 22.0, 5: 99.0}, {0: 21.0, 1: 27.0, 2: 24.0, 7: 1.0}
    found = paired(a, b)
    assert found.seeds == (0, 1, 2)
    assert (found.baseline, found.other, found.mean) == (22.0, 24.0, 2.0)
    half = stats.t.ppf(0.975, 2) * 1.0 / np.sqrt(3)  # the differences 1, 3, 2 have standard deviation 1
    np.testing.assert_allclose([found.low, found.high], [2 - half, 2 + half])
    np.testing.assert_allclose(found.p, 2 * stats.t.sf(2 * np.sqrt(3), 2))


@pytest.mark.parametrize("other", [{}, {3: 1.0}, {0: 21.0}])
def test_no_test_with_fewer_than_two_seeds(other):
    found = paired({0: 20.0, 1: 24.0}, other)
    assert np.isnan([found.low, found.high, found.p]).all() and not found.shown


def test_equal_scores_show_nothing():
    found = paired({0: 20.0, 1: 24.0}, {0: 20.0, 1: 24.0})
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("text", ["mask_ratio=0.5", "method.mask_ratio=0.50", "mask_ratio:mask_ratio=.5"])
def test_a_setting_by_its_values(uri, text):
    found = compare(["mask_ratio=0.2", text], "mask_ratio", uri)
    assert found.settings[1].fields["method.mask_ratio"] == 0.5
    assert found.scores[1] == dict(enumerate(FINAL[0.5]))


def test_named_axes_and_axes_together(uri):
    found = compare(["system=DiT (EDM),lr=x1", "system=sd-dit,lr=x2"], "convergence", uri)
    assert [s.label for s in found.settings] == ["system=DiT (EDM),lr=x1", "system=SD-DiT,lr=x2"]
    assert set(found.scores[1]) == {0, 1, 1000}  # fresh seeds are seeds
    fields = compare(["method=dit,train.lr=0.001", "method=sddit,lr=x1"], "convergence", uri)
    assert [s.label for s in fields.settings] == ["system=DiT (EDM),lr=x1", "system=SD-DiT,lr=x1"]


def test_an_identity_stands_for_all_seeds(uri):
    cells = load_cells("mask_ratio", uri)
    identity = cells.loc[cells["params"].map(lambda p: p["method.mask_ratio"] == 0.5), "identity"].iloc[1]
    found = compare(["mask_ratio=0.2", identity], "mask_ratio", uri)
    assert found.settings[1].label == "mask_ratio=0.5" and len(found.scores[1]) == 4
    assert Sweep("mask_ratio", uri, "eval/fid").setting(identity[:8]).label == "mask_ratio=0.5"


def test_settings_of_two_sweeps(uri):
    found = compare(["mask_ratio:mask_ratio=0.2", "convergence:system=SD-DiT,lr=x1"], None, uri)
    assert found.differences[0].seeds == (0, 1)
    text = report(found)
    assert "mask_ratio:mask_ratio=0.2" in text and "convergence:system=SD-DiT,lr=x1" in text


@pytest.mark.parametrize(
    ("texts", "sweep", "message"),
    [
        (["mask_ratio=0.2"], "mask_ratio", "Name two settings"),
        (["mask_ratio=0.2", "mask_ratio=0.3"], "mask_ratio", r"(?s)No setting 'mask_ratio=0.3'.*\n  mask_ratio=0.75  "),
        (["mask_ratio=0.2", "mask=0.3"], "mask_ratio", "no axis or field 'mask'. Did you mean 'mask_ratio'"),
        (["mask_ratio=0.2", "abc"], "mask_ratio", "at least 4 digits of an identity"),
        (["mask_ratio=0.2", "zzzz"], "mask_ratio", "No setting 'zzzz'"),
        (["mask_ratio=0.2", "method.mask_ratio=0.2"], "mask_ratio", "is the same setting as 'mask_ratio=0.2'"),
        (["system=SD-DiT", "lr=x1"], "convergence", r"stands for 2 settings.*\n.*lr=x1.*\n.*lr=x2"),
        (["mask_ratio=0.2", "mask_ratio=0.5"], None, "Give --sweep NAME, or write NAME:mask_ratio=0.2"),
        (["mask_ratio=0.2", "mask_ratio=0.5"], "mask_rato", "Did you mean 'mask_ratio'"),
        (["lr=1", "lr=2"], "wide", r"(?s)(\n  lr=0\.0\d+ .*){20}\n  and 5 more$"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_what_is(uri, texts, sweep, message):
    with pytest.raises(UsageError, match=message):
        compare(texts, sweep, uri)


# ------------------------------------------------------------------------------------------------------- comparison


def test_numbers_and_verdicts(uri):
    found = compare(["mask_ratio=0.2", "mask_ratio=0.5", "mask_ratio=0.75"], "mask_ratio", uri)
    higher, same = found.differences
    a, b, c = (np.array(FINAL[ratio]) for ratio in FINAL)
    tests = stats.ttest_rel(b, a), stats.ttest_rel(c, a)
    for difference, test, other in zip((higher, same), tests, (b, c), strict=True):
        assert difference.seeds == (0, 1, 2, 3)
        np.testing.assert_allclose((difference.mean, difference.p), (np.mean(other - a), test.pvalue))
    assert (higher.adjusted, same.adjusted) == (pytest.approx(2 * higher.p), pytest.approx(same.p))
    text = report(found)
    assert f"B: higher than A by 5.00 ({higher.low:.2f} to {higher.high:.2f}), mean over 4 seeds." in text
    assert (
        f"C: no difference from A shown: with 4 seeds, anything from {same.low:+.2f} to {same.high:+.2f} fits." in text
    )
    assert "corrected by Holm for 2 comparisons" in text and "confirm it on fresh seeds" in text


def test_correction_can_take_a_difference_away(uri):
    from dataclasses import replace

    found = compare(["mask_ratio=0.2", "mask_ratio=0.5"], "mask_ratio", uri)
    text = report(replace(found, differences=[replace(found.differences[0], p=0.04, adjusted=0.08)]))
    assert "B: no difference from A shown: p is 0.040 alone, but 0.080 among these comparisons." in text


def test_what_is_left_out_is_counted_and_named(uri):
    text = report(compare(["mask_ratio=0.2", "mask_ratio=0.5"], "mask_ratio", uri))
    rows = {line[:1]: line for line in text.splitlines() if line.startswith(("A  ", "B  "))}
    assert rows["A"].endswith("5 (0, 1, 2, 3, 4)  1 stopped early")
    assert rows["B"].endswith("4 (0, 1, 2, 3)     1 unfinished, 1 infinite")
    assert "Finished in A only: seed 4." in text and "Holm" not in text


def test_one_matched_seed_gives_no_test_and_code_is_told_apart(uri):
    text = report(compare(["mask_ratio=0.2", "mask_ratio=0.9"], "mask_ratio", uri))
    assert "B: no test: one seed is finished in both, and a test needs two." in text
    assert "Code: revisions differ." in text and "B: fedcba9876-dirty (1 cell)" in text


def test_fields_that_differ(uri):
    text = report(compare(["mask_ratio=0.2", "mask_ratio=0.5"], "mask_ratio", uri))
    table = text[text.index("fields that differ") :].splitlines()
    assert table[1].split() == ["method.mask_ratio", "0.2", "0.5"] and table[2] == ""
    assert "Code: revision 0123456789 in all cells." in text
    text = report(compare([f"system={s},lr=x1" for s in ("DiT (EDM)", "SD-DiT")], "convergence", uri))
    own = text[text.index("Fields of B alone:") :]
    assert "method.lambda_d 0.1" in own and "train.lr" not in text and "seed" not in own


def test_other_metrics(uri):
    settings = ["system=SD-DiT,lr=x1", "system=SD-DiT,lr=x2"]
    text = report(compare(settings, "convergence", uri, metric="eval/precision"))
    assert text.startswith("eval/precision at step 600") and "equal at each of 3 seeds" in text
    with pytest.raises(UsageError, match=r"No 'eval/recall' in the 6 finished cells.*eval/precision"):
        compare(settings, "convergence", uri, metric="eval/recall")


def test_unlike_protocols_are_refused(uri):
    with pytest.raises(
        UsageError, match=r"(?s)unlike protocols.*protocol \w{12}, 1,024 samples.*512 samples"
    ) as caught:
        compare(["mask_ratio:mask_ratio=0.2", "other:mask_ratio=0.2"], None, uri)
    assert "cyclic labels" not in str(caught.value)  # which they share


def test_unlike_last_steps_are_refused(uri):
    texts = ["mask_ratio=0.2", "mask_ratio=0.5"]
    with pytest.raises(UsageError) as caught:
        compare(texts, "longer", uri)
    for part in ("0.2: step 600 (2 cells)", "0.5: step 1,200 (2 cells)", "200, 400, 600.", "--step 600"):
        assert part in str(caught.value)
    found = compare(texts, "longer", uri, step=600)
    assert found.step == 600 and found.scores[1] == {0: 30.0, 1: 32.0}
    with pytest.raises(UsageError, match=r"--step 1200: not evaluated in all settings. Steps that all have: 200, 400"):
        compare(texts, "longer", uri, step=1200)


def test_nothing_finished(uri):
    with pytest.raises(SdditError, match="Nothing to compare yet"):
        compare(["mask_ratio=0.2", "mask_ratio=0.5"], "started", uri)


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sddit", "compare", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return call


def test_command(uri, command):
    status, out, err = command("mask_ratio=0.2", "mask_ratio=0.5", "--sweep", "mask_ratio", "--tracking-uri", uri)
    assert (status, err) == (0, "") and out.startswith("eval/fid at step 600\n") and "\x1b" not in out
    status, out, err = command("other:mask_ratio=0.2", "longer:mask_ratio=0.2", "--tracking-uri", uri)
    assert (status, out) == (2, "") and "unlike protocols" in err and "Traceback" not in err


def test_help_loads_nothing_slow():
    code = "import sys, sddit.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pandas", "scipy", "mlflow", "torch", "ray"} & set(loaded)
