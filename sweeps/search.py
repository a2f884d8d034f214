"""All axes at once: Optuna's TPE over mask ratio, teacher noise, temperatures, λ_D, teacher momentum and model size,
with ASHA on FID by step (goes beyond the paper).

    python sweeps/search.py --plan
    python sweeps/search.py                                    # FID alone
    python sweeps/search.py --objective fid,cost --no-asha     # a Pareto front of FID and training FLOPs
    python sweeps/search.py --trials 48                        # goes on: the number counts all starts

Cost on digits: as much as is given by --trials or --budget-hours; a cell takes half a minute to five. Found there
(2026-11-26, one seed, eval.every=100, the device-hours of the mask-ratio grid): 7 cells, 6 of them stopped early; the
best is the base experiment at 31.28, where the grid's best is 31.16: no gain in so short a search.

The base experiment, the paper's values as far as they are known, comes first, at three mask ratios.
"""

from typing import Any

from sddit.config import Experiment
from sddit.orchestration.sweep import Sweep

SIZES = ["S/2", "B/2", "L/2", "XL/2"]


def suggest(trial: Any) -> dict[str, Any]:
    """Settings of a trial. Without a discriminative loss its temperatures and its teacher mean nothing."""
    settings = {
        "method.mask_ratio": trial.suggest_float("method.mask_ratio", 0.0, 0.8, step=0.05),
        "model.size": trial.suggest_categorical("model.size", SIZES),
    }
    if not trial.suggest_categorical("discriminates", [True, False]):
        return settings | {"method.lambda_d": 0.0}
    noise = trial.suggest_categorical("teacher_noise", ["fixed", "drawn", "student"])
    if noise == "fixed":
        noise = trial.suggest_float("method.teacher_sigma", 0.002, 1.0, log=True)
    return settings | {
        "method.teacher_sigma": noise,
        "method.tau_student": trial.suggest_float("method.tau_student", 0.03, 0.3, log=True),
        "method.tau_teacher": trial.suggest_float("method.tau_teacher", 0.01, 0.1, log=True),
        "method.tau_teacher_cls": trial.suggest_float("method.tau_teacher_cls", 0.01, 0.1, log=True),
        "method.lambda_d": trial.suggest_float("method.lambda_d", 0.01, 1.0, log=True),
        "method.teacher_momentum": 1 - trial.suggest_float("1 - teacher_momentum", 5e-5, 0.2, log=True),
    }


def first(base: Experiment) -> list[dict[str, Any]]:
    """The base experiment's point at three mask ratios."""
    method: Any = base.method
    point = {
        "method.mask_ratio": method.mask_ratio,
        "model.size": base.model.size,
        "discriminates": True,
        "teacher_noise": "fixed",
        "method.teacher_sigma": method.teacher_sigma,
        "method.tau_teacher": method.tau_teacher,
        "method.tau_teacher_cls": method.tau_teacher_cls,
        "method.tau_student": method.tau_student,
        "method.lambda_d": method.lambda_d,
        "1 - teacher_momentum": 1 - method.teacher_momentum,
    }
    return [point, point | {"method.mask_ratio": 0.0}, point | {"method.mask_ratio": 0.5}]


sweep = Sweep(
    name="search",
    question="Which setting of SD-DiT gives the lowest FID, over all axes at once?",
    axes={},
    suggest=suggest,
    fields=(
        "method.mask_ratio", "method.teacher_sigma", "method.tau_student", "method.tau_teacher",
        "method.tau_teacher_cls", "method.lambda_d", "method.teacher_momentum", "model.size",
    ),
    first=first,
    figures=("analysis.plot_search",),
    defaults={"search": "tpe", "trials": 24, "asha": True},
)  # fmt: skip

if __name__ == "__main__":
    sweep.main()
