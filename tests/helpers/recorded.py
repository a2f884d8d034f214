"""Sweeps as the tracker records them, without training: for tests of what is read from MLflow."""

import json

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from sddit import presets
from sddit.metrics.protocol import Protocol

START = 1_700_000_000_000  # ms; points are recorded at START + step, as the tracker does


class Recorded:
    """A sqlite record under `folder`; `uri` is its address."""

    def __init__(self, folder):
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.sweeps = {}
        self.cells = 0

    def sweep(self, name, *, question="A question?", axes=(), **tags):
        """Opens a sweep: its experiment and parent run. `axes` are the names of its axes, in order."""
        experiment = self.client.create_experiment(name)
        tags = {
            "sddit.kind": "sweep", "sddit.question": question, "sddit.axes": json.dumps(list(axes)),
            "sddit.command": f"python sweeps/{name}.py",
        } | tags  # fmt: skip
        self.sweeps[name] = (experiment, self.client.create_run(experiment, tags=tags, run_name=name).info.run_id)

    def cell(self, sweep, method="sddit", *, seed=0, point=None, changes=None, state="done", steps=600, scores=None,
             images=1797, noise_floor=None, **tags):  # fmt: skip
        """A cell of it; gives its run id.

        `point`: axis name → value. `changes`: fields that differ from the digits preset. `scores`: metric → {step:
        value}, by their MLflow names. `tags` are added under the name `sddit.NAME`.
        """
        experiment_id, parent = self.sweeps[sweep]
        experiment = presets.digits(method=method).replace({"seed": seed, **(changes or {})})
        protocol = Protocol.from_experiment(experiment, "digest-of-the-data", "digest", reference_images=images)
        scores = scores or {}
        reached = max((step for points in scores.values() for step in points), default=0)
        identity = experiment.identity("data")
        known = {
            "identity": identity, "kind": "cell", "state": state, "steps": str(steps), "step": str(reached),
            "protocol": protocol.digest, "protocol.text": protocol.describe(), "code": "0123456789ab",
            "data": experiment.data.path, "reference_images": str(images), "workers": "1",
            **({"noise_floor": json.dumps(noise_floor)} if noise_floor else {}),
        } | tags  # fmt: skip
        run_tags = {"mlflow.parentRunId": parent} | {f"sddit.{k}": v for k, v in known.items()}
        run_tags |= {f"axis.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in (point or {}).items()}
        name = "-".join([*map(str, (point or {}).values()), method, f"s{seed}", identity])
        self.cells += 1
        begun = START + self.cells  # so that one began before the other
        run = self.client.create_run(experiment_id, start_time=begun, tags=run_tags, run_name=name).info.run_id
        params = experiment.digest_fields() | {"data.digest": "digest-of-the-data"}
        self.client.log_batch(
            run, params=[Param(k, v if isinstance(v, str) else json.dumps(v)) for k, v in params.items()]
        )
        self.client.log_batch(
            run,
            [
                Metric(key, value, START + step, step)
                for key, points in scores.items()
                for step, value in points.items()
            ],
        )
        if state in ("done", "pruned"):
            self.client.set_terminated(run)
        elif state == "failed":
            self.client.set_terminated(run, status="FAILED")
        return run
