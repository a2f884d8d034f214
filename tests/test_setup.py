"""The set-up: when `.venv` is made anew, what is said, and what the lock files hold. No network, nothing installed."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

import setup_env

ROOT = Path(setup_env.__file__).parent
LOCKS = ["bootstrap.lock", "requirements.lock"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the three files that a `.venv` depends on."""
    for name in (*LOCKS, "pyproject.toml"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def venv(root: Path) -> Path:
    """A `.venv` in that folder that is right."""
    venv = root / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    (venv / setup_env.STAMP).write_text(json.dumps(setup_env.wanted_stamp(root)))
    return venv


def test_a_right_venv_is_left_alone(root: Path, venv: Path) -> None:
    assert setup_env.why_stale(venv, setup_env.wanted_stamp(root)) is None


@pytest.mark.parametrize("name", [*LOCKS, "pyproject.toml"])
def test_a_changed_file_makes_it_stale(root: Path, venv: Path, name: str) -> None:
    (root / name).write_text("another")
    assert setup_env.why_stale(venv, setup_env.wanted_stamp(root)) == f"{name} has changed"


def test_another_python_makes_it_stale(root: Path, venv: Path) -> None:
    wanted = setup_env.wanted_stamp(root) | {"python": "cpython-399"}
    assert setup_env.why_stale(venv, wanted) == "it was made for another Python"


def test_a_moved_folder_makes_it_stale(root: Path, venv: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("moved") / "here"
    root.rename(moved)
    assert setup_env.why_stale(moved / ".venv", setup_env.wanted_stamp(moved)) == "it was made in another folder"


def test_a_python_that_is_gone_makes_it_stale(root: Path, venv: Path) -> None:
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to(root / "no-such-python")
    assert setup_env.why_stale(venv, setup_env.wanted_stamp(root)) == "its Python is gone"


@pytest.mark.parametrize("torn", [None, "", '{"root": "/som'])
def test_an_interrupted_set_up_is_stale(root: Path, venv: Path, torn: str | None) -> None:
    stamp = venv / setup_env.STAMP
    stamp.unlink() if torn is None else stamp.write_text(torn)
    assert setup_env.why_stale(venv, setup_env.wanted_stamp(root)) == "it was left half-made"


def test_no_venv_is_stale(root: Path) -> None:
    assert setup_env.why_stale(root / ".venv", setup_env.wanted_stamp(root)) == "there is none yet"


def test_a_set_up_says_why_and_ends_with_the_stamp(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = []

    def build(venv: Path, stamp: dict[str, str]) -> None:
        built.append(venv)
        (venv / "bin").mkdir(parents=True)
        (venv / "bin/python").symlink_to(sys.executable)
        (venv / setup_env.STAMP).write_text(json.dumps(stamp))

    monkeypatch.setattr(setup_env, "ROOT", root)
    monkeypatch.setattr(setup_env, "build", build)
    setup_env.setup()
    assert capsys.readouterr().out == "setup: making .venv: there is none yet\nsetup: done\n"
    setup_env.setup()
    assert capsys.readouterr().out == ""
    assert built == [root / ".venv"]


def test_two_set_ups_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def second() -> None:
        with setup_env.only_one(tmp_path / "lock"):
            order.append("second")

    other = threading.Thread(target=second)
    with setup_env.only_one(tmp_path / "lock"):
        other.start()
        other.join(timeout=0.2)
        order.append("first")
    other.join(timeout=10)
    assert order == ["first", "second"]
    assert "waiting for it" in capsys.readouterr().out


def test_a_failed_step_ends_with_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        setup_env.step([sys.executable, "-c", "raise SystemExit('its own words')"], trouble="found - needed - to do")
    assert end.value.code == "setup: found - needed - to do"
    assert "its own words" in capfd.readouterr().err


def test_an_old_python_is_told_so() -> None:
    message = setup_env.unfit((3, 9, 2), "posix")
    assert "this is Python 3.9.2" in message
    assert "Python 3.11 or newer is needed" in message
    assert "make setup PYTHON=" in message
    assert not setup_env.unfit((3, 11, 0), "posix")
    assert not setup_env.unfit((4, 0, 0), "posix")
    assert "WSL" in setup_env.unfit((3, 12, 0), "nt")


def test_an_old_python_can_read_the_script() -> None:
    ast.parse(Path(setup_env.__file__).read_text(), feature_version=(3, 7))


def test_no_way_to_fail_shows_a_traceback(tmp_path: Path) -> None:
    script = tmp_path / "setup_env.py"  # alone in its folder
    script.write_text(Path(setup_env.__file__).read_text())
    for arguments, message in {(): "requirements.lock", ("lokc",): "usage: python3 setup_env.py [lock]"}.items():
        run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert run.returncode == 1
        assert message in run.stderr
        assert "Traceback" not in run.stderr


def test_make_lists_its_commands() -> None:
    # Without the flags of the make that runs the tests: they would make this one its child.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(["make"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make ([a-z-]+)  ", run.stdout, re.MULTILINE)
    declared = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed == " ".join(declared).split()


def locked(name: str) -> dict[str, list[str]]:
    """The packages of a lock file, each with its hashes."""
    logical_lines = (ROOT / name).read_text().replace("\\\n", "").splitlines()
    return {line.split("==")[0]: re.findall(r"--hash=(sha256:[0-9a-f]{64})\b", line) for line in logical_lines}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_versions_and_hashes_only(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"://|--(extra-|default-)?index|--find-links|file:|^\s*[#/.]|@ ", text, re.MULTILINE)
    # One package, its version, perhaps the systems it is for, and its hashes.
    line = re.compile(r"[a-z0-9][a-z0-9._-]*==[^ /]+( ; [^/]+?)?( +--hash=sha256:[0-9a-f]{64})+")
    wrong = [each for each in text.replace("\\\n", "").splitlines() if not line.fullmatch(each)]
    assert not wrong


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    installed = project["project"]["dependencies"] + project["build-system"]["requires"] + groups["dev"]
    for lock, requirements in {"requirements.lock": installed, "bootstrap.lock": groups["bootstrap"]}.items():
        names = {re.split(r"[^a-z0-9-]", each, maxsplit=1)[0] for each in requirements}
        assert names <= set(locked(lock))
        assert all(locked(lock).values())
