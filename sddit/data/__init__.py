"""Data sets: prepared folders of `.npy` shards, and the ones that come with the package. Free of torch.

To add a built-in one: a function that writes it into an empty folder with `write_shards`, and a line in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sddit.data.digits import write_digits
from sddit.data.manifest import Manifest, cache_dir, open_manifest

DATASETS: dict[str, Callable[[Path], Manifest]] = {"digits": write_digits}


__all__ = ["DATASETS", "Manifest", "cache_dir", "open_manifest"]
