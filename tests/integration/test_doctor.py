"""The doctor on a real cluster of three nodes: what is well, what is not, and what it stops before a cell begins.

A record or storage on a disk that only one machine has cannot be had on one machine: `tests/orchestration/
test_doctor.py` gives a node another folder instead of one that it cannot see.
"""

import contextlib
import re
import shutil
import sys
from pathlib import Path

import pytest
from commands import ROOT, no_traceback, run, sweep
from nodes import Nodes
from servers import MlflowServer

from sddit import results
from sddit.data import open_manifest

pytestmark = pytest.mark.slow

SDDIT = Path(sys.executable).with_name("sddit")
WEIGHTS = Path("weights") / "vgg16-397923af.pth"
VGG = ["--set", "eval.extractor=vgg16"]


class Lab:
    """A cluster and a user: both have the data and the weights, the user where nothing says it."""

    def __init__(self, folder):
        self.cache, self.home = folder / "cache", folder / "home"
        shutil.copytree(open_manifest("digits").folder, self.cache / "data" / "digits")
        (self.cache / WEIGHTS).parent.mkdir()
        (self.cache / WEIGHTS).write_bytes(b"weights")
        (self.home / ".cache").mkdir(parents=True)
        (self.home / ".cache" / "sddit").symlink_to(self.cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SDDIT_CACHE", str(self.cache))
            self.nodes = Nodes(1, 1)
        self.user = {"HOME": str(self.home), "SDDIT_CACHE": "", **self.nodes.environment}

    def doctor(self, *flags, cwd, **env):
        """``sddit doctor``. Returns its exit status, its lines by (state, check), and all that it printed."""
        done = run(SDDIT, "doctor", *flags, cwd=cwd, **(self.user | env))
        words = [line.split(maxsplit=2) for line in done.stdout.splitlines() if " " in line]
        lines = {}
        for state, check, text in (w for w in words if w[0] in ("ok", "warning", "problem")):
            lines.setdefault((state, check), []).append(text)
        return done.returncode, lines, no_traceback(done)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.nodes.close()


@contextlib.contextmanager
def added(lab, **environment):
    """A node more, with variables of its own."""
    number = lab.nodes.add(1, **environment)
    try:
        yield number
    finally:
        lab.nodes.kill(number)


def test_three_nodes_that_are_well(lab, tmp_path):
    status, lines, output = lab.doctor(*VGG, "--workers", "2", cwd=tmp_path)
    assert status == 0 and "Ready" in output, output
    assert not [key for key in lines if key[0] == "problem"], output
    for check in ("code", "libraries", "devices", "token", "storage", "tracking", "data", "weights"):
        assert any(text.startswith("3 nodes: ") for text in lines["ok", check]), output
    assert "2 fit by compute" in lines["ok", "capacity"][0], output
    assert "vgg16" in lines["ok", "weights"][0] and "asked for and given" in lines["ok", "token"][0], output
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_server_that_all_nodes_reach_and_one_that_has_stopped(lab, tmp_path):
    server = MlflowServer(tmp_path, tmp_path / "artifacts")
    try:
        status, lines, output = lab.doctor("--tracking-uri", server.uri, cwd=tmp_path)
        assert status == 0, output
        assert f"{server.uri} can be written to." in lines["ok", "tracking"], output
        assert f"3 nodes: {server.uri} answers." in lines["ok", "tracking"], output
    finally:
        server.stop()
    status, lines, output = lab.doctor("--tracking-uri", server.uri, cwd=tmp_path)
    assert status == 1, output
    told = f"3 nodes: port {server.port} of 127.0.0.1 does not answer"
    assert any(text.startswith(told) for text in lines["problem", "tracking"]), output


def test_a_wrong_token_is_named_at_once(lab, tmp_path):
    token = tmp_path / "token"
    token.write_text("of another cluster, forty characters long")
    token.chmod(0o600)
    for wrong, cause in (
        ({"RAY_AUTH_TOKEN_PATH": str(token)}, f"the one of {token} is another"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled'"),
    ):
        status, _, output = lab.doctor(cwd=tmp_path, **wrong)
        assert status == 1 and "asks for its token, but " + cause in output, output
        assert "mode 600" in output and "RAY_AUTH_MODE=token everywhere" in output


def test_a_token_that_others_can_read_is_a_warning(lab, tmp_path):
    token = Path(lab.nodes.environment["RAY_AUTH_TOKEN_PATH"])
    token.chmod(0o644)
    try:
        status, lines, output = lab.doctor(cwd=tmp_path)
    finally:
        token.chmod(0o600)
    assert status == 0 and f"chmod 600 {token}" in lines["warning", "token"][0], output


def test_nodes_with_other_code_or_without_what_cells_need_stop_a_sweep(lab, tmp_path, tmp_path_factory):
    changed = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "sddit", changed / "sddit", ignore=shutil.ignore_patterns("__pycache__"))
    with open(changed / "sddit" / "errors.py", "a") as file:
        file.write("# of another revision\n")
    half = tmp_path_factory.mktemp("half")
    shutil.copytree(lab.cache / "data" / "digits", half / "data" / "digits")
    (half / "data" / "digits" / "manifest.json").unlink()
    with added(lab, SDDIT_CACHE=str(half)):
        # What the user says goes along to the nodes.
        status, lines, output = lab.doctor(*VGG, cwd=tmp_path, SDDIT_CACHE=str(lab.cache))
        assert status == 0 and any(text.startswith("4 nodes: ") for text in lines["ok", "weights"]), output

        with added(lab, PYTHONPATH=str(changed)):
            status, lines, output = lab.doctor(*VGG, cwd=tmp_path)
            done = sweep("--steps", "6", cwd=tmp_path, **lab.user)
    assert status == 1 and "3 problems" in output, output
    (code,), (data,), (weights,) = (lines["problem", check] for check in ("code", "data", "weights"))
    assert re.search(r"runs other code \(.*, source \w{12}\) than the driver", code) and "rsync" in code, output
    assert len(set(re.findall(r"source (\w{12})", code))) == 2, output
    assert "half-written" in data and "made anew" in data and f"curl -L --create-dirs -o {half}" in weights, output
    one_node = r"\S+ \(\w{6}\): "
    assert all(re.match(one_node, text) for text in (code, data, weights)), output
    assert code.split(": ")[0] != data.split(": ")[0] == weights.split(": ")[0], output

    assert done.returncode == 1 and "so nothing was started" in no_traceback(done), done.stdout + done.stderr
    assert "runs other code" in done.stderr and "half-written" in done.stderr, done.stderr
    assert "Concurrency" not in done.stdout, done.stdout
    assert results.load_cells("mask_ratio", f"sqlite:///{tmp_path}/mlflow.db").empty
