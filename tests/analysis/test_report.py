"""The report of a sweep: what it answers and with which caution, what it shows, and that it is one safe file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded import Recorded

from analysis import evidence, report
from analysis.answer import answer, collect, ranked
from analysis.common import NoiseFloor
from sddit.config import FRESH_SEED
from sddit.errors import TrackingError, UsageError
from sddit.results import load_cells

ROOT = Path(__file__).resolve().parents[2]
RATIO = "method.mask_ratio"
FLOOR = NoiseFloor(3.0, 0.1, 20)
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single' </style><img src=x onerror=alert(1)>"


class Sweep:
    """A sweep over mask ratios, of its own name in a record that the tests of this file share."""

    def __init__(self, recorded, name):
        self.recorded, self.name, self.client, self.uri = recorded, name, recorded.client, recorded.uri

    def open(self, fids=(), axes=(RATIO,), **tags):
        """With `fids`: ratio → FID of seeds 0, 1, …"""
        question = tags.pop("sddit.question", "How much can be masked?")
        self.recorded.sweep(self.name, question=question, axes=axes, **tags)
        for ratio, values in dict(fids).items():
            for seed, fid in enumerate(values):
                self.add(ratio, seed=seed, fid=fid)

    @property
    def parent(self):
        return self.recorded.sweeps[self.name][1]

    def cell(self, **kwargs):
        return self.recorded.cell(self.name, **kwargs)

    def add(self, ratio, *, fid=20.0, state="done", scores=None, changes=None, **kwargs):
        changes = {RATIO: ratio} | (changes or {})
        points = {"eval/fid": {300: fid + 5, 600: fid} if state == "done" else {300: fid}} | (scores or {})
        return self.cell(point={RATIO: ratio}, changes=changes, state=state, scores=points, **kwargs)

    def log_grids(self, run, steps):
        for step in steps:
            self.client.log_image(run, np.full((16, 80), step % 256, np.uint8), key="samples/grid", step=step)

    def settings(self, axes=(RATIO,)):
        return collect(load_cells(self.name, self.uri), axes)

    def answer(self, reference=()):
        return answer(self.settings(), FLOOR, dict(reference))

    def page(self, out, figures=()):
        return report.report(self.name, self.uri, out, list(figures)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """In a folder of its own, since a local record puts artifacts beside where it is opened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("record"))
        yield Recorded(folder)


@pytest.fixture
def sweep(recorded, request):
    return Sweep(recorded, request.node.name.removeprefix("test_"))


# ----------------------------------------------------------------------------------------------------------- answer


def test_one_seed_allows_no_conclusion(sweep):
    sweep.open({0.0: [21.0], 0.3: [18.0], 0.5: [20.0]})
    first, floor, difference, picked = sweep.answer()
    assert first == (
        "Lowest mean FID at the last step (600): 18.00 (seed 0 alone: one seed allows no conclusion), "
        "with mask ratio 0.3."
    )
    assert floor.startswith("Noise floor, real images against real ones: FID 3 ± 0.1")
    assert difference == "Difference to mask ratio 0.5, the runner-up: −2.00 with one seed, which allows no conclusion."
    assert picked.startswith("Picked from 3 settings") and "no fresh seed has confirmed it" in picked


def test_the_difference_is_paired_over_seeds(sweep):
    # Seeds differ by far more than settings do, yet always by about the same: only pairs can tell.
    sweep.open({0.3: [10.0, 20.0, 30.0], 0.5: [11.0, 21.1, 30.9]})
    first, _, difference, _ = sweep.answer()
    assert "20.00 (95% interval −4.84 to 44.84 over 3 seeds)".replace("−", "-") in first
    assert "−1.00, 95% interval −1.25 to −0.75, paired over 3 seeds, which excludes 0" in difference


def test_seeds_that_do_not_tell_settings_apart(sweep):
    sweep.open({0.3: [10.0, 14.0], 0.5: [13.0, 12.0]})
    assert "which includes 0, so these seeds do not tell them apart" in sweep.answer()[2]


def test_a_reference_is_compared_with_in_place_of_the_runner_up(sweep):
    sweep.open({0.0: [30.0, 31.0], 0.3: [10.0, 11.0], 0.5: [12.0, 13.0]})
    assert "Difference to mask ratio 0, the reference: −20.00" in sweep.answer({RATIO: 0.0}.items())[2]
    assert "Difference to mask ratio 0.5, the runner-up" in sweep.answer({RATIO: 0.3}.items())[2]


def test_fresh_seeds_confirm_and_never_pick(sweep):
    sweep.open({0.3: [10.0, 10.2], 0.5: [12.0, 12.2]})
    for i, fid in enumerate((14.0, 15.0, 16.0)):
        sweep.add(0.3, seed=FRESH_SEED + i, fid=fid)
    sweep.add(0.5, seed=FRESH_SEED, fid=1.0)
    first, _, _, picked, fresh = sweep.answer()
    assert "10.10" in first and "mask ratio 0.3" in first
    assert picked.endswith("with fresh seeds, which did not pick it: 15.00 (95% interval 12.52 to 17.48 over 3 seeds).")
    assert fresh == "Difference with fresh seeds: +13.00 with one seed, which allows no conclusion."


