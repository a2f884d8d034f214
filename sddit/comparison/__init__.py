"""``sddit compare``: settings of recorded sweeps against a baseline, paired by seed, and what that allows to say.

Only finished cells take part, each with its score at one common step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sddit.comparison.settings import Setting, Sweep
from sddit.comparison.statistics import Difference, holm, paired
from sddit.errors import SdditError, UsageError, did_you_mean

MOST = 26  # settings, one a letter
LISTED = 20  # steps in a message


@dataclass(frozen=True)
class Comparison:
    """Settings at one step, and how each but the first differs from the first, the baseline."""

    metric: str
    step: int
    settings: list[Setting]
    scores: list[dict[int, float]]  # of each setting: seed → score
    differences: list[Difference]  # of each setting but the first


def compare(
    texts: Sequence[str],
    sweep: str | None = None,
    tracking_uri: str | None = None,
    *,
    metric: str = "eval/fid",
    step: int | None = None,
) -> Comparison:
    """Compares settings of recorded sweeps with the first of them.

    Args:
        texts: two settings or more, each `axis=value[,axis=value]` or the first digits of an identity; with `SWEEP:`
            before it, of that sweep.
        sweep: the sweep of those that name none.
        metric: by its name in MLflow.
        step: where to compare; default: the last, which must be the same for all.

    Raises:
        UsageError: a setting, the step or the metric is unknown, or the scores are not comparable.
        SdditError: there is no score to compare yet.
    """
    if not 2 <= len(texts) <= MOST:
        raise UsageError(f"Name two settings to compare, and at most {MOST}; these are {len(texts)}.")
    named = [_sweep_and_setting(text, sweep) for text in texts]
    sweeps = {name: Sweep(name, tracking_uri, metric) for name, _ in named}
    settings = [sweeps[name].setting(text) for name, text in named]
    for i, setting in enumerate(settings):
        if twin := next((s for s in settings[:i] if (s.sweep, s.fields) == (setting.sweep, setting.fields)), None):
            raise UsageError(f"{texts[i]!r} is the same setting as {texts[settings.index(twin)]!r}. Name another.")
    _check_metric(settings, metric)
    _check_protocols(settings)
    step = _common_step(settings, metric, step)
    scores = [setting.scores(metric, step) for setting in settings]
    differences = [paired(scores[0], other) for other in scores[1:]]
    adjusted = holm([difference.p for difference in differences])
    differences = [replace(d, adjusted=p) for d, p in zip(differences, adjusted, strict=True)]
    return Comparison(metric, step, settings, scores, differences)


def _sweep_and_setting(text: str, sweep: str | None) -> tuple[str, str]:
    name, colon, setting = text.partition(":")
    if colon and "=" not in name:  # a value may have a colon too
        return name, setting
    if sweep is None:
        raise UsageError(f"Which sweep is {text!r} of? Give --sweep NAME, or write NAME:{text}")
    return sweep, text


def _check_metric(settings: Sequence[Setting], metric: str) -> None:
    if any(len(setting.at(metric)) for setting in settings):
        return
    done = sum(len(setting.done) for setting in settings)
    if not done:
        raise SdditError(
            "Nothing to compare yet: no cell of these settings is finished. Run the sweep again to resume."
        )
    known = {name for setting in settings for metrics in setting.done["metrics"] for name in metrics}
    raise UsageError(f"No {metric!r} in the {done} finished cells. {did_you_mean(metric, sorted(known))}")


def _check_protocols(settings: Sequence[Setting]) -> None:
    """Refuses scores under unlike protocols, and says what is unlike."""
    words = {
        digest: tags.get("sddit.protocol.text", "")
        for setting in settings
        for digest, tags in zip(setting.done["protocol"], setting.done["tags"], strict=True)
    }
    if len(words) < 2:
        return
    parts = {digest: text.split(", ") for digest, text in words.items()}
    shared = set.intersection(*map(set, parts.values()))
    lines = []
    for setting in settings:
        for digest, cells in setting.done.groupby("protocol"):
            unlike = ", ".join(part for part in parts[str(digest)] if part not in shared)
            lines.append(
                f"  {setting.label} ({counted(len(cells), 'cell')}): protocol {digest}, {unlike or 'same words'}"
            )
    raise UsageError(
        "Scores under unlike protocols are not compared:\n" + "\n".join(lines) + "\nScore the final checkpoints under "
        "one protocol with `sddit evaluate`, or compare settings of one protocol."
    )


def _common_step(settings: Sequence[Setting], metric: str, asked: int | None) -> int:
    """The step to compare at: as asked, or the last where all end at the same one."""
    having = [setting for setting in settings if len(setting.at(metric))]
    steps = sorted(set.intersection(*(set(setting.at(metric)["step"]) for setting in having)))
    listed = ", ".join(f"{step}" for step in steps[-LISTED:]) or "none"
    if asked is not None:
        if asked not in steps:
            raise UsageError(f"--step {asked}: not evaluated in all settings. Steps that all have: {listed}.")
        return asked
    ends = [Counter(setting.done["step"]) for setting in having]
    if len(set().union(*ends)) == 1 and steps:
        return int(steps[-1])
    lines = [
        f"  {setting.label}: " + ", ".join(f"step {step:,} ({counted(n, 'cell')})" for step, n in sorted(end.items()))
        for setting, end in zip(having, ends, strict=True)
    ]
    advice = f"Compare earlier with --step {steps[-1]}, or e" if steps else "E"
    raise UsageError(
        "The finished cells do not end at the same step, and scores at unlike steps are not compared:\n"
        + "\n".join(lines)
        + f"\nSteps that all have: {listed}. {advice}xtend the shorter ones: run their sweep again with --steps."
    )


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "cell"), counted(3, "cell")
    ('1 cell', '3 cells')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
