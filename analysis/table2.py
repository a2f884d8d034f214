"""Table 2, system level: all scores of the finished runs, ours beside the paper's, with cost and comparability.

    python analysis/table2.py                        # the last steps of the sweep convergence, into figures/
    python analysis/table2.py --sweep NAME --no-paper

Shows of FID, sFID, IS, precision and recall what the sweep has (`eval.metrics`). Without a recorded sweep it shows
the paper's values alone.
"""

from __future__ import annotations

from pathlib import Path

from analysis import common, paper, tables

TABLE = tables.Table(
    name="table2",
    title="System level (the paper's Table 2): scores at the last step",
    sweep="convergence",
    published=paper.TABLE_2,
    scores=tuple(tables.SCORES),
    remarks=(paper.GUIDED_ELSEWHERE,),
)


def figure(
    sweep: str = TABLE.sweep, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = True
) -> list[Path]:
    """Prints the table and writes it to `out`, as a sweep asks of its figure. Raises as `tables.make` does."""
    return tables.make(TABLE, sweep, tracking_uri, out, with_paper=paper)


if __name__ == "__main__":
    common.run(lambda: tables.main(TABLE, __doc__))