def test_only_the_last_step_of_done_cells_counts(sweep, tmp_path):
    sweep.open({0.3: [15.0]})
    sweep.add(0.5, fid=1.0, state="pruned")
    sweep.add(0.65, fid=1.0, state="failed")
    sweep.cell(point={RATIO: 0.2}, changes={RATIO: 0.2}, steps=200, scores={"eval/fid": {200: 1.0}})
    found = sweep.answer()
    assert "15.00" in found[0] and found[-1] == "Not compared: 3 settings without a FID at step 600."
    page = sweep.page(tmp_path)
    assert "4 cells: 2 done, 1 failed, 1 stopped early." in page


def test_an_infinite_fid_is_no_best_and_has_no_interval(sweep, tmp_path):
    sweep.open({0.3: [15.0, 16.0], 0.5: [np.inf, np.inf]})
    assert "with mask ratio 0.3" in sweep.answer()[0] and "unknown" in sweep.answer()[2]
    assert "<td>inf</td>" in sweep.page(tmp_path)


def test_empty_and_half_finished_sweeps_say_so(sweep, tmp_path):
    sweep.open(axes=[RATIO])
    assert "No answer yet: no cell is recorded." in sweep.page(tmp_path)
    sweep.cell(point={RATIO: 0.3}, changes={RATIO: 0.3}, state="running")
    page = sweep.page(tmp_path)
    assert "No answer yet: none of 1 cell is done with a FID (1 unfinished)." in page
    assert "Half-finished: 1 cell unfinished" in page
    sweep.add(0.5, fid=12.0)
    assert "12.00" in sweep.page(tmp_path)


def test_an_interrupted_command_is_told(sweep, tmp_path):
    sweep.open({0.3: [15.0]})
    warning = "The last command was interrupted or failed"
    assert warning not in sweep.page(tmp_path)
    sweep.client.set_terminated(sweep.parent, status="KILLED")
    assert warning in sweep.page(tmp_path)


def test_settings_are_in_the_order_of_their_values_and_words(sweep):
    sweep.open(axes=["method.teacher_sigma"])
    for value in ("student", 0.2, 0.002):
        sweep.cell(point={"method.teacher_sigma": value}, changes={"method.teacher_sigma": value})
    settings = sweep.settings(["method.teacher_sigma"])
    assert [s.point["method.teacher_sigma"] for s in settings] == [0.002, 0.2, "student"]
    assert ranked(settings) == []


def test_a_record_without_axes_is_grouped_by_the_fields_that_differ(sweep):
    sweep.open({0.3: [10.0, 11.0], 0.5: [12.0, 13.0]})
    settings = sweep.settings(())
    assert [(s.point, len(s.cells)) for s in settings] == [({RATIO: 0.3}, 2), ({RATIO: 0.5}, 2)]


def test_protocols_are_not_mixed(sweep, tmp_path):
    sweep.open({0.3: [10.0]})
    sweep.add(0.5, changes={"eval.samples": 50})
    with pytest.raises(UsageError, match="2 protocols"):
        sweep.page(tmp_path)


# ------------------------------------------------------------------------------------------------------------- page


def test_every_text_of_the_record_is_escaped(sweep, tmp_path):
    texts = {f"sddit.{name}": HOSTILE for name in ("question", "command")}
    texts["sddit.excluded"] = json.dumps({HOSTILE: HOSTILE})
    sweep.open(axes=["system"], **texts)
    sweep.cell(point={"system": HOSTILE}, scores={"eval/fid": {600: 9.0}}, code=HOSTILE, collapse=HOSTILE)
    sweep.cell(seed=1, point={"system": HOSTILE}, state="failed", error=HOSTILE, log=HOSTILE)
    table = tmp_path / "table1.md"
    table.write_text(HOSTILE)
    page = sweep.page(tmp_path, [table])
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot; &#x27;single&#x27;"
    assert "<script" not in page and "<img src=x" not in page and page.count("</style>") == 1
    assert page.count(escaped) >= 10


