"""The project's commands as a user runs them: in their own process and folder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tiny import set_flags

ROOT = Path(__file__).parents[2]
MASK_RATIO = str(ROOT / "sweeps" / "mask_ratio.py")


def script(name):
    """The file of a sweep."""
    return str(ROOT / "sweeps" / f"{name}.py")


def environment(**changes):
    """That of a fresh shell: what the tests' own process set for Ray must not hide what a command sets itself."""
    ours = ("RAY_", "TUNE_", "MLFLOW_", "OMP_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return env | {"SDDIT_CACHE": os.environ["SDDIT_CACHE"], "RAY_USAGE_STATS_ENABLED": "0"} | changes


def run(*arguments, cwd, timeout=900, **env):
    """Runs ``python ARGUMENTS`` to its end."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
    )


def sweep(*flags, cwd, ratios="[0.2, 0.5]", tiny=None, **options):
    """``python sweeps/mask_ratio.py`` with tiny cells."""
    arguments = [*set_flags(**{"method__mask_ratio": ratios} | (tiny or {})), *flags]
    if "--steps" not in arguments:
        arguments += ["--steps", "6"]
    return run(MASK_RATIO, *arguments, cwd=cwd, **options)


class Running:
    """A command that goes on while the test does something to it. What a test leaves running ends with it."""

    started = []

    def __init__(self, *arguments, cwd, **env):
        self.started.append(self)
        self.log = Path(cwd) / f"command-{time.monotonic_ns()}.log"
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=cwd,
                env=environment(**env),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def output(self):
        return self.log.read_text()

    def wait_for(self, text, timeout=400):
        self._wait(lambda: text in self.output, text, timeout)

    def wait_for_step(self, step, *, cells=1, timeout=400):
        """Until so many cells are said to have come so far, or farther: not every step is said."""

        def reached():
            said = re.findall(r"\((\w{12})\): \w+, step (\d+)/", self.output)
            return len({identity for identity, n in said if int(n) >= step}) >= cells

        self._wait(reached, f"step {step}", timeout)

    def _wait(self, came, what, timeout):
        deadline = time.monotonic() + timeout
        while not came():
            assert time.monotonic() < deadline, f"{what!r} did not come:\n{self.output}"
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            time.sleep(0.1)

    def family(self, name=""):
        """The processes below it whose names begin so."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith(name):
                    found.append(process)
        return found

    def interrupt(self):
        """Ctrl-C: the whole foreground group gets the signal, as in a terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self):
        """SIGKILL to the driver alone."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout=600):
        return self.process.wait(timeout)


def no_traceback(done):
    output = done.stdout + done.stderr if hasattr(done, "stdout") else done
    assert "Traceback" not in output, output
    return output
