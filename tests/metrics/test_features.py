"""Extractors by name. Weights are drawn here, in the form in which torch-fidelity expects them."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch_fidelity import feature_extractor_clip, feature_extractor_dinov2, feature_extractor_inceptionv3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sddit.errors import UsageError
from sddit.metrics import features
from sddit.metrics.features import TORCH_FIDELITY, Weights, check_extractor, extractor_digest, get_extractor


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no way out to the network."""
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path))

    def refuse(*args, **kwargs):
        raise AssertionError("something tried to download")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    (tmp_path / "weights").mkdir()
    return tmp_path


def _inception_weights() -> dict[str, torch.Tensor]:
    """Those of the architecture as it is initialised, without its way of loading a file."""

    class Blank(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    return Blank("blank", ["2048"], feature_extractor_weights_path=empty).state_dict()


# ------------------------------------------------------------------------------------------------------------ the table


def test_every_extractor_of_torch_fidelity_is_known():
    assert set(TORCH_FIDELITY) == {name for name in FEATURE_EXTRACTORS_REGISTRY if not name.startswith("sddit-")}


def test_the_files_are_those_that_torch_fidelity_would_download():
    assert TORCH_FIDELITY["inception-v3-compat"].url == feature_extractor_inceptionv3.URL_INCEPTION_V3
    assert TORCH_FIDELITY["vgg16"].url == torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    for name, url in feature_extractor_clip.MODEL_URLS.items():
        assert TORCH_FIDELITY[name] == Weights(url, feature_extractor_clip.MODEL_METADATA[name]["hash"])
    for name, model in feature_extractor_dinov2.MODEL_METADATA.items():
        assert TORCH_FIDELITY[name].url.endswith(f"/{model}/{model}_pretrain.pth")


# ---------------------------------------------------------------------------------------------------------- the checks


def test_checks_need_no_torch(cache):
    code = """
import sys
from sddit.errors import UsageError
from sddit.metrics.features import check_extractor, extractor_digest
check_extractor("digits-cnn", (1, 8, 8))
extractor_digest("digits-cnn")
for name in ("inception-v3-compat", "clip-vit-b-32", "inceptoin", "nowhere:Class"):
    try:
        check_extractor(name)
    except UsageError:
        continue
    raise SystemExit(name)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name():
    with pytest.raises(UsageError, match=r"Unknown extractor 'inception-v3'. Did you mean 'inception-v3-compat'\?"):
        check_extractor("inception-v3")


@pytest.mark.parametrize("name", sorted(TORCH_FIDELITY))
def test_missing_weights_say_where_from_and_where_to(cache, name):
    weights = TORCH_FIDELITY[name]
    for function in (check_extractor, get_extractor, extractor_digest):
        with pytest.raises(UsageError) as error:
            function(name)
        message = str(error.value)
        assert f"eval.extractor is '{name}'" in message
        assert f"curl -L --create-dirs -o {weights.path} {weights.url}" in message
        assert weights.path.parent == cache / "weights"
        assert ("git clone" in message) == name.startswith("dinov2")


def test_images_that_the_extractor_cannot_see():
    check_extractor("digits-cnn", (1, 8, 8))
    with pytest.raises(UsageError, match=r"sees 8×8 grey images, but the data are 3 × 32 × 32 .* Set eval.extractor"):
        check_extractor("digits-cnn", (3, 32, 32))


# ----------------------------------------------------------------------------------------------------------- digits-cnn


def test_digits_cnn():
    extractor = get_extractor("digits-cnn")
    assert (extractor.name, extractor.dim, extractor.digest) == ("digits-cnn", 64, extractor_digest("digits-cnn"))
    values = extractor(torch.zeros((3, 1, 8, 8), dtype=torch.uint8))
    assert (values.shape, values.dtype, values.requires_grad) == ((3, 64), torch.float32, False)
    assert extractor(torch.zeros((0, 1, 8, 8), dtype=torch.uint8)).shape == (0, 64)
    with pytest.raises(UsageError, match="sees images of 1 channels, but these have 3"):
        extractor(torch.zeros((3, 3, 8, 8), dtype=torch.uint8))


def test_all_layers_of_digits_cnn():
    extractor = get_extractor("digits-cnn", metrics=("sfid", "is"))
    assert extractor.dims == {"features": 64, "spatial": 4 * 4 * 7, "logits": 10}
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layers, module = extractor.layers(images), extractor.module
    assert torch.equal(layers["features"], get_extractor("digits-cnn")(images))
    assert torch.equal(layers["logits"], module.classify(images))
    maps = module.maps(images.float() / 127.5 - 1)
    assert torch.equal(layers["spatial"].view(3, 4, 4, 7), maps[:, :7].permute(0, 2, 3, 1))


def test_digest_is_pinned():
    # It is part of the protocols of finished cells.
    assert extractor_digest("digits-cnn") == "5797fca97280"


def test_getting_an_extractor_draws_nothing():
    before = torch.random.get_rng_state()
    get_extractor("digits-cnn")
    assert torch.equal(torch.random.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------- torch-fidelity


def test_inception_from_the_cache(cache):
    path = TORCH_FIDELITY["inception-v3-compat"].path
    torch.save(_inception_weights(), path)
    extractor = get_extractor("inception-v3-compat")
    assert (extractor.dim, extractor.channels) == (2048, 3)
    assert extractor.digest == extractor_digest("inception-v3-compat")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    assert torch.equal(extractor(images), theirs(images)[0])
    grey = images[:, :1]
    assert torch.equal(extractor(grey), theirs(grey.repeat(1, 3, 1, 1))[0])


def test_spatial_features_and_logits_of_inception(cache):
    """sFID sees the first 7 channels of the 1×1 branch of Mixed_6d, flattened as in TensorFlow; IS unbiased logits."""
    path = TORCH_FIDELITY["inception-v3-compat"].path
    weights = _inception_weights()
    weights["fc.bias"] += 100
    torch.save(weights, path)
    extractor = get_extractor("inception-v3-compat", metrics=("fid", "sfid", "is"))
    assert extractor.dims == {"features": 2048, "spatial": 2023, "logits": 1008}
    assert extractor.digest == get_extractor("inception-v3-compat").digest
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layers = extractor.layers(images)
    assert torch.equal(layers["features"], get_extractor("inception-v3-compat")(images))

    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    seen = []
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pool, unbiased = theirs(images)
    (mixed,) = seen
    assert mixed.shape == (2, 768, 17, 17)
    expected = mixed[:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.equal(layers["spatial"], expected) and expected.std() > 0 and expected.min() == 0
    assert torch.equal(layers["logits"], unbiased)
    torch.testing.assert_close(unbiased, pool @ weights["fc.weight"].T)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["inception-v3-compat", "vgg16"])
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_weights_that_would_run_code(cache, name, save):
    save({"fc.bias": _Canary(cache / "canary")}, TORCH_FIDELITY[name].path)
    with pytest.raises(UsageError, match="is not a file of plain weights, and loading anything else could run code"):
        get_extractor(name)
    assert not (cache / "canary").exists()


def test_weights_of_another_network(cache):
    torch.save({"fc.bias": torch.zeros(3)}, TORCH_FIDELITY["inception-v3-compat"].path)
    with pytest.raises(UsageError, match="does not hold the weights of inception-v3-compat"):
        get_extractor("inception-v3-compat")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_weights_that_are_no_weights(cache, content):
    TORCH_FIDELITY["inception-v3-compat"].path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a file of plain weights"):
        get_extractor("inception-v3-compat")


def _small_clip(path: Path) -> None:
    """A TorchScript archive as OpenAI publishes them, of a vision transformer of one layer."""

    class Clip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            transformer = feature_extractor_clip.CLIPVisual(8, 32, 1, 64, 16)
            self.visual = transformer.visual
            self.text_projection = torch.nn.Parameter(torch.zeros(4, 8))

        def forward(self, x):
            return self.visual(x) + self.text_projection.sum()

    torch.manual_seed(0)
    torch.jit.save(torch.jit.trace(Clip().eval(), torch.zeros(1, 3, 32, 32)), path)


@pytest.mark.filterwarnings("ignore")  # of tracing, which only the publisher does
def test_clip_takes_the_published_archive_only(cache, monkeypatch):
    published = TORCH_FIDELITY["clip-vit-b-32"]
    _small_clip(published.path)
    with pytest.raises(UsageError, match=r"is not the published file: its sha256 is .* but should be 40d365715913…"):
        get_extractor("clip-vit-b-32")
    pinned = Weights(published.url, features.file_digest(published.path))
    monkeypatch.setitem(TORCH_FIDELITY, "clip-vit-b-32", pinned)
    extractor = get_extractor("clip-vit-b-32")
    assert extractor(torch.zeros((2, 3, 16, 16), dtype=torch.uint8)).shape == (2, 8)


def test_dinov2_from_a_clone_in_the_cache(cache):
    # torch.hub's own local path, with a hubconf.py of the same interface as that of the official repository.
    code = cache / "weights" / "dinov2"
    code.mkdir()
    (code / "hubconf.py").write_text("""
import torch
dependencies = ["torch"]
def dinov2_vits14(*, pretrained=True):
    assert not pretrained
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5))
""")
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 5)
    weights = TORCH_FIDELITY["dinov2-vit-s-14"]
    torch.save({f"2.{k}": v for k, v in linear.state_dict().items()}, weights.path)
    extractor = get_extractor("dinov2-vit-s-14")
    black = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = linear((-mean / std).repeat_interleave(4)[None])
    torch.testing.assert_close(extractor(black), expected.detach(), rtol=1e-3, atol=1e-3)  # its pooling sums in float32


# ------------------------------------------------------------------------------------------------------ the user's own


OWN = '''
import torch
from torch_fidelity import FeatureExtractorBase


class Means(FeatureExtractorBase):
    """The mean of each channel, scaled."""

    def __init__(self, name, features_list):
        super().__init__(name, features_list)
        self.register_buffer("scale", torch.tensor(SCALE))

    @staticmethod
    def get_provided_features_list():
        return ("means",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "means"

    def forward(self, x):
        return (x.double().mean((2, 3)) * self.scale,)


class Classifier(Means):
    @staticmethod
    def get_provided_features_list():
        return ("means", "logits")

    def forward(self, x):
        values = {"means": x.double().mean((2, 3)), "logits": x[:, 0, 0].double()}
        return tuple(values[name] for name in self.features_list)


class NotOne:
    pass
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes the module above and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def write(scale: float = 2.0) -> str:
        names.append(f"sddit_own_{tmp_path.name.replace('-', '_')}_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(OWN.replace("SCALE", str(scale)))
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_ones_own_class(own):
    name = f"{own()}:Means"
    check_extractor(name, (3, 4, 4))
    assert name.partition(":")[0] not in sys.modules  # found without being imported
    extractor = get_extractor(name)
    assert extractor.dim == 3
    images = torch.full((2, 3, 4, 4), 5, dtype=torch.uint8)
    assert torch.equal(extractor(images), torch.full((2, 3), 10.0))
    assert extractor.digest == extractor_digest(name) == get_extractor(name).digest


def test_layers_of_ones_own_class(own):
    name = own()
    assert get_extractor(f"{name}:Classifier", metrics=("fid", "is", "kid")).dims == {"features": 3, "logits": 64}
    for cls, metric, layer in (("Means", "is", "logits"), ("Classifier", "sfid", "spatial")):
        with pytest.raises(UsageError, match=rf"cannot be computed with {name}:{cls}, which has no '{layer}' layer"):
            get_extractor(f"{name}:{cls}", metrics=("fid", metric))


def test_ones_own_class_is_told_from_another_by_its_content(own):
    digests = {get_extractor(f"{own(scale)}:Means").digest for scale in (1.0, 2.0)}
    assert len(digests) == 2


def test_a_module_that_is_not_there():
    for name in ("nowhere_at_all:Means", "nowhere_at_all.below:Means", ":Means"):
        with pytest.raises(UsageError, match=r"but Python finds no module .* PYTHONPATH"):
            check_extractor(name)


def test_a_class_that_is_not_there(own):
    with pytest.raises(UsageError, match=r"has no 'Maens'. Did you mean 'Means'\?"):
        check_extractor(f"{own()}:Maens")


def test_a_class_that_is_no_extractor(own):
    with pytest.raises(UsageError, match=r"is no feature extractor: .* lacks get_provided_features_list"):
        get_extractor(f"{own()}:NotOne")
