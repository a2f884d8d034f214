"""``import sddit`` and the command ``sddit`` as the README shows them."""

import json
import re

import numpy as np
import pytest
from commands import no_traceback, run
from PIL import Image
from tiny import TINY, experiment

import sddit
from sddit.errors import CheckpointError, SdditError, UsageError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    uri = f"sqlite:///{folder}/mlflow.db"
    return folder, uri, sddit.train(experiment(), tracking_uri=uri, storage=folder / "runs")


def test_training_again_goes_on_where_it_stopped(trained):
    folder, uri, result = trained
    again = sddit.train(experiment(), tracking_uri=uri, storage=folder / "runs")
    assert again == result
    longer = sddit.train(experiment(train__steps=8), tracking_uri=uri, storage=folder / "runs")
    assert (longer.step, longer.identity, longer.run_id) == (8, result.identity, result.run_id)
    frame = sddit.load_results("train", uri)
    assert frame["step"].tolist() == [3, 6, 8] and set(frame["state"]) == {"done"}


def test_samples_depend_on_seed_and_position_alone(trained):
    *_, result = trained
    checkpoint = result.checkpoint.replace("step-00000006", "step-00000008")
    images = sddit.sample(checkpoint, classes=list(range(10)) * 2, seed=0)
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 10
    assert np.array_equal(sddit.sample(checkpoint, classes=[0, 1, 2], seed=0), images[:3])
    assert not np.array_equal(sddit.sample(checkpoint, classes=[0, 1, 2], seed=1), images[:3])
    with pytest.raises(UsageError, match=r"Classes must be in \[0, 10\)"):
        sddit.sample(checkpoint, classes=[10])
    for classes in ([[1, 2]], 3, [0.5], ["1"]):
        with pytest.raises(UsageError, match="whole numbers, one for each image"):
            sddit.sample(checkpoint, classes=classes)


def test_networks_and_scores(trained):
    import torch

    *_, result = trained
    checkpoint = result.checkpoint.replace("step-00000006", "step-00000008")
    x, noise, y = torch.randn(4, 1, 8, 8), torch.zeros(4), torch.tensor([0, 5, 9, 10])
    fresh, loaded = sddit.build_network(experiment()), sddit.load_network(checkpoint)
    with torch.no_grad():
        assert torch.equal(fresh(x, noise, y), torch.zeros(4, 1, 8, 8)), "the output is zero before training"
        assert loaded(x, noise, y).std() > 0
    assert not loaded.training
    scores = sddit.evaluate(
        np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8), reference="digits"
    )
    assert scores["fid"] > 100 and "digits-cnn" in scores["protocol"]
    with torch.device("meta"):
        network = sddit.build_network(sddit.presets.imagenet256("S/2", method="sddit"))
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 68_116_752


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        sddit.load_network(tmp_path)
    with pytest.raises(SdditError, match="nowhere"):
        sddit.build_network(experiment(data__path="nowhere"))
    with pytest.raises(AttributeError):
        _ = sddit.no_such_thing


def test_the_command(tmp_path):
    flags = [flag for k, v in TINY.items() if k != "train.steps" for flag in ("--set", f"{k}={v}")]
    done = run("-m", "sddit", "train", "--steps", "6", *flags, cwd=tmp_path)
    assert done.returncode == 0 and "eval/fid" in done.stdout, done.stderr
    checkpoint = done.stdout.split("Checkpoint: ")[1].splitlines()[0]
    sampled = run("-m", "sddit", "sample", checkpoint, "--out", "s.npz", "--count", "30", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (30, 8, 8, 1)
    grid = run("-m", "sddit", "sample", checkpoint, "--out", "grid.png", "--count", "20", cwd=tmp_path)
    assert grid.returncode == 0 and Image.open(tmp_path / "grid.png").size == ((10 * 9 - 1) * 4, (2 * 9 - 1) * 4)
    scored = run("-m", "sddit", "evaluate", "s.npz", "--reference", "digits", cwd=tmp_path)
    assert scored.returncode == 0 and json.loads(scored.stdout)["fid"] > 0, scored.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["train", "--method", "sdit"], "Did you mean 'sddit'", 2),
        (["train", "--set", "train.lr=-1"], "train.lr is -1, but must be > 0", 2),
        (["sample", "nowhere", "--out", "x.npz"], "No checkpoint at", 1),
        (["sample", "nowhere", "--out", "x.gif"], "must end in .npz", 2),
        (["evaluate", "nowhere.npz"], "nowhere.npz", 1),
        (["trian"], "trian", 2),
    ],
)
def test_bad_input_to_the_command(tmp_path, arguments, message, status):
    done = run("-m", "sddit", *arguments, cwd=tmp_path)
    assert message in no_traceback(done) and done.returncode == status


def test_a_dry_run_prints_every_field(tmp_path):
    done = run("-m", "sddit", "train", "--dry-run", "--set", "method.mask_ratio=0.5", cwd=tmp_path)
    fields = dict(re.findall(r"^([\w.]+) += (\S+)", done.stdout, re.MULTILINE))
    assert done.returncode == 0 and fields["method.mask_ratio"] == "0.5" and "train.ema" in fields
    assert "Parameters" in done.stdout and "# given" in done.stdout
    assert list(tmp_path.iterdir()) == []
