"""What the figures share: flags, files, the check of the protocol, intervals, and how errors reach the user."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from analysis import style
from sddit.config import FRESH_SEED
from sddit.errors import SdditError, UsageError
from sddit.intervals import t_interval

SCORE = "eval/fid"  # in every record, whatever the features: the protocol names them

# No dates, no versions: the same data give the same bytes.
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@dataclass(frozen=True)
class Flags:
    """The flags of every figure and table."""

    sweep: str
    """Name of the sweep, i.e. of its MLflow experiment."""
    tracking_uri: str | None = None
    """Where the sweep is recorded. Default: MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""
    out: Path = Path("figures")
    """Folder for the files."""
    paper: bool = False
    """Published values beside ours, marked as such."""


# ---------------------------------------------------------------------------------------------------------- scripts


def parse_flags(description: str | None, default_sweep: str, *, paper: bool = False) -> Flags:
    """The command line; exits with status 2 on an unknown flag. `paper` is the default of --paper/--no-paper."""
    return tyro.cli(Flags, default=Flags(sweep=default_sweep, paper=paper), description=description)


def run(main: Callable[[], Any]) -> None:
    """Runs a script: an error the user can cause is its message and its exit status, Ctrl-C is 130."""
    warnings.showwarning = lambda message, *_: print(f"Warning: {message}", file=sys.stderr)
    try:
        main()
    except SdditError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


def output_name(name: str, sweep: str, default_sweep: str) -> str:
    """The files' name: the figure's, and the sweep's when it is not the one the figure is named for."""
    return name if sweep == default_sweep else f"{name}-" + re.sub(r"[^\w.-]+", "_", sweep)


def save(figure: Figure, frame: pd.DataFrame, name: str, out: Path) -> list[Path]:
    """Writes `out/name`.png, .pdf and, with the data that are drawn, .csv; prints and returns the paths.

    Raises:
        UsageError: `out` cannot be written to.
    """

    def drawn(kind: str) -> Callable[[Path], object]:
        return lambda path: figure.savefig(path, format=kind, metadata=METADATA[kind])

    with style.context():
        return write(
            {"png": drawn("png"), "pdf": drawn("pdf"), "csv": lambda path: frame.to_csv(path, index=False)}, name, out
        )


