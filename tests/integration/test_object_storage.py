"""Everything on object storage and a tracking server: prepare, train, go on, look at it.

The cluster's processes do not see the folder in which the commands run, nor its cache: no file system is shared.
"""

import csv
import io

import numpy as np
import pytest
from commands import MASK_RATIO, ROOT, Running, no_traceback, run
from nodes import Nodes
from servers import MlflowServer
from storage import BUCKET, s3
from tiny import set_flags
from written import assert_once

import sddit
from sddit import results
from sddit.data import open_manifest
from sddit.data.shards import Shards

pytestmark = pytest.mark.slow

PLACE = f"s3://{BUCKET}"
EVERY, STEPS = 40, 120


@pytest.fixture(scope="module")
def storage():
    with s3() as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("driver")


@pytest.fixture(scope="module")
def cluster(storage, folder):
    """Its nodes find keys in their own environment, where `ray start` was given them."""
    nodes = Nodes(1, 1, hide=folder)
    (folder / "tmp").mkdir()
    yield nodes.environment | {"SDDIT_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    nodes.close()


@pytest.fixture(scope="module")
def server(storage, tmp_path_factory):
    with MlflowServer(tmp_path_factory.mktemp("server"), f"{PLACE}/artifacts") as server:
        yield server


def keys(client, prefix):
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def test_prepare_train_go_on_and_analyse(storage, server, cluster, folder):
    digits = open_manifest("digits")
    images, labels = Shards(digits).read(np.arange(digits.count))
    archive = io.BytesIO()
    np.savez(archive, images=np.moveaxis(images, 1, -1), labels=labels)
    storage.put_object(Bucket=BUCKET, Key="raw/digits.npz", Body=archive.getvalue())

    source, data = f"{PLACE}/raw/digits.npz", f"{PLACE}/data"
    prepared = run("-m", "sddit", "prepare", source, "--out", data, "--channels", "1", cwd=folder, **cluster)
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert "data/manifest.json" in keys(storage, "data/")

    tiny = {"eval__every": EVERY, "train__log_every": 5, "eval__samples": 200, "method__mask_ratio": "[0.2, 0.5]"}
    place = ["--storage", f"{PLACE}/runs", "--tracking-uri", server.uri]
    flags = [*set_flags(**tiny, data__path=data), *place]
    killed = Running(MASK_RATIO, *flags, "--steps", STEPS, cwd=folder, **cluster)
    killed.wait_for_step(EVERY)
    killed.kill()
    done = run(MASK_RATIO, *flags, "--steps", STEPS, cwd=folder, **cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    no_traceback(done)
    cells = assert_once(server.database, "mask_ratio", server.uri, every=EVERY, steps=STEPS)
    assert any(int(tags.get("sddit.continued_from", 0)) >= EVERY for tags in cells["tags"]), "it went on"
    for identity in cells.index:
        stored = keys(storage, f"runs/mask_ratio/{identity}/")
        assert {key.split("/")[3] for key in stored if key.endswith("manifest.json")} == {f"step-{STEPS:08d}"}
    grids = [key for key in keys(storage, "artifacts/") if "samples~grid" in key and key.endswith(".png")]
    assert len(grids) == len(set(grids)) == 2 * (STEPS // EVERY + 1), "each grid once, step 0 included"
    assert not any((folder / name).exists() for name in ("runs", "mlruns", "mlflow.db"))

    drawn = run(ROOT / "analysis" / "plot_mask_ratio.py", "--tracking-uri", server.uri, "--out", "drawn", cwd=folder)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    with open(folder / "drawn" / "mask_ratio.csv") as file:
        assert len(list(csv.DictReader(file))) >= 2
    checkpoint = f"{PLACE}/runs/mask_ratio/{cells.index[0]}/step-{STEPS:08d}"
    assert sddit.sample(checkpoint, classes=[1, 2]).shape == (2, 8, 8, 1)

    longer = [*flags, "--set", "method.mask_ratio=[0.5]", "--steps", STEPS + EVERY, "--workers", "2"]
    done = run(MASK_RATIO, *longer, cwd=folder, **cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(results.load_cells("mask_ratio", server.uri)["step"]) == [STEPS, STEPS + EVERY]
