"""Samples of a network: sample i is a function of (seed, i), whatever the sampler, batch and share of a worker."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sddit import seeding
from sddit.config import SAMPLERS, Experiment
from sddit.diffusion import build_process, samplers
from sddit.errors import UsageError
from sddit.training import evaluation

CPU = torch.device("cpu")
SHAPE, CLASSES = (4, 4, 4), 6
ALL = [(kind, sampler) for kind, names in SAMPLERS.items() for sampler in names]


class Network(nn.Module):
    """Random and far from linear; every output depends on all of the image, on the level and on the class."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        size, generator = int(np.prod(SHAPE)), torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(outputs * size, size, generator=generator) / size**0.5)
        self.classes = nn.Parameter(torch.randn(CLASSES + 1, size, generator=generator))
        self.batches: list[int] = []

    def forward(self, x: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        self.batches.append(len(x))
        hidden = x.flatten(1) + self.classes[y] + (noise / 100).sin()[:, None]
        return (hidden @ self.mix.T).tanh().view(len(x), -1, *SHAPE[1:])


def setting(kind: str, sampler: str, *, method: str = "dit", dtype: torch.dtype = torch.float64, **options: object):
    """What `sample` needs of a method, and its network."""
    options = {"sampler": sampler, "sampler_steps": 5, "batch_size": 8} | options
    if kind == "edm":
        options = {"churn": 10.0} | options
    experiment = Experiment.parse({"method": {"name": method}, "diffusion": {"kind": kind}, "eval": options})
    process = build_process(experiment.diffusion)
    fake = SimpleNamespace(experiment=experiment, shape=SHAPE, num_classes=CLASSES, process=process, decode=lambda x: x)
    return fake, Network(1 if kind == "edm" else 2).to(dtype)


def sample(fake: SimpleNamespace, network: nn.Module, first: int = 0, last: int = 8, seed: int = 3) -> Tensor:
    return evaluation.sample(fake, network, np.arange(first, last) % CLASSES, first, seed, CPU)


@pytest.mark.parametrize(("kind", "sampler"), ALL)
@pytest.mark.parametrize("guidance", [{}, {"guidance": 2.0, "guidance_channels": "three"}], ids=["plain", "guided"])
def test_a_sample_is_a_function_of_seed_and_index(kind: str, sampler: str, guidance: dict) -> None:
    """Equal in bytes with a network in float64. In float32 a matrix product of another size rounds otherwise."""
    whole = sample(*setting(kind, sampler, **guidance))
    assert whole.shape == (8, *SHAPE) and whole.dtype == torch.uint8
    assert len({bytes(image.numpy().tobytes()) for image in whole}) == 8
    for size in (1, 3):
        assert torch.equal(sample(*setting(kind, sampler, batch_size=size, **guidance)), whole)
    shares = [sample(*setting(kind, sampler, **guidance), lo, hi) for lo, hi in ((0, 3), (3, 7), (7, 8))]
    assert torch.equal(torch.cat(shares), whole)
    assert not torch.equal(sample(*setting(kind, sampler, **guidance), seed=4), whole)
    single = sample(*setting(kind, sampler, dtype=torch.float32, batch_size=3, **guidance))
    assert (single.int() - sample(*setting(kind, sampler, dtype=torch.float32, **guidance)).int()).abs().max() <= 1


@pytest.mark.parametrize(("kind", "sampler"), ALL)
def test_it_is_the_sampler_on_keyed_noise(kind: str, sampler: str) -> None:
    fake, network = setting(kind, sampler)
    y = torch.arange(8) % CLASSES

    def evaluate(x: Tensor, level: float) -> Tensor:
        dtype = torch.float64 if kind == "edm" else torch.int64
        return fake.process.evaluate(network, x, torch.full((8,), level, dtype=dtype), y)

    def noise(stream: str, step: int) -> Tensor:
        return torch.from_numpy(seeding.normal(3, f"eval/{stream}", step, 0, 8, SHAPE))

    with torch.no_grad():
        expected = samplers.solve(fake.experiment, evaluate, noise)
    assert torch.equal(sample(fake, network), evaluation.to_uint8(expected))


@pytest.mark.parametrize(
    ("method", "kind", "sampler", "options", "batches"),
    [
        ("dit", "edm", "heun", {}, [8] * 9),
        ("dit", "edm", "euler", {"guidance": 2.0}, [16] * 5),
        ("dit", "edm", "euler", {"guidance": 0.0}, [16] * 5),
        # 80, 29, 8.4, 0.33, 0.002 without churn
        ("dit", "edm", "euler", {"guidance": 2.0, "guidance_interval": (0.1, 10.0), "churn": 0.0}, [8, 8, 16, 16, 8]),
        ("dit", "iddpm", "ddpm", {"guidance": 1.5}, [16] * 5),
        # t = 999, 749, 500, 250, 0; at 999 the power-cosine is 1 to the last bit
        ("mdt", "iddpm", "ddpm", {"guidance": 3.8}, [8, 16, 16, 16, 16]),
        ("mdt", "iddpm", "ddpm", {"guidance": 3.8, "guidance_interval": (0.0, 1.0)}, [8, 8, 8, 16, 16]),
        ("mdt", "iddpm", "dpmpp", {}, [8] * 5),
    ],
)
def test_the_unconditional_half_is_paid_for_only_where_it_counts(
    method: str, kind: str, sampler: str, options: dict, batches: list[int]
) -> None:
    fake, network = setting(kind, sampler, method=method, **options)
    sample(fake, network)
    assert network.batches == batches


@pytest.mark.parametrize(("kind", "sampler"), ALL)
def test_scale_0_on_all_channels_samples_without_a_class(kind: str, sampler: str) -> None:
    def alike(images: Tensor, others: Tensor) -> bool:
        return bool((images.int() - others.int()).abs().max() <= 1)

    fake, network = setting(kind, sampler, guidance=0.0, guidance_channels="all")
    if sampler == "ddpm":  # v stays conditional
        network.mix.data[network.mix.shape[0] // 2 :] = 0
    unconditional = sample(fake, network)
    plain, _ = setting(kind, sampler)
    assert not alike(sample(plain, network), unconditional)
    network.classes.data[:] = network.classes.data[-1]
    assert alike(sample(plain, network), unconditional)


@pytest.mark.parametrize(("kind", "channels", "guided"), [("edm", None, 4), ("iddpm", None, 3), ("iddpm", "all", 4)])
def test_channels_that_are_guided(kind: str, channels: str | None, guided: int) -> None:
    """By a network whose channels do not mix, so that what is not guided cannot change."""
    fake, network = setting(kind, SAMPLERS[kind][0], guidance=4.0, guidance_channels=channels)
    plain, _ = setting(kind, SAMPLERS[kind][0])
    outputs, size = len(network.mix) // 64, 16
    mask = torch.kron(torch.eye(SHAPE[0]).repeat(outputs, 1), torch.ones(size, size))
    network.mix.data *= mask
    differ = (sample(fake, network) != sample(plain, network)).any(dim=(0, 2, 3))
    assert differ.tolist() == [c < guided for c in range(4)]


def test_one_channel_is_fewer_than_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SHAPE", (1, 4, 4))
    fake, network = setting("iddpm", "ddpm", guidance=4.0)
    plain, _ = setting("iddpm", "ddpm")
    assert not torch.equal(sample(fake, network), sample(plain, network))


def test_no_samples_and_wrong_classes() -> None:
    fake, network = setting("edm", "heun")
    assert sample(fake, network, 5, 5).shape == (0, *SHAPE)
    with pytest.raises(UsageError, match=r"must be in \[0, 6\)"):
        evaluation.sample(fake, network, np.array([0, 6]), 0, 0, CPU)
