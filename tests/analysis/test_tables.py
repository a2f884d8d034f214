"""Tables 1 and 2: what is ours, what is marked, what is refused, and the files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from recorded import Recorded
from scipy import stats

from analysis import common, finals, markup, paper, table1, table2, tables
from sddit import presets
from sddit.config import FRESH_SEED
from sddit.errors import SdditError, UsageError
from sddit.results import load_cells, load_results

ROOT = Path(__file__).resolve().parents[2]
STEPS = (200, 400, 600)
EDM = {"diffusion.kind": "edm"}
FLOPS_PER_IMAGE = {"dit": 10.0, "maskdit": 15.0, "mdt": 20.0, "sddit": 25.0}


def fid(method, seed, step):
    """Falls to step 400 and rises again: the last is never the best."""
    return 100 * len(method) + 10 * seed + abs(step - 400) / 100


def add_cell(record, sweep, method, seed=0, *, steps=STEPS, scores=("fid",), found=None, **options):
    """A cell of the digits preset; `found` are further metrics at its last step."""
    points = {
        f"eval/{score}": {step: fid(method, seed, step) / (i + 1) for step in steps} for i, score in enumerate(scores)
    }
    points["cost/flops"] = {step: FLOPS_PER_IMAGE[method] * 64 * step for step in steps}
    points |= {name: {max(steps): value} for name, value in (found or {}).items()}
    return record.cell(sweep, method, seed=seed, scores=points, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a store with the sweeps 'convergence' (done, three seeds), 'half', 'mixed', 'started' and others."""
    record = Recorded(tmp_path_factory.mktemp("store"))
    for name in ("convergence", "half", "mixed", "many", "started"):
        record.sweep(name)
    for method in FLOPS_PER_IMAGE:
        for seed in range(3):
            add_cell(record, "convergence", method, seed, scores=("fid", "sfid") if method == "sddit" else ("fid",))
    add_cell(record, "convergence", "dit", changes=EDM)
    add_cell(record, "half", "sddit")
    add_cell(record, "half", "sddit", 1, state="pruned", steps=STEPS[:1])
    add_cell(record, "half", "sddit", 2, state="running", steps=STEPS[:2])
    add_cell(record, "half", "sddit", 3, state="failed", steps=())
    add_cell(record, "half", "sddit", 4, steps=STEPS[:2])
    add_cell(record, "half", "sddit", 5, step="800")  # its last evaluation is missing
    add_cell(record, "mixed", "dit")
    add_cell(record, "mixed", "sddit", protocol="other")
    add_cell(record, "mixed", "mdt", state="pruned", protocol="a third, of no final score")
    for i in range(3):
        add_cell(record, "many", "sddit", changes={"method.mask_ratio": i / 10})
    add_cell(record, "started", "sddit", state="running", steps=())
    record.sweep("components", axes=("component",))
    for component, changes in (("full", {}), ("no mask", {"method.mask_ratio": 0.0, "method.lambda_d": 0.0})):
        add_cell(record, "components", "sddit", point={"component": component}, changes=changes)
    add_rates(record)
    add_diagnosed(record)
    return record.uri


def add_rates(record):
    """The sweep 'rates': SD-DiT and DiT under EDM at three learning rates, of which one lacks a seed."""
    record.sweep("rates", axes=("system", "lr"))
    for system, method, changes in (("SD-DiT", "sddit", {}), ("DiT (EDM)", "dit", EDM)):
        for rate in ("x1", "x0.5", "x2"):
            factor = float(rate[1:])
            for seed in range(2 if rate == "x2" else 3):
                best = 1 if method == "dit" else 0.5
                score = 20 + seed - 5 * (factor == best) - 10 * (rate == "x2")
                point = {"system": system, "lr": rate}
                record.cell(
                    "rates", method, seed=seed, point=point, changes={**changes, "train.lr": 7e-3 * factor},
                    scores={"eval/fid": {600: score}, "cost/flops": {600: 1e6}},
                )  # fmt: skip


def add_diagnosed(record):
    """The sweep 'diagnosed': what is found at the last step, a noise floor, and a fresh seed."""
    record.sweep("diagnosed")
    for seed in (0, 1, FRESH_SEED):
        found = {"probe/accuracy_sigma_0.5": 0.9 + seed / 100, "copying/ratio": 1.0, "eval/fid_seeds_std": 1.25}
        add_cell(record, "diagnosed", "sddit", seed, found=found, noise_floor={"mean": 3.0, "sd": 1.1, "draws": 5})
    add_cell(record, "diagnosed", "dit")


