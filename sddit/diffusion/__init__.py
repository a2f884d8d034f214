"""The noise processes by `diffusion.kind`; independent of networks and methods."""

from __future__ import annotations

from sddit.config import Diffusion
from sddit.diffusion.base import Process
from sddit.diffusion.edm import EDM
from sddit.diffusion.iddpm import IDDPM

PROCESSES: dict[str, type[EDM] | type[IDDPM]] = {"edm": EDM, "iddpm": IDDPM}


def build_process(config: Diffusion) -> Process:
    """The process of an experiment."""
    return PROCESSES[config.kind](config)
