"""Makes `.venv`, or finds in a moment that it is right already. This is what `make setup` runs.

    python3 setup_env.py         # the set-up
    python3 setup_env.py lock    # pin the dependencies of pyproject.toml anew, in both lock files

Two lock files hold versions and hashes: pip installs `uv` from bootstrap.lock into `.bootstrap`, and uv makes
`.venv` from requirements.lock. A stamp in `.venv`, written last, says what it was made for; whenever that differs
from what is wanted now, `.venv` is made anew rather than mended.

Uses the standard library only, and no syntax newer than Python 3.6, so that an old Python can still read this
file and say that it is too old.
"""

import os
import sys

NEEDED = (3, 11)


def unfit(version: tuple, system: str) -> str:
    """What to tell somebody whose Python or system will not do; empty when both will."""
    if system != "posix":
        return "this is Windows - Linux or macOS is needed - use WSL 2"
    if tuple(version[:2]) < NEEDED:
        found, needed = (".".join(map(str, v)) for v in (version[:3], NEEDED))
        return (
            f"this is Python {found} ({sys.executable}) - Python {needed} or newer is needed - "
            f"install one, or name one: make setup PYTHON=/path/to/python{needed}"
        )
    return ""


# Before anything else: below, imports and annotations are of their time.
if unfit(sys.version_info, os.name):
    sys.exit("setup: " + unfit(sys.version_info, os.name))

import fcntl
import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STAMP = "made-for.json"
Command = list[str | Path]

# What `.venv` depends on, and what is said of one that was made for another.
REASONS = {
    "root": "it was made in another folder",
    "python": "it was made for another Python",
    "requirements.lock": "requirements.lock has changed",
    "pyproject.toml": "pyproject.toml has changed",
    "bootstrap.lock": "bootstrap.lock has changed",
}


def wanted_stamp(root: Path) -> dict[str, str]:
    """What a `.venv` made now in `root`, by this Python, would be made for."""
    digests = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in REASONS if "." in name}
    # The version that decides which builds of a package fit, not the patch release.
    python = f"{sys.implementation.cache_tag}{sys.abiflags}-{sys.platform}-{os.uname().machine}"
    return {"root": str(root), "python": python, **digests}


def why_stale(venv: Path, wanted: dict[str, str]) -> str | None:
    """Why `venv` has to be made anew; None when it is right."""
    if not os.path.lexists(venv):
        return "there is none yet"
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return "it was left half-made"
    for what, reason in REASONS.items():
        if stamp.get(what) != wanted[what]:
            return reason
    if not works(venv / "bin/python", "-I", "-S", "-c", ""):
        return "its Python is gone"
    return None


def works(*command: str | Path) -> bool:
    """Whether a command can be started and succeeds; it says nothing either way."""
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def step(command: Command, *, trouble: str) -> None:
    """Runs one command of the set-up. If it fails, its own words come first and `trouble` below them."""
    # close_fds: the children hold the lock too, so that a killed set-up's uv cannot meet the next set-up's.
    if subprocess.run(command, cwd=ROOT, close_fds=False).returncode != 0:
        sys.exit(f"setup: {trouble}")