def collected(store, sweep, table=table1.TABLE, **options):
    return tables.collect(table, load_results(sweep, store), load_cells(sweep, store), **options)


def ours(data):
    return data.frame[data.frame["source"] == "ours"].reset_index(drop=True)


# ---------------------------------------------------------------------------------------------------------- collect


def test_last_step_mean_and_interval_over_seeds(store):
    frame = ours(collected(store, "convergence"))
    assert list(frame["model"]) == ["DiT-S/2", "DiT-S/2 (EDM)", "MaskDiT-S/2", "MDT-S/2", "SD-DiT-S/2"]
    assert list(frame["seeds"]) == [3, 1, 3, 3, 3]
    for row in frame[frame["seeds"] == 3].itertuples():
        values = [fid(row.method, seed, 600) for seed in range(3)]
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        np.testing.assert_allclose([row.fid, row.fid_low, row.fid_high], [np.mean(values), low, high])
    assert frame.loc[1, "fid"] == fid("dit", 0, 600) and np.isnan(frame.loc[1, "fid_low"])


def test_cost_of_ours(store):
    frame = ours(collected(store, "convergence"))
    assert (frame["steps"] == 600).all() and (frame["batch"] == 64).all() and (frame["images"] == 38_400).all()
    np.testing.assert_allclose(frame["epochs"], 38_400 / 1797)
    np.testing.assert_allclose(frame["relative_cost"], [1, 1, 1.5, 2, 2.5])
    np.testing.assert_allclose(frame["flops"], 38_400 * np.array([10, 10, 15, 20, 25]))


def test_without_dit_there_is_no_relative_cost(store):
    data = collected(store, "half")
    assert ours(data)["relative_cost"].isna().all()
    assert any("needs a DiT of the same size" in remark for remark in data.remarks)


def test_unfinished_cells_are_never_finals(store):
    data = collected(store, "half")
    frame = ours(data)
    assert list(zip(frame["steps"], frame["seeds"], strict=True)) == [(400, 1), (600, 1)]  # never averaged together
    text = " ".join(data.remarks)
    for part in (
        "the last step of 2 of 6 cells, never the best; n=1: one seed", "Not shown: 4 cells (", "1 stopped early",
        "1 unfinished", "1 failed", "1 done but without a score at its last step", "from 400 to 600 steps",
    ):  # fmt: skip
        assert part in text


def test_provenance_names_the_protocol(store):
    remark, samplers, *_ = collected(store, "convergence").remarks
    assert "dpmpp, 19 steps, power:6.94 (DiT-S/2, MDT-S/2); heun, 10 steps, power:6.94 (DiT-S/2 (EDM), " in samplers
    digest = load_cells("convergence", store).loc[0, "protocol"]
    for part in ("13 cells, never the best", "n=1 has no interval", f"Protocol {digest} (", "Batch size 64."):
        assert part in remark


def test_cells_that_differ_otherwise_are_listed_apart(store, monkeypatch):
    frame = ours(collected(store, "many"))
    assert list(frame["settings"]) == ["mask_ratio 0.0", "mask_ratio 0.1", "mask_ratio 0.2"]
    monkeypatch.setattr(finals, "MAX_ROWS", 2)
    with pytest.raises(UsageError, match=r"method\.mask_ratio, which makes 3 rows"):
        collected(store, "many")


def test_a_field_added_later_had_its_default(store):
    results, cells = load_results("convergence", store), load_cells("convergence", store)
    first = cells.index[cells["params"].map(lambda p: p["method.name"]) == "sddit"][0]
    del cells.at[first, "params"]["method.mask_ratio"]
    assert len(ours(tables.collect(table1.TABLE, results, cells))) == 5


def test_unlike_protocols_are_refused(store):
    with pytest.raises(UsageError, match=r"(?s)2 protocols.*other: 1 cell"):
        collected(store, "mixed")


def test_infinite_scores_have_no_interval(store):
    results = load_results("convergence", store)
    results.loc[(results["method.name"] == "mdt") & (results["seed"] == 1), "eval/fid"] = np.inf
    data = tables.collect(table1.TABLE, results, load_cells("convergence", store))
    assert "inf†" in [row[10] for row in tables.as_text(data).rows]


