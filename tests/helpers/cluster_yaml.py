"""cluster.yaml as a user edits it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster.yaml"


def for_own_machines(text: str) -> str:
    """What the file says to do: the section AWS deleted, and "# " taken from the lines of the section below it."""
    text, deleted = re.subn(r"^# >>> AWS\n.*?^# <<< AWS\n", "", text, flags=re.MULTILINE | re.DOTALL)
    before, section = text.split("# >>> Own machines\n")
    section, after = section.split("# <<< Own machines\n")
    lines = section.splitlines()
    assert deleted == 1 and lines and all(line.startswith("# ") for line in lines)
    return before + "".join(f"{line.removeprefix('# ')}\n" for line in lines) + after
