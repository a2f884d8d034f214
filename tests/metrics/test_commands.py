"""``sddit reference``, ``sddit evaluate`` and their functions in Python, from what a user has to what is printed."""

import json
import os
import shutil
import sys
from pathlib import Path

import harness
import numpy as np
import pytest
from diagnosed import ALL
from tiny import experiment

import sddit
from sddit import api, cli
from sddit.data import open_manifest
from sddit.data.shards import Shards, write_shards
from sddit.errors import UsageError
from sddit.metrics.check import FINAL

DIGITS = Shards(open_manifest("digits")).read(np.arange(1797))[0].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint, with every score and diagnostic recorded at its step."""
    asked = {"eval__metrics": ALL, "eval__final": FINAL, "eval__final_seeds": 2, "data__hold_out": 0.1}
    return harness.run(experiment(**asked), tmp_path_factory.mktemp("trained"))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples, and inputs of which something is wrong."""
    folder = tmp_path_factory.mktemp("inputs")
    np.savez(folder / "samples.npz", DIGITS[:300])
    np.savez(folder / "few.npz", DIGITS[:1])
    np.savez(folder / "large.npz", np.zeros((9, 16, 16, 1), dtype=np.uint8))
    np.savez(folder / "pickled.npz", np.array([{}], dtype=object))
    (folder / "torn.npz").write_bytes((folder / "samples.npz").read_bytes()[:-50])
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``sddit ARGUMENTS`` in an empty folder, in this process since a new one takes seconds to import torch: exit
    status, what it printed, and its message. An exception that would be a traceback comes through."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sddit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return call


def test_a_checkpoint_scores_as_it_did_in_training(trained):
    scores = sddit.evaluate(trained.checkpoint, metrics=ALL)
    recorded = trained.metrics
    for metric in ALL:
        assert scores[metric] == pytest.approx(recorded[f"eval/{metric}"], rel=1e-6), metric
    assert "cyclic labels, no guidance, averaged weights, evaluation seed 0" in scores["protocol"]
    final = api.diagnose(trained.checkpoint, FINAL)
    expected = {k: v for k, v in recorded.items() if k.removeprefix("eval/") not in ALL}
    assert final == pytest.approx(expected, rel=1e-6)


def test_held_out_images_can_be_given_later(trained, tmp_path):
    labels = np.arange(60) % 10
    write_shards(DIGITS[:60].transpose(0, 3, 1, 2), labels, tmp_path / "test", name="test", num_classes=10)
    found = api.diagnose(trained.checkpoint, ["denoising"], test_path=str(tmp_path / "test"))
    assert found != api.diagnose(trained.checkpoint, ["denoising"])
    with pytest.raises(UsageError, match=r"Unknown diagnostic 'prope'. Did you mean 'probe'"):
        api.diagnose(trained.checkpoint, ["prope"])


def test_from_images_to_scores(folder, tmp_path, command):
    status, printed, _ = command("reference", "digits")
    about = json.loads(printed)
    assert status == 0 and about["images"] == 1797 and Path(about["path"]).stat().st_size == about["bytes"]
    before = Path(about["path"]).read_bytes()
    in_python = sddit.evaluate(DIGITS[:300])
    for reference in ("digits", about["path"], Path(about["path"]).stem):
        arguments = ["--reference", reference, "--metrics", "fid,sfid,is,precision,recall"]
        status, printed, _ = command("evaluate", folder / "samples.npz", *arguments)
        scores = json.loads(printed)
        assert status == 0 and scores["fid"] == pytest.approx(in_python["fid"], rel=1e-9)
        assert scores["precision"] > 0.99 and 1 < scores["is"] <= 10
        assert scores["protocol_digest"] == in_python["protocol_digest"]
    assert Path(about["path"]).read_bytes() == before, "nothing was overwritten"
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_from_the_command_line(trained, tmp_path, command):
    status, printed, _ = command("evaluate", trained.checkpoint, "--final", "probe,denoising")
    assert status == 0 and set(json.loads(printed)) == {"final"} and "probe/accuracy_sigma_0.5" in printed
    status, printed, _ = command("evaluate", trained.checkpoint, "--final", "denoising", "--metrics", "is")
    assert status == 0 and {"is", "final"} < set(json.loads(printed))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["evaluate", "few.npz"], "FID needs at least 2 images; there are 1 samples", 2),
        (["evaluate", "large.npz"], "digits-cnn sees 8×8 grey images", 2),
        (["evaluate", "torn.npz"], "torn.npz cannot be read as an .npz", 1),
        (["evaluate", "pickled.npz"], "arr_0 object", 1),
        (["evaluate", "samples.npz", "--reference", "torn.npz"], "torn.npz cannot be read as an .npz", 1),
        (["evaluate", "samples.npz", "--reference", "large.npz", "--extractor", "digits-cnn"], "reference is 16×16", 2),
        (["evaluate", "samples.npz", "--metrics", "fid,psnr"], "Unknown metric 'psnr'", 2),
        (["evaluate", "samples.npz", "--metrics", "sfid", "--extractor", "vgg16"], "no 'spatial' layer", 2),
        (["evaluate", "samples.npz", "--final", "probe"], "--final needs a checkpoint", 2),
        (["evaluate", "nowhere", "--final", "probe"], "No checkpoint at", 1),
        (["reference", "nowhere"], "No data set at", 1),
        (["reference", "digits", "--metrics", "is"], "There is nothing to build", 2),
        (["reference", "digits", "--extractor", "vgg16"], "its weights are not in", 2),
    ],
)
def test_bad_input(folder, tmp_path, command, arguments, message, status):
    for name in os.listdir(folder):
        shutil.copy(folder / name, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    ended, _, said = command(*arguments)
    assert message in said and ended == status
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_diagnostic_that_cannot_be_done_stops_a_training_before_it_starts(tmp_path):
    with pytest.raises(UsageError, match=r"probe \(eval.final\) cannot be done"):
        sddit.train(experiment(eval__final=("probe",)), tracking_uri=f"sqlite:///{tmp_path}/m.db", storage=tmp_path)
    assert os.listdir(tmp_path) == []