def test_the_file_needs_nothing_else(sweep, tmp_path):
    sweep.open({0.3: [10.0]})
    Image.new("RGB", (300, 200), "red").save(tmp_path / "mask_ratio.png")
    (tmp_path / "mask_ratio.csv").write_text("a,b\n1,2\n")
    page = sweep.page(tmp_path, [tmp_path / "mask_ratio.png", tmp_path / "mask_ratio.csv"])
    targets = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert len(targets) == 3 and all(target.startswith("data:") for target in targets)
    assert 'download="mask_ratio.csv"' in page and "<script" not in page and "@import" not in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_the_same_record_gives_the_same_bytes(sweep, tmp_path):
    health = {"train/information_cls": {300: 1.0, 600: 0.01}, "train/information_patch": {300: 1.5, 600: 1.6}}
    sweep.open({0.3: [10.0]})
    run = sweep.add(0.5, scores=health, collapse="The discriminative loss has collapsed at step 600.")
    sweep.client.log_image(run, np.zeros((16, 80), np.uint8), key="samples/grid", step=600)
    first, second = (sweep.page(tmp_path / name) for name in ("a", "b"))
    assert first == second and "The last cell ended 20" in first
    assert "collapsed at step 600" in first and "Information of the targets" in first


def test_health_is_left_out_where_no_cell_has_it(sweep, tmp_path):
    sweep.open({0.3: [10.0]})
    page = sweep.page(tmp_path)
    for heading in ("Health", "Samples", "Figures", "Cost", "Not done"):
        assert f"<h2>{heading}" not in page


def test_the_last_grid_of_every_cell(sweep, tmp_path, monkeypatch):
    sweep.open()
    for ratio in (0.3, 0.5):
        for seed in (0, 1):
            sweep.log_grids(sweep.add(ratio, seed=seed), (0, 300, 600))
    page = sweep.page(tmp_path)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == [f"mask ratio {r}, seed {s}, step 600" for r in (0.3, 0.5) for s in (0, 1)]
    assert len(re.findall(r'<img src="data:image/png;base64,[^"]+" alt="Samples', page)) == 4
    monkeypatch.setattr(evidence, "MAX_SHOWN", 3)
    page = sweep.page(tmp_path)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == [f"mask ratio {r}, seed {s}, step 600" for r, s in ((0.3, 0), (0.3, 1), (0.5, 0))]
    assert "Not shown: 1 cell." in page


def test_a_grid_that_is_gone_is_said_to_be(sweep, tmp_path):
    sweep.open()
    run = sweep.add(0.3)
    sweep.log_grids(run, (600,))
    for picture in Path("mlruns").glob(f"*/{run}/artifacts/images/*"):
        picture.unlink()
    page = sweep.page(tmp_path)
    assert ">not available</p><figcaption>mask ratio 0.3, seed 0</figcaption>" in page


def test_the_table_costs_and_what_is_not_done(sweep, tmp_path):
    tags = {
        "sddit.prediction": json.dumps({"predicted_s": 3600, "measured_s": 4320}), "sddit.price": "2.5",
        "sddit.budget_hours": "8", "sddit.excluded": json.dumps({"mask_ratio=0.9": "keeps 1 token"}),
    }  # fmt: skip
    sweep.open(**tags)
    cost = {"cost/device_hours": {600: 2.0}, "cost/flops": {600: 3e12}, "cost/images": {600: 38400}}
    for seed, fid in enumerate((10.0, 12.0)):
        sweep.add(0.3, seed=seed, fid=fid, scores=cost | {"eval/precision": {600: 0.5}, "probe/x": {600: 0.25}})
    sweep.add(0.5, fid=30.0, state="failed", error="Traceback\nDivergedError: nan", log="/logs")
    page = sweep.page(tmp_path)
    text = re.sub(r"<[^>]+>", "|", page)
    for expected in ("11.00 ± 12.71", "Prec. ↑", "0.500 ± 0.000", "probe x", "3.00e+12", "2 done", "1 failed"):
        assert expected in text
    assert '<tr class="marked"><td>0.3</td>' in page
    assert "1 device-hours, by the last command; measured 1.2 (+20%)" in text and "10.00, at 2.5" in text
    assert "step 300 of 600. DivergedError: nan Log: /logs" in text
    assert "Impossible (1)" in text and "mask_ratio=0.9: keeps 1 token" in text
    assert f"python sweeps/{sweep.name}.py" in text and "0123456789ab (3 cells)" in text


# -------------------------------------------------------------------------------------------------------- the script


def test_the_script_takes_the_figures_from_the_record(sweep, tmp_path):
    sweep.open({0.3: [10.0]})
    (tmp_path / "table1.md").write_text("| FID |\n")
    sweep.client.log_artifact(sweep.parent, str(tmp_path / "table1.md"))
    command = [sys.executable, str(ROOT / "analysis" / "report.py"), "--sweep", sweep.name, "--tracking-uri", sweep.uri]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"figures/report-{sweep.name}.html\n", "")
    assert "<pre>| FID |\n</pre>" in (tmp_path / "figures" / f"report-{sweep.name}.html").read_text()


def test_errors(sweep, tmp_path):
    with pytest.raises(UsageError, match="No sweep 'errors'"):
        sweep.page(tmp_path)
    with pytest.raises(TrackingError, match="Cannot read the MLflow record"):
        report.report("errors", "http://127.0.0.1:9", tmp_path)
