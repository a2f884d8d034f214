"""scikit-learn's handwritten digits (UCI optdigits test set): 1,797 grey images of 8×8, ten classes; no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sddit.data.manifest import Manifest
from sddit.data.shards import write_shards


def write_digits(folder: Path) -> Manifest:
    """Writes them into `folder`; their values 0 … 16 become 0 … 255 (16 is white), rounded."""
    from sklearn.datasets import load_digits  # seconds to import, and needed once per cache

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return write_shards(images, labels, folder, name="digits", num_classes=10)
