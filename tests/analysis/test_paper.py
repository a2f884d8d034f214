"""The published numbers, and that no other file of the project holds them."""

from pathlib import Path

import pytest

from analysis import paper

ROOT = Path(__file__).resolve().parents[2]


def rows(table):
    return {(row.model, row.steps): row for row in table}


@pytest.mark.parametrize(
    ("model", "steps", "fid"),
    [("DiT-S/2", 400_000, 68.40), ("MDT-S/2", 400_000, 53.46), ("SD-DiT-S/2", 400_000, 48.39),
     ("DiT-B/2", 400_000, 43.47), ("MDT-B/2", 400_000, 34.33), ("SD-DiT-B/2", 400_000, 28.62),
     ("DiT-XL/2", 7_000_000, 9.62), ("MaskDiT-XL/2", 1_300_000, 12.15), ("MDT-XL/2", 1_300_000, 9.60),
     ("SD-DiT-XL/2", 1_100_000, 9.66), ("SD-DiT-XL/2", 1_300_000, 9.01)],
)  # fmt: skip
def test_table_1(model, steps, fid):
    assert rows(paper.TABLE_1)[model, steps].fid == fid
    assert len(paper.TABLE_1) == 11


@pytest.mark.parametrize(
    ("model", "steps", "scores"),
    [("ADM", 1_980_000, (10.94, 6.02, 100.98, 0.69, 0.63)), ("LDM-4", 178_000, (10.56, None, 103.49, 0.71, 0.62)),
     ("MaskGIT", 1_387_000, (6.18, None, 182.1, 0.80, 0.51)), ("I-DDPM", None, (12.26, None, None, 0.70, 0.62)),
     ("StyleGAN", None, (2.30, 4.02, 265.12, 0.78, 0.53)), ("CDM", None, (4.88, None, 158.71, None, None)),
     ("MaskDiT-XL/2", 2_000_000, (5.69, 10.34, 177.99, 0.74, 0.60)),
     ("DiT-XL/2", 7_000_000, (9.62, 6.85, 121.50, 0.67, 0.67)),
     ("MDT-XL/2", 2_500_000, (7.41, 4.95, 121.22, 0.72, 0.64)),
     ("SD-DiT-XL/2", 2_400_000, (7.21, 5.17, 144.68, 0.72, 0.61))],
)  # fmt: skip
def test_table_2(model, steps, scores):
    assert tuple(rows(paper.TABLE_2)[model, steps].scores.values()) == scores
    assert len(paper.TABLE_2) == 14


@pytest.mark.parametrize(
    ("table", "model", "steps", "millions", "epochs"),  # as printed
    [(paper.TABLE_1, "DiT-S/2", 400_000, 102.4, 79.9), (paper.TABLE_1, "DiT-XL/2", 7_000_000, 1792, 1399),
     (paper.TABLE_1, "SD-DiT-XL/2", 1_100_000, 281.6, 219.8), (paper.TABLE_1, "MDT-XL/2", 1_300_000, 332.8, 259.8),
     (paper.TABLE_2, "MaskDiT-XL/2", 2_000_000, 2048, 1599), (paper.TABLE_2, "MDT-XL/2", 2_500_000, 640, 500),
     (paper.TABLE_2, "SD-DiT-XL/2", 2_400_000, 614.4, 480)],
)  # fmt: skip
def test_images_and_epochs_follow_from_steps_and_batch(table, model, steps, millions, epochs):
    row = rows(table)[model, steps]
    assert row.images == pytest.approx(millions * 1e6)
    assert row.epochs == pytest.approx(epochs, rel=2e-3)


def test_relative_compute():
    """methods.md §10 (vii)."""
    costs = {row.model: row.relative_cost for row in paper.TABLE_1}
    for model, steps in {"DiT": 1.0, "SD-DiT": 1.2, "MDT": 1.75, "MaskDiT": 0.55}.items():
        assert costs[f"{model}-XL/2"] == pytest.approx(steps, abs=0.02)
    dit = rows(paper.TABLE_1)["DiT-XL/2", 7_000_000]
    assert dit.flops == pytest.approx(2 * 3 * 118.62e9 * 7e6 * 256, rel=1e-3)


def test_only_our_methods_have_a_cost():
    for row in paper.TABLE_2:
        assert (row.flops is not None) == row.model.endswith("-XL/2") == (row.method is not None)


def test_what_cannot_be_compared_says_so():
    assert "batch 1024" in rows(paper.TABLE_2)["MaskDiT-XL/2", 2_000_000].not_comparable
    assert paper.CURVE in rows(paper.TABLE_1)["MaskDiT-XL/2", 1_300_000].notes
    for row in (*paper.TABLE_1, *paper.TABLE_2):
        assert (paper.MDT in row.notes) == row.model.startswith("MDT")
        assert (paper.SDDIT in row.notes) == row.model.startswith("SD-DiT")


def test_published_scores_are_typed_once():
    own = {ROOT / "analysis" / "paper.py", Path(__file__)}
    for path in sorted(p for folder in ("sddit", "analysis", "sweeps") for p in (ROOT / folder).rglob("*.py")):
        if path not in own:
            text = path.read_text()
            assert not [value for value in ("68.40", "53.46", "48.39", "28.62", "12.15", "144.68") if value in text]
