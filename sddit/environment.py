"""What runs a process, to be compared: libraries with the lock file and the driver's, the code with the driver's."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import socket
import sys
from pathlib import Path

from sddit.errors import SdditError, UsageError

ROOT = Path(__file__).parents[1]
LIBRARIES = ("ray", "torch", "mlflow", "numpy", "diffusers")
SOURCES = (".py", ".json", ".safetensors")  # what the package consists of
SAME_CODE = (
    "Bring the driver's files to the same place there: rsync the project, or ray rsync-up --all-nodes cluster.yaml"
)


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


def versions() -> dict[str, str]:
    """Python and the libraries that must agree between processes, without importing them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            # A build for another device is the same version: 2.15.0+cu128 is 2.15.0+cpu.
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


@functools.cache
def source_digest(package: Path = ROOT / "sddit") -> str:
    """Twelve hexadecimal digits of the package's files, with or without git: equal digests are the same code."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in SOURCES:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def check_source(expected: str) -> None:
    """Whether this process runs the driver's code, for a node that joined after the sweep had begun.

    Raises:
        SdditError: it does not.
    """
    if (here := source_digest()) != expected:
        raise SdditError(
            f"The node {socket.gethostname()} runs other code (source {here}) than the driver ({expected}). "
            f"{SAME_CODE}; then run again with --retry-failed."
        )
