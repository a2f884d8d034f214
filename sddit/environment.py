"""Whether the environment that runs a command is the one that the lock file describes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from sddit.errors import UsageError

ROOT = Path(__file__).parents[1]


def check_environment(prefix: Path = Path(sys.prefix), root: Path = ROOT) -> None:
    """Compares the stamp that `make setup` left in a `.venv` with the lock file beside the code.

    Raises:
        UsageError: the lock file has changed since. Environments made in another way have no stamp and pass.
    """
    try:
        made_for = json.loads((prefix / "made-for.json").read_text())["requirements.lock"]
        wanted = hashlib.sha256((root / "requirements.lock").read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError):
        return
    if made_for != wanted:
        raise UsageError(
            f"The environment {prefix} is stale: requirements.lock has changed since it was made. Run: make setup"
        )