@contextmanager
def only_one(lock_file: Path) -> Iterator[None]:
    """Lets one set-up at a time work in a folder; the others wait here."""
    with open(lock_file, "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: another set-up is at work in this folder; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some cluster file systems have no locks
            print(f"setup: no file locks here ({error.strerror}); run one make at a time", flush=True)
        yield


def get_uv() -> Path:
    """The pinned uv, installed into `.bootstrap` first unless it is there and works."""
    bootstrap, lock_file = ROOT / ".bootstrap", ROOT / "bootstrap.lock"
    uv, python = bootstrap / "bin/uv", bootstrap / "bin/python"
    installed = bootstrap / f"installed-{hashlib.sha256(lock_file.read_bytes()).hexdigest()[:16]}"
    if installed.exists() and works(uv, "--version"):
        return uv
    step(
        [sys.executable, "-m", "venv", "--clear", bootstrap],
        trouble=f"{sys.executable} could not make a virtual environment (see above) - its modules venv and ensurepip "
        "are needed - on Debian or Ubuntu: apt install python3-venv; or name another: make setup PYTHON=/path",
    )
    pip_install: Command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    step(
        [*pip_install, "--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", lock_file],
        trouble="pip could not install uv (see above) - a package index with the version in bootstrap.lock is "
        "needed - check the network (or PIP_INDEX_URL, HTTPS_PROXY, PIP_CERT), then run it again",
    )
    installed.touch()
    return uv


def build(venv: Path, stamp: dict[str, str]) -> None:
    """Makes `venv` from nothing. The stamp comes last: a set-up cut short leaves none, and so is done again."""
    uv = get_uv()
    os.environ["UV_PYTHON_DOWNLOADS"] = "never"
    step(
        [uv, "venv", "--quiet", "--clear", "--force", "--no-project", "--python", sys.executable, venv],
        trouble=f"uv could not make .venv with {sys.executable} (see above) - a working Python and a writable "
        "folder are needed - mend what it says, or name another Python: make setup PYTHON=/path",
    )
    # A person wants to watch the download; a log does not want a line for each package.
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    # No package is built from source: what its build would fetch is not in the lock.
    step(
        [uv, "pip", "sync", *quiet, "--python", venv, "--require-hashes", "--no-build", "requirements.lock"],
        trouble="uv could not install requirements.lock (see above) - a package index with these versions, built for "
        f"this system and Python {sys.version_info[0]}.{sys.version_info[1]}, and 7 GB of disk are needed - check "
        "the network (or UV_DEFAULT_INDEX, HTTPS_PROXY, SSL_CERT_FILE; uv does not read pip's settings) and run it "
        "again, or try another Python: make setup PYTHON=/path",
    )
    uv_install: Command = [uv, "pip", "install", "--quiet", "--python", venv]
    step(
        [*uv_install, "--offline", "--no-deps", "--no-build-isolation", "--editable", ROOT],
        trouble="uv could not install the project itself (see above) - pyproject.toml must be valid - mend it",
    )
    fresh = venv / (STAMP + ".new")
    fresh.write_text(json.dumps(stamp, indent=1))
    fresh.replace(venv / STAMP)


def setup() -> None:
    """Makes `.venv` unless it is right."""
    venv = ROOT / ".venv"
    if not why_stale(venv, wanted_stamp(ROOT)):
        return
    with only_one(ROOT / ".setup.lock"):
        stamp = wanted_stamp(ROOT)
        reason = why_stale(venv, stamp)
        if not reason:  # the set-up we waited for has made it
            return
        verb = "rebuilding" if os.path.lexists(venv) else "making"
        print(f"setup: {verb} .venv: {reason}", flush=True)
        build(venv, stamp)
        print("setup: done", flush=True)


def lock() -> None:
    """Writes both lock files from pyproject.toml; versions that still fit stay as they are."""
    sources: dict[str, Command] = {
        "bootstrap.lock": ["--group", "bootstrap"],
        "requirements.lock": ["pyproject.toml", "--group", "dev"],
    }
    with only_one(ROOT / ".setup.lock"):
        uv = get_uv()
        for name, source in sources.items():
            uv_compile: Command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
            step(
                [*uv_compile, *source, "--generate-hashes", "--no-annotate", "--no-header", "--output-file", name],
                trouble=f"uv could not resolve {name} (see above) - a package index and versions that fit together "
                "are needed - check the network, or mend pyproject.toml",
            )


def main(arguments: list[str]) -> None:
    """The command line; every way to fail ends in one line and an exit status."""
    if arguments not in ([], ["lock"]):
        sys.exit("usage: python3 setup_env.py [lock]")
    try:
        lock() if arguments else setup()
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"setup: {error} - the repository's files and a writable folder are needed - mend that, run it again")


if __name__ == "__main__":
    main(sys.argv[1:])
