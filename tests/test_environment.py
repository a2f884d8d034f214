"""A stale environment is said in words, and one made in another way is left alone; how a command ends."""

import hashlib
import json
import signal
import subprocess
import sys

import pytest

from sddit.environment import check_environment
from sddit.errors import UsageError


def test_a_stale_environment_is_refused(tmp_path):
    (tmp_path / "requirements.lock").write_text("a==1")
    check_environment(tmp_path, tmp_path)  # no stamp
    stamp = {"requirements.lock": hashlib.sha256(b"a==1").hexdigest()}
    (tmp_path / "made-for.json").write_text(json.dumps(stamp))
    check_environment(tmp_path, tmp_path)
    (tmp_path / "requirements.lock").write_text("a==2")
    with pytest.raises(UsageError, match=r"is stale.*make setup"):
        check_environment(tmp_path, tmp_path)


def test_a_missing_library_is_no_traceback():
    code = "from sddit.errors import run_script\nrun_script(lambda: __import__('no_such_library'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no_such_library is not installed" in done.stderr
    assert "make setup" in done.stderr and "Traceback" not in done.stderr


# Runs after what the command registers, since that comes later.
ENDING = """
import atexit, signal, time
from sddit.errors import run_script

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
atexit.register(lambda: (print("over", flush=True), time.sleep(1)))
run_script(lambda: 0)
"""


def test_ctrl_c_at_the_very_end_does_not_change_how_a_command_ended():
    with subprocess.Popen([sys.executable, "-c", ENDING], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"over\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stderr.read() == b""
