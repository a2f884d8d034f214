"""The documentation runs: every Python block of docs/api.md, and every command and name of the README exists."""

import ast
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sddit
from sddit import presets

ROOT = Path(__file__).parents[1]
README, API = ROOT / "README.md", ROOT / "docs" / "api.md"
GIVES = "# → "  # what stands behind it on a line of docs/api.md is the value of the expression before it
COMMAND = re.compile(r"python ((?:sweeps|analysis)/\S+\.py)|sddit ([a-z]+)")


def python_blocks(path: Path, section: str = "") -> list[ast.Module]:
    """The ```python blocks of a page (or of one section), parsed so that line numbers are those of the page."""
    text = path.read_text(encoding="utf-8")
    start = text.index(f"\n## {section}\n") + 1 if section else 0
    end = text.index("\n## ", start) if section else len(text)
    found = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL).finditer(text, start, end)
    return [ast.parse("\n" * text.count("\n", 0, block.start(1)) + block[1], str(path)) for block in found]


def names_of_sddit(blocks: list[ast.Module]) -> set[str]:
    """The dotted names below `sddit` that the blocks use: {'train', 'presets.digits', …}."""
    nodes = [node for block in blocks for node in ast.walk(block) if isinstance(node, ast.Attribute)]
    return {match[1] for node in nodes if (match := re.fullmatch(r"sddit\.([\w.]+)", ast.unparse(node)))}


def commands(path: Path) -> list[re.Match[str]]:
    """What stands at the start of an inline `code span` or of a line in a block, and is a command of the project."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [*re.findall(r"`([^`]+)`", prose), *(line for block in blocks for line in block.splitlines())]
    return [match for line in lines if (match := COMMAND.match(line))]


def subcommands() -> set[str]:
    """Those of `sddit`: the keys of the tables in `sddit.cli.main`."""
    tree = ast.parse((ROOT / "sddit" / "cli.py").read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    keys = [key for node in ast.walk(main) if isinstance(node, ast.Dict) for key in node.keys]
    return {str(key.value) for key in keys if isinstance(key, ast.Constant)}


def test_the_page_on_python_runs_and_gives_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    lines = API.read_text(encoding="utf-8").splitlines()
    namespace: dict[str, Any] = {}
    compared = 0
    for block in python_blocks(API):
        for statement in block.body:
            said = lines[(statement.end_lineno or 0) - 1].partition(GIVES)[2]
            if isinstance(statement, ast.Expr) and said:
                value = eval(compile(ast.Expression(statement.value), str(API), "eval"), namespace)
                assert repr(value) == said, f"{API.name}, line {statement.lineno}"
                compared += 1
            else:
                exec(compile(ast.Module([statement], []), str(API), "exec"), namespace)
    assert compared == sum(GIVES in line for line in lines) > 0
    assert {path.name for path in tmp_path.iterdir()} >= {"mlflow.db", "mlruns", "runs", "figures", "weights"}
    assert type(namespace["drawn"]).__module__ == "matplotlib.figure"


def test_the_page_on_python_shows_every_public_name():
    shown, text = names_of_sddit(python_blocks(API)), API.read_text(encoding="utf-8")
    for name in sddit.__all__:
        value = getattr(sddit, name)
        if isinstance(value, type):
            assert re.search(rf"`(sddit\.)?{name}`", text), f"{name} is not in docs/api.md"
        elif not isinstance(value, ModuleType):
            assert name in shown, f"no block of docs/api.md calls sddit.{name}"
    assert {f"presets.{function.__name__}" for function in presets.PRESETS.values()} <= shown


@pytest.mark.parametrize(("page", "section"), [(README, "In Python"), (API, "")], ids=["README.md", "api.md"])
def test_pages_name_what_exists(page, section):
    names = names_of_sddit(python_blocks(page, section))
    assert {"train", "presets.digits"} <= names
    for name in names:
        value: Any = sddit
        for part in name.split("."):
            assert hasattr(value, part), f"{page.name} names sddit.{name}, which does not exist"
            value = getattr(value, part)


def test_commands_of_the_readme_exist():
    found = commands(README)
    scripts, words = ({match[group] for match in found if match[group]} for group in (1, 2))
    assert scripts and {"train", "import", "compare"} <= words
    for script in scripts:
        pattern = re.sub(r"<\w+>", "*", script)  # sweeps/<question>.py stands for all of them
        assert list(ROOT.glob(pattern)), f"README.md names {script}, which does not exist"
    assert words - subcommands() == set()
