"""What a person sees while a sweep runs: one live table on a terminal, plain lines elsewhere.

Steps between evaluations are read from the cells' tags in MLflow, so any other shell sees the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

REFRESH_SECONDS = 2.0
OVER = ("done", "pruned", "failed")
MAX_FAILED = 5  # causes shown below the table; the rest are in the table
STYLES = {"done": "green", "running": "cyan", "failed": "bold red", "pruned": "yellow", "waiting": "dim"}


@dataclass
class Row:
    """One cell in the table."""

    label: str
    seed: int
    identity: str
    state: str
    step: int
    steps: int
    fid: float | None = None
    run_id: str | None = None
    started: float | None = None  # time.monotonic() when it started here ...
    first_step: int = 0  # ... the step it had then ...
    ended: float | None = None  # ... and when it was over
    note: str = ""

    def eta(self, now: float) -> float | None:
        """Seconds left at the speed since the start."""
        if self.state != "running" or self.started is None or self.step <= self.first_step:
            return None
        return (self.steps - self.step) * (now - self.started) / (self.step - self.first_step)


class Progress:
    """The table of a sweep's cells; rows are changed by the driver and drawn by a thread.

    Args:
        title: the first line.
        read_steps: the steps that the running cells have reached, by run id.
        concurrent: cells at once, for the ETA of those that wait.
        logs: where to look when a cell fails.
        tick: called every two seconds.
        spent, budget, price: device-hours so far; of how many; money for each.
    """

    def __init__(
        self,
        title: str,
        rows: list[Row],
        read_steps: Callable[[], dict[str, int]],
        concurrent: int,
        console: Console,
        logs: str = "",
        tick: Callable[[], None] = lambda: None,
        spent: Callable[[], float] = lambda: 0.0,
        budget: float | None = None,
        price: float | None = None,
    ) -> None:
        self.title, self.rows, self.read_steps, self.concurrent = title, rows, read_steps, concurrent
        self.logs, self.tick, self.spent, self.budget, self.price = logs, tick, spent, budget, price
        self.console = console
        self.begun = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._live = (
            Live(console=console, get_renderable=self.render, refresh_per_second=2) if console.is_terminal else None
        )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._live:
            self._live.stop()

    def row(self, identity: str) -> Row:
        """The row of a cell."""
        return next(row for row in self.rows if row.identity == identity)

    def say(self, row: Row) -> None:
        """A line for those who do not see the table."""
        if self._live is None:
            fid = f"  FID {row.fid:.2f}" if row.fid is not None else ""
            note = f"  {row.note}" if row.note else ""
            elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self.begun))
            self.console.print(
                f"[{elapsed}] {row.label} seed {row.seed} ({row.identity}): {row.state}, "
                f"step {row.step}/{row.steps}{fid}{note}", markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

    def remaining(self) -> float | None:
        """Seconds until the sweep is done, if the cells that wait take as long as those that ran or run."""
        now = time.monotonic()
        running = [r for r in self.rows if r.state == "running"]
        etas = [eta for r in running if (eta := r.eta(now)) is not None]
        speeds = [
            (now - r.started) / (r.step - r.first_step)
            for r in running
            if r.started is not None and r.step > r.first_step
        ]
        if not speeds:
            return None
        per_step = sum(speeds) / len(speeds)
        waiting = sum((r.steps - r.step) * per_step for r in self.rows if r.state == "waiting")
        return max(etas) + waiting / self.concurrent

    def render(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("cell", "seed", "state", "step", "FID", "ETA", "identity"):
            table.add_column(column, justify="right" if column in ("seed", "step", "FID", "ETA") else "left")
        now = time.monotonic()
        for row in self.rows:
            eta = row.eta(now)
            table.add_row(
                row.label,
                str(row.seed),
                Text(row.state + (f" {row.note}" if row.note else ""), STYLES.get(row.state, "")),
                f"{row.step}/{row.steps}",
                "" if row.fid is None else f"{row.fid:.2f}",
                "" if eta is None else duration(eta),
                Text(row.identity, "dim"),
            )
        return Group(Text(self.title, "bold"), table, *(Text(line, "dim") for line in self.summary()))

    def summary(self) -> list[str]:
        """Queue, time left, the best so far, what is spent, and what failed."""
        count = {state: sum(row.state == state for row in self.rows) for state in {row.state for row in self.rows}}
        over = sum(count.get(state, 0) for state in OVER)
        left = self.remaining()
        line = f"{over} of {len(self.rows)} cells over"
        line += f" after {duration(time.monotonic() - self.begun)}" if self._thread.ident else ""
        line += "".join(f", {count[state]} {state}" for state in ("running", "waiting") if count.get(state))
        line += f", about {duration(left)} left" if left is not None else ""
        lines = [line]
        if best := self.best():
            lines.append(f"Best FID so far: {best}")
        spent = self.spent()
        if spent:
            of = f" of {self.budget:g}" if self.budget is not None else ""
            money = f" ({spent * self.price:.2f} in money)" if self.price is not None else ""
            lines.append(f"Spent: {spent:.3g}{of} device-hours{money}")
        if failed := [row for row in self.rows if row.state == "failed"]:
            lines += [f"Failed: {row.label} seed {row.seed}: {row.note}" for row in failed[:MAX_FAILED]]
            lines.append(f"Logs: {self.logs}")
        return lines

    def best(self) -> str | None:
        """The lowest FID of a done setting with its interval over seeds; of any cell while none is done."""
        done: dict[str, list[float]] = {}
        for row in self.rows:
            if row.state == "done" and row.fid is not None:
                done.setdefault(row.label, []).append(row.fid)
        if not done:
            scored = [(row.fid, row.label, row.step) for row in self.rows if row.fid is not None]
            return "{:.2f} ({}, step {})".format(*min(scored)) if scored else None
        label, values = min(done.items(), key=lambda item: sum(item[1]) / len(item[1]))
        if len(values) == 1:
            return f"{values[0]:.2f} ({label}, one seed)"
        from sddit.intervals import t_interval

        mean, low, high = t_interval(values)
        return f"{mean:.2f} [{low:.2f}, {high:.2f}] ({label}, {len(values)} seeds)"

    def _watch(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            with contextlib.suppress(Exception):
                self.tick()
            with contextlib.suppress(Exception):  # an outage of the record must not end the sweep
                steps = self.read_steps()
                for row in self.rows:
                    if row.state == "running" and row.run_id:
                        row.step = max(row.step, steps.get(row.run_id, 0))


def make_console() -> Console:
    """For tables and long lines: a terminal folds them as wide as it is, a file takes them whole."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200
    return console


def duration(seconds: float) -> str:
    """Seconds in words, e.g. '45 s', '3 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