def test_table_2_shows_the_scores_there_are(store):
    data = collected(store, "convergence", table2.TABLE)
    frame = ours(data)
    assert list(frame["sfid_seeds"]) == [0, 0, 0, 0, 3]
    assert frame["sfid"].iloc[4] == pytest.approx(frame["fid"].iloc[4] / 2)
    assert any("Not scored in this sweep: is, precision, recall." in remark for remark in data.remarks)
    few = frame.iloc[4].to_dict() | {"sfid_seeds": 2}
    assert tables._scored(few, "sfid", "").endswith(" (n=2)")


# ---------------------------------------------------------------------------------------------------- learning rates


def test_the_default_rate_and_the_best(store):
    data = collected(store, "rates")
    frame = ours(data)
    assert list(frame["model"] + "|" + frame["settings"]) == [
        "DiT-S/2 (EDM)|", "SD-DiT-S/2|", "SD-DiT-S/2|lr x0.5, best of 2"
    ]  # fmt: skip
    np.testing.assert_allclose(frame["fid"], [16, 21, 16])
    assert list(frame["notes"]) == ["", "", finals.PICKED]
    text = tables.as_text(data)
    assert text.rows[2][1] == "SD-DiT-S/2, lr x0.5, best of 2" and text.rows[2][-1] == "a"
    assert f"a: {finals.PICKED}" in text.notes
    remarks = " ".join(data.remarks)
    assert "the last step of 9 of 16 cells" in remarks
    assert "Not shown: 7 cells at learning rates that are neither a system's default nor its best." in remarks


def test_without_a_default_rate_there_is_no_row(store):
    results, cells = load_results("rates", store), load_cells("rates", store)
    done = results[(results["lr"] != "x1") | (results["system"] == "SD-DiT")]
    assert set(ours(tables.collect(table1.TABLE, done, cells))["method"]) == {"sddit"}
    data = tables.collect(table1.TABLE, results[results["lr"] == "x2"], cells)
    assert ours(data).empty and "16 cells recorded, none done with a score at the default learning rate" in data.lead


@pytest.mark.parametrize(
    ("scores", "best"),
    [({}, None), ({"x2": {0: 1.0}}, None), ({"x1": {0: 3.0}, "x2": {0: 3.0}}, ("x1", 2)),
     ({"x1": {0: 3.0, 1: 3.0}, "x2": {0: 4.0, 1: 1.0}}, ("x2", 2)),
     ({"x1": {0: 3.0, 1: 3.0}, "x2": {0: 1.0}, "x0.5": {0: 1.0, 2: 1.0}}, ("x1", 1))],
)  # fmt: skip
def test_a_rate_is_picked_among_those_with_the_same_seeds(scores, best):
    assert finals.best_rate(scores) == best


def test_a_named_axis_stands_for_the_fields_it_sets(store):
    assert list(ours(collected(store, "components"))["settings"]) == ["component full", "component no mask"]


# ------------------------------------------------------------------------------------------------------ diagnostics


def test_diagnostics_are_shown_where_they_are_recorded(store):
    results, cells = tables.read(table1.TABLE, "diagnosed", store)
    data = tables.collect(table1.TABLE, results, cells)
    frame = ours(data)
    assert list(frame["probe_seeds"]) == [0, 2]
    np.testing.assert_allclose(frame.loc[1, ["probe", "copying", "sampling_sd"]].astype(float), [0.905, 1, 1.25])
    text = tables.as_text(data)
    assert text.head[11:14] == ["probe ↑", "copying", "FID sd"]
    assert text.rows[0][11:14] == ["–", "–", "–"] and text.rows[1][11:14] == [
        "0.905 ± 0.064",
        "1.00 ± 0.00",
        "1.25 ± 0.00",
    ]
    remarks = " ".join(data.remarks)
    for part in ("Probe: accuracy", "Copying: median", "FID sd: sampling noise", "Noise floor", "FID 3 ± 1.1"):
        assert part in remarks
    assert "probe ↑" not in tables.as_text(collected(store, "convergence")).head
    assert "Probe:" not in " ".join(collected(store, "diagnosed", table2.TABLE).remarks)


def test_fresh_seeds_are_left_out(store):
    data = collected(store, "diagnosed")
    assert list(ours(data)["seeds"]) == [1, 2]
    assert "Not shown: 1 cell of fresh seeds (1000 and on)." in data.remarks
    assert not any("None" in remark or "Not shown: 1 cell (" in remark for remark in data.remarks)


