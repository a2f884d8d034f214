"""Table 1, convergence: FID after so many steps, ours beside the paper's, with cost and comparability.

    python analysis/table1.py                        # the sweep convergence, into figures/
    python analysis/table1.py --sweep NAME --no-paper

Without a recorded sweep it shows the paper's values alone.
"""

from __future__ import annotations

from pathlib import Path

from analysis import common, paper, tables

TABLE = tables.Table(
    name="table1",
    title="Convergence (the paper's Table 1): FID at the last step",
    sweep="convergence",
    published=paper.TABLE_1,
    scores=("fid",),
    diagnostics=tuple(tables.DIAGNOSTICS),
)


def figure(
    sweep: str = TABLE.sweep, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = True
) -> list[Path]:
    """Prints the table and writes it to `out`, as a sweep asks of its figure. Raises as `tables.make` does."""
    return tables.make(TABLE, sweep, tracking_uri, out, with_paper=paper)


if __name__ == "__main__":
    common.run(lambda: tables.main(TABLE, __doc__))
