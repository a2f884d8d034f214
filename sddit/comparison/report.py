"""A comparison in words and aligned columns."""

from __future__ import annotations

import math
import string
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from sddit.comparison import Comparison, counted
from sddit.comparison.settings import Setting, shown
from sddit.comparison.statistics import LEVEL
from sddit.config import FRESH_SEED
from sddit.results import STATE_WORDS

LETTERS = string.ascii_uppercase
WIDTH = 110  # of paragraphs


def report(comparison: Comparison) -> str:
    """The comparison in words and aligned columns, for a terminal or a file."""
    protocols = {tags.get("sddit.protocol.text") for s in comparison.settings for tags in s.done["tags"]} - {None}
    blocks = [
        "\n".join([f"{comparison.metric} at step {comparison.step:,}", *map(str, protocols)]),
        _settings_table(comparison),
        _differences_table(comparison),
        "\n".join(_sentences(comparison)),
        _fields_table(comparison.settings),
        _codes(comparison.settings),
    ]
    return "\n\n".join(blocks)


def _settings_table(comparison: Comparison) -> str:
    number = _format(comparison)
    several = len({setting.sweep for setting in comparison.settings}) > 1
    rows = [["", "setting", "mean", "seeds", "left out"]]
    for letter, setting, scores in zip(LETTERS, comparison.settings, comparison.scores, strict=False):
        label = f"{setting.sweep}:{setting.label}" if several else setting.label
        mean = number(float(np.mean(list(scores.values())))) if scores else "-"
        seeds = f"{len(scores)} ({_seeds(scores)})" if scores else "0"
        rows.append([letter, label, mean, seeds, _left_out(setting, comparison, scores)])
    return _aligned(rows)


def _left_out(setting: Setting, comparison: Comparison, scores: Mapping[int, float]) -> str:
    states = setting.cells.loc[setting.cells["state"] != "done", "state"].value_counts()
    parts = [f"{n} {STATE_WORDS.get(str(state), state)}" for state, n in states.items()]
    infinite = len(setting.at(comparison.metric, comparison.step)) - len(scores)
    absent = len(setting.done) - len(scores) - infinite
    parts += [f"{infinite} infinite"] if infinite else []
    parts += [f"{absent} without a score at this step"] if absent else []
    return ", ".join(parts) or "none"


def _differences_table(comparison: Comparison) -> str:
    number = _format(comparison)
    several = len(comparison.differences) > 1
    rows = [
        ["", "matched seeds", "mean A", "mean", "difference", "95% interval", "p", *(["p (Holm)"] if several else [])]
    ]
    for letter, d in zip(LETTERS[1:], comparison.differences, strict=False):
        interval = f"{number(d.low, '+')} to {number(d.high, '+')}" if math.isfinite(d.p) else "-"
        row = [f"{letter} - A", str(len(d.seeds)), number(d.baseline), number(d.other), number(d.mean, "+"), interval]
        rows.append([*row, _p(d.p), *([_p(d.adjusted)] if several else [])])
    tests = sum(math.isfinite(d.p) for d in comparison.differences)
    corrected = f", corrected by Holm for {tests} comparisons" if tests > 1 else ""
    return _aligned(rows) + f"\nPaired by seed; p of the paired t-test{corrected}; intervals each for itself."


def _sentences(comparison: Comparison) -> list[str]:
    """What the numbers allow to say."""
    number = _format(comparison)
    first = comparison.scores[0]
    lines = []
    for letter, scores, d in zip(LETTERS[1:], comparison.scores[1:], comparison.differences, strict=False):
        n = len(d.seeds)
        fits = f"{number(d.low, '+')} to {number(d.high, '+')}"
        if n < 2:
            words = f"no test: {'one seed is' if n else 'no seed is'} finished in both, and a test needs two."
        elif d.shown:
            low, high = sorted((abs(d.low), abs(d.high)))
            direction = "lower" if d.mean < 0 else "higher"
            words = (
                f"{direction} than A by {number(abs(d.mean))} ({number(low)} to {number(high)}), mean over {n} seeds."
            )
        elif d.p < LEVEL:
            words = f"no difference from A shown: p is {_p(d.p)} alone, but {_p(d.adjusted)} among these comparisons."
        elif not d.low and not d.high:
            words = f"no difference from A shown: equal at each of {n} seeds."
        else:
            words = f"no difference from A shown: with {n} seeds, anything from {fits} fits."
        lines.append(f"{letter}: {words}")
        for name, only in (("A", first.keys() - scores.keys()), (letter, scores.keys() - first.keys())):
            if only:
                lines.append(f"   Finished in {name} only: seed{'s' * (len(only) > 1)} {_seeds(only)}.")
    if any(d.shown and max(d.seeds) < FRESH_SEED for d in comparison.differences):
        lines.append("If these seeds also picked the setting out of many, that flatters it: confirm it on fresh seeds.")
    return lines


def _fields_table(settings: Sequence[Setting]) -> str:
    """Fields in which the settings differ; what a method or formulation has for itself is in paragraphs below."""
    names = sorted({name for setting in settings for name in setting.fields})
    rows = [["fields that differ", *LETTERS[: len(settings)]]]
    apart: dict[str, list[str]] = {}
    for name in names:
        values = [shown(setting.fields[name]) if name in setting.fields else "-" for setting in settings]
        having = [letter for letter, s in zip(LETTERS, settings, strict=False) if name in s.fields]
        kinds = set(values) - ({"-"} if len(having) < len(settings) else set())
        if len(kinds) > 1:
            rows.append([name, *values])
        elif len(having) < len(settings):
            apart.setdefault(", ".join(having), []).append(f"{name} {kinds.pop()}")
    lines = [_aligned(rows)] if len(rows) > 1 else []
    for holders, fields in apart.items():
        listed = f"Fields of {holders} alone: {', '.join(fields)}."
        lines.append(textwrap.fill(listed, WIDTH, subsequent_indent="  ", break_long_words=False))
    return "\n".join(lines) or "Fields: no difference."


def _codes(settings: Sequence[Setting]) -> str:
    codes = [Counter(setting.done["code"]) for setting in settings]
    if len(set().union(*codes)) == 1:
        return f"Code: revision {_revision(next(iter(codes[0] or codes[-1])))} in all cells."
    lines = [
        f"  {letter}: " + (", ".join(f"{_revision(c)} ({counted(n, 'cell')})" for c, n in code.items()) or "none")
        for letter, code in zip(LETTERS, codes, strict=False)
    ]
    return "\n".join(["Code: revisions differ.", *lines])


def _revision(code: str) -> str:
    head, dash, dirty = code.partition("-")
    return head[:10] + dash + dirty or "unknown"


def _seeds(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _format(comparison: Comparison) -> Callable[..., str]:
    """Formats scores with four digits of the largest, and as many decimals for all."""
    largest = max((abs(v) for scores in comparison.scores for v in scores.values()), default=1.0) or 1.0
    decimals = max(0, 3 - math.floor(math.log10(largest)))
    return lambda value, sign="": "-" if math.isnan(value) else f"{value:{sign}.{decimals}f}"


def _aligned(rows: Sequence[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
