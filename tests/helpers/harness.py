"""The training loop in this process, with a reporter that keeps what it is told."""

import itertools

import torch

from sddit.data import open_manifest
from sddit.data.sampler import BatchSampler
from sddit.data.shards import Shards
from sddit.methods import build_method
from sddit.metrics import features
from sddit.metrics.reference import of_manifest
from sddit.training import diagnostics, loop
from sddit.training.store import CheckpointStore


class Memory:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.recorded, self.grids, self.tags, self.evaluations = {}, {}, {}, []

    def points(self, step, metrics):
        for key, value in metrics.items():
            assert (step, key) not in self.recorded, "a point twice in one start"
            self.recorded[step, key] = value

    def grid(self, step, image):
        self.grids[step] = image

    def tag(self, name, value):
        self.tags[name] = value

    def pending(self):
        return [["points", 1, {"waiting": 1.0}]]

    def restore(self, pending):
        assert pending == [["points", 1, {"waiting": 1.0}]]

    def evaluated(self, step, metrics):
        self.evaluations.append((step, metrics))


def run(experiment, folder, stop_at=None, memory=None):
    """Trains an experiment in this process; stops softly after step `stop_at`."""
    manifest = open_manifest(experiment.data.path)
    metrics = diagnostics.metrics_of(experiment)
    extractor = features.get_extractor(experiment.eval.extractor, "cpu", metrics)
    sampler = BatchSampler.of(experiment, Shards(manifest))
    memory = memory or Memory()
    reached = max((c.step for c in CheckpointStore(folder).checkpoints()), default=0)
    steps = itertools.count(reached + 1)
    result = loop.train(
        experiment,
        build_method(experiment, manifest.shape, manifest.num_classes),
        sampler,
        store=CheckpointStore(folder),
        reporter=memory,
        extractor=extractor,
        reference=lambda: of_manifest(manifest).load(extractor, metrics),
        device=torch.device("cpu"),
        held_out=diagnostics.held_out_images(experiment, sampler),
        should_stop=lambda: next(steps) == stop_at,
    )
    return result, memory
