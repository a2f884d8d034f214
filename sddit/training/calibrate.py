"""``python -m sddit.training.calibrate``: times a few steps and samples of each experiment given on standard input.

Takes a JSON list, and prints seconds per FLOP of training and of sampling of each as one, for `sddit.cost.Speed`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict

import numpy as np
import torch

from sddit import cost
from sddit.config import Experiment
from sddit.data import open_manifest
from sddit.data.sampler import BatchSampler
from sddit.data.shards import Shards
from sddit.data.vae import decoder_of
from sddit.methods import build_method
from sddit.metrics import features
from sddit.metrics.reference import Gaussian, Reference
from sddit.tracking import NullRecord
from sddit.training import loop
from sddit.training.store import CheckpointStore

WARM_UP, STEPS, SAMPLES = 3, 20, 128


def measure(experiment: Experiment, device: torch.device) -> cost.Speed:
    """The speed of one worker on `device`: a short run of the loop itself, after a shorter one to warm up."""
    torch.set_num_threads(experiment.resources.cpus_per_worker)
    manifest = open_manifest(experiment.data.path)
    extractor = features.get_extractor(experiment.eval.extractor, device)
    # The data's own statistics may take minutes, once; the time of a distance does not depend on them.
    anything = Reference("", None, Gaussian(np.zeros(extractor.dim), np.eye(extractor.dim)))
    clocks = None
    for steps in (WARM_UP, STEPS):
        short = experiment.replace(
            {
                "resources.workers": 1,
                "train.steps": steps,
                "eval.every": steps,
                "eval.samples": min(SAMPLES, experiment.eval.samples),
                "eval.grid": 1,
                "eval.metrics": ("fid",),
                "eval.final": (),
            }
        )
        method = build_method(short, manifest.shape, manifest.num_classes)
        method.decode = decoder_of(manifest.vae, short.data.vae, device)
        with tempfile.TemporaryDirectory() as folder:
            result = loop.train(
                short,
                method,
                BatchSampler.of(short, Shards(manifest)),
                store=CheckpointStore(folder),
                reporter=NullRecord(lambda step, metrics: None),
                extractor=extractor,
                reference=lambda: anything,
                device=device,
            )
        clocks = result.clocks
    assert clocks is not None
    trained = STEPS * short.train.batch_size * cost.training_flops_per_image(short, manifest.shape)
    sampled = short.eval.samples * cost.sampling_flops_per_image(short, manifest.shape)
    return cost.Speed(clocks.train_seconds / trained, clocks.eval_seconds / sampled)


if __name__ == "__main__":
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps([asdict(measure(Experiment.parse(each), where)) for each in json.load(sys.stdin)]))
