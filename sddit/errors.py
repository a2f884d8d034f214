"""The exceptions a user can meet, and the shape of their messages.

A message says what was given, what is allowed and what to do next. Imports nothing of the project.
"""

from __future__ import annotations

import atexit
import difflib
import re
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


def without_password(text: str) -> str:
    """Without the password that an address in it may carry.

    >>> without_password("postgresql://me@azure:p@ss@host/mlflow?password=secret")
    'postgresql://me@azure:…@host/mlflow?password=…'
    """
    return re.sub(r"//([^/:\s]*):[^/\s]*@", r"//\1:…@", re.sub(r"([?&]password=)[^&\s]*", r"\1…", text))


class SdditError(Exception):
    """Anything the user can cause or must know; shown without a traceback and without passwords. Exit status 1."""

    exit_status = 1

    def __str__(self) -> str:
        return without_password(super().__str__())


class UsageError(SdditError, ValueError):
    """Wrong input, found before anything expensive starts. Exit status 2."""

    exit_status = 2


class CheckpointError(SdditError):
    """A checkpoint is missing, cannot be read or used further, or belongs to another experiment."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is not what was written."""


class OutageError(CheckpointError):
    """Checkpoints cannot be read or written now. Nothing is wrong with the cell: the same command goes on."""


class DataError(SdditError):
    """A data set is missing, half-written or does not match its manifest."""


class StorageError(SdditError):
    """A place for files cannot be opened: no such bucket, no access, no network, a missing package."""


class TrackingError(SdditError):
    """The tracking server or file cannot be reached, read or written."""


class DivergedError(SdditError):
    """A loss became non-finite."""


class SupersededError(SdditError):
    """Another driver has taken this sweep over; what this process computes must not be recorded."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, and all of them.

    >>> did_you_mean("sdit", ["dit", "sddit"])
    "Did you mean 'sddit'? Known: dit, sddit."
    """
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"{guess}Known: {', '.join(known)}."


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits: a user's error is its message and its exit status, Ctrl-C is 130, no traceback."""
    try:
        sys.exit(main() or 0)
    except SdditError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    except ModuleNotFoundError as error:
        print(
            f"{error.name} is not installed in {sys.prefix}, so this is not the project's environment, or a stale one. "
            "Run: make setup, and use .venv/bin/python.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    finally:  # Python's own end takes a moment, in which Ctrl-C would be death by a signal
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
