"""FID against the mask ratio, one line per evaluation step.

    python analysis/plot_mask_ratio.py                         # the sweep mask_ratio, into figures/
    python analysis/plot_mask_ratio.py --sweep mask_ratio-cifar10

Draws what there is of a sweep that is still running, and says what is missing.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import axis, common, lines

QUESTION = axis.Question(
    name="mask_ratio",
    title="FID against mask ratio",
    axes=(axis.Axis("method.mask_ratio", "mask ratio", "ratio"),),
    paper="The paper's Figure 5 is a curve without printed values, so nothing of it is overlaid.",
)


def collect(table: pd.DataFrame, cells: pd.DataFrame | None = None, *, paper: bool = False) -> axis.AxisData:
    """What is drawn: see `axis.collect`."""
    return axis.collect(QUESTION, table, cells, paper=paper)


def draw(data: axis.AxisData) -> Figure:
    """The figure: one panel a series, one line an evaluation step."""
    return lines.draw_steps(data)


def figure(
    sweep: str, tracking_uri: str | None = None, out: Path = Path("figures"), *, paper: bool = False
) -> list[Path]:
    """Reads the sweep, writes the figure and its data to `out`, and gives their paths. Raises as `collect` does."""
    return axis.make(QUESTION, collect, draw, sweep, tracking_uri, out, paper=paper)


def main() -> None:
    axis.main(figure, QUESTION, __doc__)


if __name__ == "__main__":
    common.run(main)
