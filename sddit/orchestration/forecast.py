"""What a sweep will cost, before anything is spent: time, device-hours, money, memory and disk of each missing cell."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from sddit import cost
from sddit.config import Experiment
from sddit.orchestration.cluster import GIB, Placement
from sddit.orchestration.plan import Planned
from sddit.orchestration.progress import duration
from sddit.orchestration.speed import Speeds

GB = 1e9
START_SECONDS = 20  # until the first cell trains: Ray, processes, imports


@dataclass(frozen=True)
class Forecast:
    """Of the cells that a command runs. Seconds are None where the speed of a kind of experiment is not known."""

    cells: Mapping[str, float | None]  # identity → seconds on its workers
    workers: int  # a cell
    concurrent: int
    suggested: int = 0  # cells that are not known yet ...
    each: float | None = None  # ... and what one like the base takes

    @property
    def _all(self) -> list[float] | None:
        seconds = [*self.cells.values(), *[self.each] * self.suggested]
        return None if None in seconds else [s for s in seconds if s is not None]

    @property
    def device_seconds(self) -> float | None:
        """Of all devices together."""
        return None if self._all is None else sum(self._all) * self.workers

    @property
    def wall_seconds(self) -> float | None:
        """Until the last cell ends, cells starting in order as soon as there is room."""
        if self._all is None:
            return None
        slots = [0.0] * self.concurrent
        for seconds in self._all:
            heapq.heapreplace(slots, slots[0] + seconds)
        return max(slots)


def forecast(
    missing: Sequence[Planned],
    speeds: Speeds,
    placement: Placement,
    base: Experiment,
    shape: cost.Shape,
    suggested: int,
) -> Forecast:
    """What the missing cells, and `suggested` more like `base`, will take."""
    return Forecast(
        {p.cell.identity: speeds.seconds(p.cell.experiment, shape, p.step) for p in missing},
        base.resources.workers,
        placement.concurrent,
        suggested,
        speeds.seconds(base, shape),
    )


def show(
    name: str,
    planned: Sequence[Planned],
    excluded: Mapping[str, str],
    expected: Forecast,
    placement: Placement,
    *,
    spent_hours: float,
    budget_hours: float | None,
    price: float | None,
    num_classes: int,
    console: Console,
) -> None:
    """Prints the plan: the cells with their state and predicted time, what cannot be, and what the whole asks for."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"Sweep {name}", title_justify="left")
    for column in ("cell", "seed", "state", "step", "predicted", "memory", "identity"):
        table.add_column(column, justify="right" if column in ("seed", "step", "predicted", "memory") else "left")
    disk = 0
    for p in planned:
        experiment, shape = p.cell.experiment, p.cell.manifest.shape
        seconds = expected.cells.get(p.cell.identity)
        disk += cost.checkpoint_bytes(experiment, shape, num_classes)
        table.add_row(
            p.cell.label,
            str(experiment.seed),
            p.state,
            f"{p.step}/{experiment.train.steps}",
            "" if seconds is None else duration(seconds),
            f"{cost.worker_bytes(experiment, shape, num_classes) * experiment.resources.workers / GIB:.1f} GiB",
            p.cell.identity,
        )
    console.print(table)
    for label, reason in excluded.items():
        console.print(f"Excluded: {label}: {reason}")
    if expected.suggested:
        console.print(f"and {expected.suggested} cells that TPE will suggest, counted as the base experiment.")
    console.print(f"Concurrency: {placement.arithmetic}.")
    count = len(expected.cells) + expected.suggested
    device, wall = expected.device_seconds, expected.wall_seconds
    if not count:
        console.print("0 cells to run: all is done.")
    elif device is not None and wall is not None:
        money = f", {price * device / 3600:.2f} in money at {price:g} a device-hour" if price is not None else ""
        console.print(
            f"{count} cells to run: about {duration(wall)} after some {START_SECONDS} s of start-up "
            f"({device / 3600:.3g} device-hours{money})."
        )
    largest = max(
        (cost.checkpoint_bytes(p.cell.experiment, p.cell.manifest.shape, num_classes) for p in planned), default=0
    )
    console.print(
        f"Disk: {disk / GB:.3g} GB when all {len(planned)} cells are done, at most "
        f"{largest * placement.concurrent / GB:.3g} GB more while {placement.concurrent} run."
    )
    if budget_hours is not None:
        left = budget_hours - spent_hours
        enough = "" if device is None else (": enough" if left >= device / 3600 else ": not enough for all")
        console.print(
            f"Budget: {spent_hours:.3g} of {budget_hours:g} device-hours spent, {max(0, left):.3g} left{enough}."
        )