# ---------------------------------------------------------------------------------------------------- comparability


def test_ours_on_digits_is_marked(store):
    data = collected(store, "convergence")
    reason = ours(data)["not_comparable"].unique()
    assert list(reason) == [
        "Not comparable with the paper's values: other features (digits-cnn), 1,024 samples instead of 50,000, other "
        "data (digits, 1,797 images), sizes of the tiny grid, cyclic labels."
    ]
    text = tables.as_text(data)
    assert all(row[10].endswith("†") == (row[0] == "ours") for row in text.rows)
    assert text.notes[0] == f"†: {reason[0]}"


@pytest.mark.parametrize(
    ("changes", "images", "reason"),
    [({}, paper.IMAGES, None), ({}, 50_000, "other data (data/imagenet256, 50,000 images)"),
     ({}, None, "other data (data/imagenet256, number of images not recorded)"),
     ({"eval.guidance": 1.5}, paper.IMAGES, "guided"), ({"eval.weights": "raw"}, paper.IMAGES, "raw weights"),
     ({"eval.samples": 10_000}, paper.IMAGES, "10,000 samples instead of 50,000"),
     ({"eval.extractor": "clip-vit-b-32"}, paper.IMAGES, "other features (clip-vit-b-32)")],
)  # fmt: skip
def test_why_a_score_is_not_comparable(changes, images, reason):
    experiment = presets.imagenet256("XL/2", "sddit").replace(changes)
    tags = {"sddit.data": experiment.data.path} | ({"sddit.reference_images": str(images)} if images else {})
    said = finals.not_comparable(experiment.digest_fields(), tags)
    assert said == (f"Not comparable with the paper's values: {reason}." if reason else "")


def test_marks_of_the_papers_rows():
    text = tables.as_text(tables.collect(table2.TABLE, None, None))
    by_model = {row[1]: row for row in text.rows}
    assert by_model["MaskDiT-XL/2"][10:15] == ["5.69†", "10.34†", "177.99†", "0.74†", "0.60†"]
    assert by_model["SD-DiT-XL/2"][2:6] == ["2,400,000", "256", "614.4", "479.6"]
    assert by_model["SD-DiT-XL/2"][10:15] == ["7.21", "5.17", "144.68", "0.72", "0.61"]
    notes = dict(note.split(": ", 1) for note in text.notes if re.match("[a-z†]: ", note))
    assert notes["†"] == paper.FINE_TUNED
    assert notes[by_model["MDT-XL/2"][-1]] == paper.MDT and notes[by_model["SD-DiT-XL/2"][-1]] == paper.SDDIT
    assert paper.GUIDED_ELSEWHERE in text.notes and paper.SOURCE in text.notes


# ------------------------------------------------------------------------------------------------------- no record


