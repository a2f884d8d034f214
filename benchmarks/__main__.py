"""``make bench``: every benchmark on this machine, written to RESULTS.md. Compare figures of one run only.

python -m benchmarks                        # all (more than an hour on two cores)
python -m benchmarks step_cost              # one, printed
"""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path

from sddit.orchestration.speed import processor
from sddit.tracking import code_revision

BENCHMARKS = ("overhead", "step_cost", "training", "reading", "data", "prepare", "sampling", "scoring", "checkpoints",
              "growth")  # fmt: skip
OUT = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    if unknown := set(names) - set(BENCHMARKS):
        raise SystemExit(f"Unknown benchmark {', '.join(sorted(unknown))}. Known: {', '.join(BENCHMARKS)}.")
    lines = ["# Benchmarks", "", f"`make bench` on {processor()}, Python {platform.python_version()}, revision "
             f"{code_revision()}.", ""]  # fmt: skip
    for name in names:
        lines += [*importlib.import_module(f"benchmarks.{name}").report(), ""]
    text = "\n".join(lines)
    if len(names) == len(BENCHMARKS):
        OUT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
