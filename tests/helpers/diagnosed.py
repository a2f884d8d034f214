"""Scores and diagnostics of a network on one worker or several. As a script it is one worker of some:
``python -m torch.distributed.run --nproc-per-node N diagnosed.py OUT``; rank 0 leaves in OUT what it found."""

import json
import sys
from pathlib import Path

import torch
from gloo import worker
from steps import scramble_
from tiny import experiment

from sddit.data import open_manifest
from sddit.data.sampler import BatchSampler
from sddit.data.shards import Shards
from sddit.methods import build_method
from sddit.metrics.check import FINAL
from sddit.metrics.features import get_extractor
from sddit.metrics.protocol import METRICS
from sddit.metrics.reference import of_manifest
from sddit.training import distributed, evaluation
from sddit.training.diagnostics import Setting, diagnose

ALL = tuple(METRICS)


def setting(method_name="sddit", **changes):
    """As at the last step of a training, on the digits, with a network that has learnt nothing."""
    fields = {"eval__metrics": ALL, "eval__final": FINAL, "eval__final_seeds": 2, "data__hold_out": 0.2}
    tiny = experiment(method_name, **(fields | changes))
    manifest, device = open_manifest("digits"), torch.device("cpu")
    method = build_method(tiny, manifest.shape, manifest.num_classes)
    scramble_(method.network)
    extractor = get_extractor("digits-cnn", metrics=ALL)
    real = of_manifest(manifest).load(extractor, ALL) if distributed.rank() == 0 else None
    sampler = BatchSampler(Shards(manifest), seed=0, batch_size=16, hold_out=tiny.data.hold_out)
    method.network.eval()
    evaluated = evaluation.evaluate(method, method.network, extractor, real, device, keep_features=True)
    images = sampler.training_images(), sampler.held_out_images()
    return Setting(method, method.network, extractor, real, *images, device, evaluated)


def everything():
    made = setting()
    return made.evaluated.metrics | diagnose(FINAL, made)


if __name__ == "__main__":
    with worker() as rank:
        found = everything()
        if rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))
