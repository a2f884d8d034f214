"""The feature network of the `digits` preset: a small classifier of 8×8 grey digits that ships with the package.

Its 64 features make an FID that is comparable with itself only; it is labelled 'digits-cnn', never as an Inception
FID. It has the interface of torch-fidelity's extractors but not their base class, whose import takes seconds.

    python -m sddit.metrics.digits_cnn     # trains it anew (seconds) and writes the two files beside this one

Training is deterministic on one machine, yet other processors round differently: the files are what counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddit import seeding
from sddit.data import open_manifest
from sddit.data.shards import Shards
from sddit.errors import UsageError
from sddit.metrics.features import SPATIAL_CHANNELS, file_digest

WEIGHTS = Path(__file__).with_suffix(".safetensors")
CARD = Path(__file__).with_suffix(".json")  # how the weights were trained, and what they reach
NUM_TEST = 360  # of 1,797


class DigitsCNN(nn.Module):
    """Two convolutions, a layer of 64 features (after its SiLU), ten logits: 38,218 parameters.

    Without `weights`, those that ship with the package are loaded.
    """

    def __init__(
        self, name: str, features_list: list[str], weights: dict[str, Tensor] | None = None, **kwargs: object
    ) -> None:
        super().__init__()
        self.name, self.features_list = name, features_list
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.logits = nn.Linear(64, 10)
        self.load_state_dict(safetensors.torch.load_file(WEIGHTS) if weights is None else weights)
        self.requires_grad_(False)
        self.eval()

    def maps(self, x: Tensor) -> Tensor:
        """What the convolutions give (b, 32, 4, 4) of images (b, 1, 8, 8) in [-1, 1]."""
        return F.max_pool2d(F.silu(self.conv2(F.silu(self.conv1(x)))), 2)

    def features(self, maps: Tensor) -> Tensor:
        """Features (b, 64). SiLU: with ReLU more than half of them die at 0."""
        return F.silu(self.hidden(maps.flatten(1)))

    def classify(self, images: Tensor) -> Tensor:
        """Logits (b, 10) of uint8 images (b, 1, 8, 8)."""
        return self.logits(self.features(self.maps(_normalise(images))))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What `features_list` asks for, of uint8 images (b, 1, 8, 8)."""
        maps = self.maps(_normalise(images))
        hidden = self.features(maps)
        spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # 4 · 4 · 7 = 112, in Inception's order
        values = {"64": hidden, "logits": self.logits(hidden), "spatial": spatial}
        return tuple(values[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "logits", "spatial"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "64", "kid": "64", "prc": "64"}[metric]

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros((1, 1, 8, 8), dtype=torch.uint8)


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the test images: 360 for testing, the same fraction of each class."""
    rank = np.empty(len(labels))
    for c in np.unique(labels):
        where = np.flatnonzero(labels == c)
        rank[where] = (seeding.permuted(seed, np.arange(len(where)), len(where)) + 0.5) / len(where)
    order = np.argsort(rank, kind="stable")
    return np.sort(order[:-NUM_TEST]), np.sort(order[-NUM_TEST:])


def accuracy(net: DigitsCNN, images: Tensor, labels: Tensor) -> float:
    """The fraction of uint8 images (b, 1, 8, 8) that `net` puts into their class."""
    with torch.no_grad():
        return (net.classify(images).argmax(1) == labels).double().mean().item()


def train(
    images: Tensor, labels: Tensor, *, seed: int, epochs: int = 60, batch_size: int = 64, lr: float = 3e-3
) -> DigitsCNN:
    """A network trained on uint8 images (n, 1, 8, 8) and int64 labels (n,), a function of the arguments alone.

    Half of the images are moved by up to one pixel in either direction; the learning rate falls to zero along a cosine.
    No label smoothing, dropout or weight decay: they collapse the features of a class, and with them what FID can see.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsCNN("digits-cnn", ["64"], weights=_initial())
        net.train().requires_grad_(True)
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                logits = net.classify(_shifted(images[batch]))
                loss = F.cross_entropy(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def main() -> None:
    torch.set_num_threads(1)
    seed = 0
    manifest = open_manifest("digits")
    images, labels = map(torch.from_numpy, Shards(manifest).read(np.arange(manifest.count)))
    train_indices, test_indices = map(torch.from_numpy, split(labels.numpy(), seed))
    net = train(images[train_indices], labels[train_indices], seed=seed)
    WEIGHTS.write_bytes(safetensors.torch.save(net.state_dict()))
    card = {
        "test_accuracy": accuracy(net, images[test_indices], labels[test_indices]),
        "train_accuracy": accuracy(net, images[train_indices], labels[train_indices]),
        "train_images": len(train_indices),
        "test_images": len(test_indices),
        "command": "python -m sddit.metrics.digits_cnn",
        "training": "Adam, 3e-3 falling to 0 along a cosine, 60 epochs of batches of 64, half of the images moved",
        "seed": seed,
        "data": manifest.digest,
        "weights_sha256": file_digest(WEIGHTS),
        "torch": torch.__version__,
    }
    CARD.write_text(json.dumps(card, indent=1) + "\n")
    print(f"{WEIGHTS}\n{CARD}\ntest accuracy {card['test_accuracy']:.4f}")


def _normalise(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 8, 8):
        raise UsageError(
            f"digits-cnn sees uint8 images (b, 1, 8, 8), but got {images.dtype} {tuple(images.shape)}. "
            "Set eval.extractor to one for such images, e.g. inception-v3-compat."
        )
    return images.float() / 127.5 - 1


def _initial() -> dict[str, Tensor]:
    """torch's default initial weights, as a state dict."""
    layers = {
        "conv1": nn.Conv2d(1, 16, 3), "conv2": nn.Conv2d(16, 32, 3), "hidden": nn.Linear(512, 64),
        "logits": nn.Linear(64, 10),
    }  # fmt: skip
    return {f"{layer}.{k}": v.detach() for layer, module in layers.items() for k, v in module.named_parameters()}


def _shifted(images: Tensor) -> Tensor:
    """Half of the images moved by -1, 0 or 1 pixel along each axis; black comes in at the border."""
    padded = F.pad(images, (1, 1, 1, 1))
    moves = torch.randint(-1, 2, (2, len(images), 1)) * (torch.rand(len(images), 1) < 0.5)
    rows, columns = torch.arange(8) + 1 + moves  # (b, 8) each
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


if __name__ == "__main__":
    main()