def write(writers: Mapping[str, Callable[[Path], object]], name: str, out: Path) -> list[Path]:
    """Writes `out/name.KIND` with the writer of each kind; prints and returns the paths.

    Each file appears whole or not at all.

    Raises:
        UsageError: `out` cannot be written to.
    """
    out = Path(out)
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind, writer in writers.items():
            path = out / f"{name}.{kind}"
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                writer(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            paths.append(path)
    except OSError as error:
        raise UsageError(
            f"Cannot write to {out}: {error.strerror or error}. Name another folder with --out."
        ) from error
    for path in paths:
        print(path)
    return paths


# ------------------------------------------------------------------------------------------------------------- data


def check_protocol(table: pd.DataFrame) -> None:
    """Scores are drawn together only under one protocol.

    Raises:
        UsageError: naming the protocols and how many cells have each.
    """
    cells = table.groupby("protocol")["identity"].nunique()
    if len(cells) > 1:
        listed = "\n".join(f"  {protocol or '(none)'}: {counted(n, 'cell')}" for protocol, n in cells.items())
        raise UsageError(
            f"These cells were scored under {len(cells)} protocols, whose scores must not be drawn together:\n"
            f"{listed}\n"
            "Score the final checkpoints under one protocol with `sddit evaluate`, or run the cells of each protocol "
            "as a sweep of its own (--name)."
        )


def without_fresh_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Results or cells whose seeds took part in the choice of the best setting. Fresh seeds confirm it, and were given
    to it alone: in a figure of the sweep they would favour it."""
    return table[~(table["seed"].astype(float) >= FRESH_SEED)]


def last_done(frame: pd.DataFrame) -> int | None:
    """The last evaluation step of the cells that are done: the one that counts."""
    done = frame.loc[frame["state"] == "done", "step"]
    return int(done.max()) if len(done) else None


class Difference(NamedTuple):
    """Of two settings over the seeds that both have: mean, 95 % t-interval (NaN below two seeds), number of seeds."""

    mean: float
    low: float
    high: float
    seeds: int


def paired_difference(a: pd.Series, b: pd.Series) -> Difference:
    """a - b over the seeds (the index) that both have finite values of. One seed decides for both how the weights
    start and what is drawn, so that much of the spread over seeds is common to them and cancels.

    Raises:
        ValueError: a seed occurs twice in one of them.
    """
    if not (a.index.is_unique and b.index.is_unique):
        raise ValueError("paired_difference: a seed occurs twice")
    both = (a - b).replace([np.inf, -np.inf], np.nan).dropna()
    if both.empty:
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    return Difference(*t_interval(both), len(both))


@dataclass(frozen=True)
class NoiseFloor:
    """FID of real images drawn with replacement, as many as there are samples, against the reference: no score below
    it means anything. Mean and standard deviation over draws."""

    mean: float
    sd: float
    draws: int

    def __str__(self) -> str:
        """The caption's sentence."""
        spread = f" ± {self.sd:.2g} (standard deviation over {self.draws} draws)" if self.draws > 1 else ""
        return f"Noise floor, real images against real ones: FID {self.mean:.3g}{spread}."


def noise_floor(cells: pd.DataFrame) -> NoiseFloor | None:
    """That of cells scored under one protocol; None where none was recorded."""
    for tags in cells["tags"]:
        if text := tags.get("sddit.noise_floor"):
            return NoiseFloor(**json.loads(text))
    return None


# --------------------------------------------------------------------------------------------------------- captions


def axis_name(axis: str) -> str:
    """
    >>> axis_name("method.mask_ratio"), axis_name("method.name"), axis_name("system")
    ('mask ratio', 'method', 'system')
    """
    section, _, name = axis.rpartition(".")
    return (section if section and name == "name" else name).replace("_", " ")


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "cell"), counted(3, "cell")
    ('1 cell', '3 cells')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Iterable[str], at_most: int = 4) -> str:
    """
    >>> listed(["a", "b", "c"], at_most=2)
    'a; b; and 1 more'
    """
    every = list(names)
    return "; ".join(every[:at_most]) + (f"; and {len(every) - at_most} more" if len(every) > at_most else "")


def the_value(table: pd.DataFrame, column: str) -> Any | None:
    """What all rows have in this column; None when they differ or lack it."""
    if column not in table:
        return None
    values = table[column].dropna()
    return values.iloc[0] if len(values) and len(set(map(repr, values))) == 1 else None


def provenance(table: pd.DataFrame, cells: pd.DataFrame | None = None) -> str:
    """The caption's sentences on protocol, batch size and, where they differ, code revisions.

    `table` as from `load_results`, `cells` as from `load_cells`, for the protocol in words.
    """
    sentences = []
    if batch := the_value(table, "train.batch_size"):
        sentences.append(f"Batch size {batch:g}.")
    texts = {tags.get("sddit.protocol.text") for tags in cells["tags"]} - {None} if cells is not None else set()
    words = f" ({texts.pop()})" if len(texts) == 1 else ""
    sentences.append(f"Protocol {the_value(table, 'protocol') or 'not recorded'}{words}.")
    codes = table.groupby("code")["identity"].nunique()
    if len(codes) > 1:
        listed = ", ".join(f"{_short(str(code))} ({counted(n, 'cell')})" for code, n in codes.items())
        sentences.append(f"Code revisions differ: {listed}.")
    return " ".join(sentences)


def _short(revision: str) -> str:
    """A revision in ten digits, still saying when the tree had changes of its own."""
    head, dash, dirty = revision.partition("-")
    return (head[:10] + dash + dirty) or "unknown"