@pytest.mark.parametrize("module", [table1, table2])
def test_without_a_sweep_the_papers_rows_alone(module, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    paths = module.figure()
    assert [path.name for path in paths] == [f"{module.TABLE.name}.{kind}" for kind in ("md", "tex", "csv")]
    assert not (tmp_path / "mlflow.db").exists()
    printed = capsys.readouterr().out
    message = "Nothing of ours yet: no sweep 'convergence' is recorded. Make it with: python sweeps/convergence.py"
    assert message in printed and message in paths[0].read_text()
    assert set(pd.read_csv(paths[2])["source"]) == {"paper"}
    with pytest.raises(SdditError, match=r"python sweeps/convergence\.py") as caught:
        module.figure(paper=False)
    assert caught.value.exit_status == 1


def test_without_a_done_cell(store, tmp_path, capsys):
    table1.figure("started", store, tmp_path)
    assert "Nothing of ours yet: 1 cell recorded, none done with a score." in capsys.readouterr().out
    with pytest.raises(SdditError, match="Nothing of ours yet: 1 cell"):
        table1.figure("started", store, tmp_path, paper=False)


def test_unknown_sweep(store, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'convergence'"):
        table1.figure("convergense", store, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ files


def cells_of_markdown(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("module", [table1, table2])
def test_files(module, store, tmp_path, capsys):
    paths = module.figure("convergence", store, tmp_path)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-3:] == [str(path) for path in paths]
    md, tex, frame = paths[0].read_text(), paths[1].read_text(), pd.read_csv(paths[2])
    grid = [cells_of_markdown(line) for line in md.splitlines() if line.startswith("| ")]
    assert {len(row) for row in grid} == {11 + len(module.TABLE.scores)}
    assert len(grid) == 2 + 5 + len(module.TABLE.published) == 2 + len(frame)
    assert grid[2][10] == "312.00 ± 24.84†" and grid[3][9:11] == ["n=1", "302.00†"]
    for row, (_, values) in zip(grid[2:], frame.iterrows(), strict=True):
        assert row[1].startswith(values["model"]) and row[10].startswith(f"{values['fid']:.2f}")
    body = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {10 + len(module.TABLE.scores)}
    assert len(rows) == 1 + len(frame) and body.count(r"\midrule") == 2  # below the head, and between ours and paper
    assert tex.isascii()


def test_same_data_same_bytes(store, tmp_path):
    first, second = (table2.figure("convergence", store, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_names_follow_the_sweep_and_paper_can_be_left_out(store, tmp_path):
    paths = table1.figure("many", store, tmp_path, paper=False)
    assert [path.name for path in paths] == ["table1-many.md", "table1-many.tex", "table1-many.csv"]
    assert set(pd.read_csv(paths[2])["source"]) == {"ours"}
    assert "arXiv" not in paths[0].read_text()


HOSTILE = "50% of σ_T & τ|λ #1 {x} ~^\\ <b> *a* [l](u) $ 中 ± × – †"


def hostile():
    return markup.Text(HOSTILE, HOSTILE, ["a", HOSTILE], [["ours", HOSTILE], ["paper", HOSTILE]], [HOSTILE])


def test_markdown_is_escaped():
    lines = markup.markdown(hostile()).splitlines()
    grid = [cells_of_markdown(line) for line in lines if line.startswith("| ")]
    assert [len(row) for row in grid] == [2, 2, 2, 2]
    assert r"\<b> \*a\* \[l\](u)" in grid[0][1]


def test_latex_is_escaped():
    text = markup.latex(hostile())
    assert text.isascii() and "(U+4E2D)" in text
    assert r"50\% of $\sigma$\_T \& $\tau$\textbar{}$\lambda$ \#1 \{x\} \textasciitilde{}\textasciicircum{}" in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no pdflatex")
def test_latex_compiles(store, tmp_path):
    tables_tex = [table2.figure("convergence", store, tmp_path)[1].read_text(), markup.latex(hostile())]
    packages = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}"
    document = "\n".join([packages, r"\begin{document}", *tables_tex, r"\end{document}"])
    (tmp_path / "all.tex").write_text(document)
    ran = subprocess.run(
        ["pdflatex", "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout.decode(errors="replace")[-2000:]


def test_folder_that_cannot_be_written(store, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UsageError, match="--out"):
        table1.figure("convergence", store, tmp_path / "taken")


# ----------------------------------------------------------------------------------------------------------- script


def script(what, *arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(
        [sys.executable, *what, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_scripts_neither_need_nor_import_torch_or_ray(store, tmp_path):
    code = (
        "import sys\n"
        "from analysis import common, table1, table2, tables\n"
        "for module in (table1, table2):\n"
        "    common.run(lambda: tables.main(module.TABLE, None))\n"
        "assert not {'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    ran = script(["-c", code], "--sweep", "half", "--tracking-uri", store, "--no-paper", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "INFO" not in ran.stderr and "Traceback" not in ran.stderr
    assert len(list((tmp_path / "figures").iterdir())) == 6


def test_script_without_a_record(tmp_path):
    ran = script([str(ROOT / "analysis" / "table1.py")], "--out", "out", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Nothing of ours yet" in ran.stdout and "SD-DiT-XL/2" in ran.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    ran = script([str(ROOT / "analysis" / "table2.py")], "--no-paper", cwd=tmp_path)
    assert ran.returncode == 1 and "Make it with: python sweeps/convergence.py" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_errors_become_messages_and_exit_statuses(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it
    for sweep, status, message in (
        ("mixed", 2, "2 protocols"),
        ("convergense", 2, "Did you mean 'convergence'?"),
        ("started", 1, "Nothing of ours yet"),
    ):
        with pytest.raises(SystemExit) as caught:
            common.run(lambda sweep=sweep: table1.figure(sweep, store, tmp_path, paper=False))
        assert caught.value.code == status and message in capsys.readouterr().err
