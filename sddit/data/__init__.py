"""Data sets: prepared folders of `.npy` shards, and the ones that come with the package. Free of torch.

To add a built-in one: a function that writes it into an empty folder with `write_shards`, and a line in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sddit.data.digits import write_digits
from sddit.data.manifest import Manifest, cache_dir, open_manifest

DATASETS: dict[str, Callable[[Path], Manifest]] = {"digits": write_digits}


def content_digest(manifest: Manifest, test_path: str | None) -> str:
    """What an identity knows of an experiment's data: the content of the training set and, if given, the test set.

    Raises:
        DataError: as `open_manifest`, of the test set.
    """
    return manifest.digest if test_path is None else f"{manifest.digest}+{open_manifest(test_path).digest}"


__all__ = ["DATASETS", "Manifest", "cache_dir", "content_digest", "open_manifest"]
