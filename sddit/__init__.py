"""SD-DiT Lab: ablations of diffusion transformers with self-supervised discrimination.

    import sddit
    experiment = sddit.presets.digits(method="sddit").replace({"method.mask_ratio": 0.3})
    result = sddit.train(experiment)

Importing it loads neither torch, ray nor mlflow; each function does so when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sddit import presets
from sddit.config import Experiment
from sddit.errors import SdditError

if TYPE_CHECKING:
    from sddit.api import (
        TrainResult,
        build_network,
        build_reference,
        diagnose,
        evaluate,
        export_weights,
        import_weights,
        load_network,
        prepare,
        sample,
        train,
    )
    from sddit.results import load_results

__all__ = [
    "Experiment",
    "SdditError",
    "TrainResult",
    "build_network",
    "build_reference",
    "diagnose",
    "evaluate",
    "export_weights",
    "import_weights",
    "load_network",
    "load_results",
    "prepare",
    "presets",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sddit' has no attribute {name!r}")
    import importlib

    # Both take a moment to import, for what they import: numpy, or pandas.
    return getattr(importlib.import_module("sddit.results" if name == "load_results" else "sddit.api"), name)
