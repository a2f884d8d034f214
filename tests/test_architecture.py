"""Who may import whom, as data; and what the driver's process must never load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYWHERE = {"config", "errors", "seeding", "cost", "presets", "intervals", "filesystem"}
# room → rooms of the project that it may import, at any depth of its code
ALLOWED = {
    "config": {"errors"},
    "errors": set(),
    "filesystem": {"errors"},
    "environment": {"errors"},
    "seeding": set(),
    "intervals": set(),
    "presets": EVERYWHERE,
    "cost": EVERYWHERE,
    "describe": EVERYWHERE,
    "models": EVERYWHERE,
    "diffusion": EVERYWHERE,
    "data": EVERYWHERE,
    "metrics": EVERYWHERE | {"data"},
    "methods": EVERYWHERE | {"models", "diffusion"},
    "training": EVERYWHERE | {"methods", "models", "diffusion", "data", "metrics"},
    "tracking": EVERYWHERE,
    "results": EVERYWHERE,
    "comparison": EVERYWHERE | {"results"},
    "checkpoints": EVERYWHERE | {"models", "training", "data"},
    "cell": EVERYWHERE | {"training", "methods", "data", "metrics", "tracking"},
    "orchestration": EVERYWHERE | {"environment", "cell", "training", "data", "metrics", "tracking", "results"},
    "api": EVERYWHERE
    | {"cell", "training", "checkpoints", "methods", "models", "data", "metrics", "tracking", "results"},
    "serve": {"errors", "filesystem"},
    "cli": EVERYWHERE | {"describe", "environment", "api", "training", "comparison", "orchestration", "serve"},
    "__init__": EVERYWHERE | {"api", "results"},
    "__main__": {"cli"},
}
FOREIGN = {"ray": {"orchestration"}, "optuna": {"orchestration"}, "mlflow": {"tracking", "results"}}


def modules():
    for path in sorted((ROOT / "sddit").rglob("*.py")):
        yield pytest.param(path, id=str(path.relative_to(ROOT)))


def imports(path):
    """Dotted names that a module imports anywhere, but for type checking."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "sddit":
                yield from (f"sddit.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", modules())
def test_data_flow_one_way(path):
    relative = path.relative_to(ROOT / "sddit")
    room = relative.parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top in FOREIGN:
            assert room in FOREIGN[top], f"{relative} imports {name}"
        assert top not in ("sweeps", "analysis"), f"{relative} imports {name}"
        if top == "sddit" and rest:
            other = rest.partition(".")[0]
            if other[0].isupper() or other == room:
                continue
            # The loop's reporter in the calibration is the one that records nothing.
            if (relative.name, other) == ("calibrate.py", "tracking"):
                continue
            assert other in ALLOWED[room], f"{relative} imports {name}"


def loaded(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import sddit; sddit.presets.digits()", {"torch", "ray", "mlflow", "pandas", "numpy"}),
        ("import sddit.results", {"torch", "ray", "mlflow"}),
        ("import analysis.plot_convergence, analysis.plot_components", {"torch", "ray", "mlflow", "optuna"}),
        ("import analysis.report, analysis.plot_search, analysis.table1", {"torch", "ray", "mlflow", "optuna"}),
        ("import sweeps.mask_ratio, sweeps.search", {"torch", "ray", "mlflow", "optuna", "matplotlib"}),
        ("import sddit.orchestration.status", {"torch", "ray", "mlflow", "optuna"}),
        ("import sddit.orchestration.doctor", {"torch", "ray", "mlflow", "optuna"}),
        ("import sddit.orchestration.driver", {"torch", "mlflow"}),
        ("import sddit.orchestration.trial", {"torch", "ray", "mlflow"}),
        ("import sddit.training.store, sddit.metrics.features, sddit.data", {"torch", "ray", "mlflow"}),
        ("import sddit.training.loop", {"ray", "mlflow"}),
        ("import sddit.orchestration.prepare, sddit.data.job", {"torch", "ray", "mlflow", "pandas"}),
    ],
)
def test_what_a_process_does_not_need_is_not_loaded(code, forbidden):
    assert not loaded(code) & forbidden
