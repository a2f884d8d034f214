"""What is asked of a network at its last step, and the scores beside it: by oracles, and by any number of workers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnosed import everything, setting
from harness import run
from tiny import experiment as tiny

from sddit.config import METHOD_CONFIGS
from sddit.data import open_manifest
from sddit.data.sampler import BatchSampler, ImageSet
from sddit.data.shards import Shards
from sddit.metrics.check import FINAL
from sddit.metrics.protocol import METRICS
from sddit.training import diagnostics
from sddit.training.diagnostics import DENOISING_SIGMAS, PROBE_SIGMAS, diagnose, linear_accuracy
from sddit.training.evaluation import Evaluation

NAMES = {
    *(f"eval/{metric}" for metric in METRICS),
    *(f"probe/accuracy_sigma_{sigma:g}" for sigma in PROBE_SIGMAS),
    *(f"denoising/loss_sigma_{sigma:g}" for sigma in DENOISING_SIGMAS),
    "copying/ratio",
    "copying/closer",
    "eval/fid_seeds_mean",
    "eval/fid_seeds_std",
}


@pytest.fixture(scope="module")
def made():
    return setting()


@pytest.fixture(scope="module")
def digits():
    return Shards(open_manifest("digits"))


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def alone():
    return everything()


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_workers_finds_the_same(workers, alone, tmp_path):
    helpers = Path(__file__).parents[1] / "helpers"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    done = subprocess.run(
        [*command, str(helpers / "diagnosed.py"), str(tmp_path / "out.json")],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == set(alone) == NAMES
    for name, value in alone.items():
        # Samples of other batches differ in their last bit, which may move one of them across a ball's surface, or one
        # held-out image of 359 across the classifier's border.
        step = {"eval/precision": 1 / 80, "eval/recall": 2 / 1797}.get(name, 2 / 359 if "probe" in name else 1e-6)
        assert found[name] == pytest.approx(value, rel=1e-3, abs=step), name


# ---------------------------------------------------------------------------------------------------------- in the loop


def test_recorded_at_the_last_step_alone(tmp_path):
    metrics = ("fid", "is", "precision")
    changes = {"eval__metrics": metrics, "eval__final": FINAL, "eval__final_seeds": 2, "data__hold_out": 0.1}
    result, memory = run(tiny(**changes), tmp_path)
    names = {step: {k for s, k in memory.recorded if s == step} for step in (3, 6)}
    scores = {f"eval/{metric}" for metric in metrics}
    final = {name for name in NAMES if not name.startswith("eval/") or "seeds" in name}
    assert scores <= names[3] and not final & names[3]
    assert scores | final <= names[6]
    assert set(result.metrics) == scores | final and dict(memory.evaluations)[6] == result.metrics
    again, silent = run(tiny(**changes), tmp_path)
    assert again.metrics == result.metrics and silent.recorded == {}


def test_other_metrics_leave_fid_as_it_is(tmp_path):
    plain, _ = run(tiny(), tmp_path / "plain")
    more, _ = run(tiny(eval__metrics=("fid", "sfid", "recall"), eval__final=("seeds",)), tmp_path / "more")
    assert more.metrics["eval/fid"] == pytest.approx(plain.metrics["eval/fid"], rel=1e-12)


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_every_method(method):
    found = diagnose(("probe", "denoising"), setting(method, eval__metrics=("fid",), eval__samples=4))
    assert all(np.isfinite(value) for value in found.values())
    assert all(0 <= v <= 1 for k, v in found.items() if "probe" in k)
    assert min(v for k, v in found.items() if "denoising" in k) > 0


# ------------------------------------------------------------------------------------------------------------- oracles


def test_a_probe_on_pixels_tells_digits_apart_until_noise_covers_them(made, monkeypatch):
    """Features replaced by the noisy pixels, on which a linear classifier is known to reach some 95 %."""
    monkeypatch.setattr(
        type(made.method), "features", lambda self, network, x0, eps, s: (x0 + s[:, None, None, None] * eps).flatten(1)
    )
    found = diagnose(["probe"], made)
    assert found["probe/accuracy_sigma_0.002"] > 0.9
    assert found["probe/accuracy_sigma_2"] < found["probe/accuracy_sigma_0.5"] < found["probe/accuracy_sigma_0.1"]


def test_the_probe_is_scikit_learns_logistic_regression(digits):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, labels = digits.read(np.arange(1797))
    x = images.reshape(1797, -1).astype(np.float32) + np.random.default_rng(0).normal(0, 90, (1797, 64)).astype(
        np.float32
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x[:1200], labels[:1200])
    ours = linear_accuracy(
        {"train": x[:1200], "test": x[1200:]}, {"train": labels[:1200], "test": labels[1200:]}, 10, torch.device("cpu")
    )
    assert ours == pytest.approx(model.score(x[1200:], labels[1200:]), abs=2 / 597) and 0.5 < ours < 0.95


def test_the_probe_sees_no_label(made, monkeypatch):
    """Accuracy on shuffled labels is chance, whatever the network knows of them."""
    labels = np.random.default_rng(0).integers(0, 10, 1797)
    real = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, indices: (real(self, indices)[0], labels[indices]))
    assert max(diagnose(["probe"], made).values()) < 0.25


def copied(made, features):
    return diagnose(["copying"], replace(made, evaluated=Evaluation({}, features=features.numpy())))


def test_copies_and_new_images(made):
    training, held_out = (images.read(0, 200)[0] for images in (made.training, made.held_out))
    copies = copied(made, made.extractor(torch.from_numpy(training)))
    assert copies["copying/ratio"] < 0.05 and copies["copying/closer"] == 1
    new = copied(made, made.extractor(torch.from_numpy(held_out)))
    assert new["copying/ratio"] == pytest.approx(1, abs=0.1) and new["copying/closer"] < 0.05
    far = copied(made, made.extractor(torch.from_numpy(held_out)) + 100)
    assert far["copying/ratio"] > 5 and far["copying/closer"] == 0


def test_copying_against_each_distance(made):
    samples = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)) + 1
    train, test = (made.extractor(torch.from_numpy(s.read(0, len(s))[0])) for s in (made.training, made.held_out))
    ours, theirs = (((a[:, None] - train[None]) ** 2).sum(2).sqrt().min(1).values.numpy() for a in (samples, test))
    found = copied(made, samples)
    assert found["copying/ratio"] == pytest.approx(np.median(ours) / np.median(theirs), rel=1e-4)
    assert found["copying/closer"] == (ours < np.percentile(theirs, 1)).mean()


def test_denoising_loss_of_a_network_that_puts_out_zero():
    """D = c_skip x: the loss at σ is (σ² q / σ_d² + σ_d²) / (σ² + σ_d²), q = mean x0² (methods.md §12.2)."""
    zero = setting(eval__metrics=("fid",), eval__samples=4)
    for parameter in zero.network.parameters():
        parameter.data.zero_()
    images, _ = zero.held_out.read(0, len(zero.held_out))
    q = float(((images / 127.5 - 1) ** 2).mean())
    data = zero.method.experiment.diffusion.sigma_data**2
    found = diagnose(["denoising"], zero)
    for sigma in DENOISING_SIGMAS:
        expected = (sigma**2 * q / data + data) / (sigma**2 + data)
        assert found[f"denoising/loss_sigma_{sigma:g}"] == pytest.approx(expected, rel=0.02)


def test_seeds_are_evaluations_of_their_own(made):
    found = diagnose(["seeds"], made)
    other = setting(eval__metrics=("fid",), eval__seed=1).evaluated.metrics["eval/fid"]
    both = [made.evaluated.metrics["eval/fid"], other]
    assert found["eval/fid_seeds_mean"] == pytest.approx(np.mean(both), rel=1e-9)
    assert found["eval/fid_seeds_std"] == pytest.approx(np.std(both, ddof=1), rel=1e-6) and both[0] != both[1]


def test_the_network_is_left_as_it_was(made):
    made.network.train()
    diagnose(["denoising"], made)
    assert made.network.training
    made.network.eval()


# ------------------------------------------------------------------------------------------------------ held-out images


def test_held_out_images_are_in_no_batch(digits):
    sampler = BatchSampler(digits, seed=3, batch_size=100, hold_out=0.25)
    assert (len(sampler.training_images()), len(sampler.held_out_images())) == (1348, 449)
    drawn = np.concatenate([sampler.indices(step, 0, 100) for step in range(30)])
    assert sorted(set(drawn)) == sorted(sampler.training_images().indices), "all of the others, and no more"
    assert sorted(drawn[:1348]) == sorted(set(drawn)), "each once in an epoch"
    assert not set(drawn) & set(sampler.held_out_images().indices)


def test_the_same_images_are_held_out_whatever_the_seed(digits):
    samplers = [BatchSampler(digits, seed=seed, batch_size=size, hold_out=0.1) for seed, size in ((0, 5), (9, 77))]
    first, other = (sampler.held_out_images().indices for sampler in samplers)
    assert np.array_equal(first, other) and len(first) == 180
    labels = digits.read(first)[1]
    assert np.bincount(labels, minlength=10).min() > 5, "of every class"


def test_without_them_the_order_is_as_ever(digits):
    plain = BatchSampler(digits, seed=4, batch_size=64)
    assert len(plain.held_out_images()) == 0 and np.array_equal(plain.training_images().indices, np.arange(1797))
    # recorded before data could be held out
    assert plain.indices(7, 0, 5).tolist() == [1058, 1696, 962, 1710, 1011]


def test_another_data_set_is_taken_first(digits):
    sampler = BatchSampler(digits, seed=0, batch_size=8, hold_out=0.5)
    experiment = tiny(data__hold_out=0.5)
    assert len(diagnostics.held_out_images(experiment, sampler)) == 898
    assert len(diagnostics.held_out_images(experiment.replace({"data.test_path": "digits"}), sampler)) == 1797


def test_a_sample_of_a_set_is_fixed_and_mixed(digits):
    images = ImageSet(digits)
    some = images.sample(100)
    assert len(set(some.indices)) == 100 and some.indices.max() > 1500
    assert np.array_equal(some.indices, images.sample(100).indices)
    assert images.sample(5000) is images
