"""Data that a sweep cannot use are named before a device is claimed: when its cells are planned.

Once in a folder and once, the same, on object storage.
"""

import json
import os

import numpy as np
import pytest
from storage import refusing, s3, upload

from sddit.data import subset
from sddit.data.manifest import write_manifest
from sddit.data.shards import write_shard
from sddit.errors import SdditError
from sddit.orchestration.sweep import check_inputs, parse_flags, resolve
from sweeps.mask_ratio import sweep


@pytest.fixture(scope="module")
def client():
    with s3() as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch, tmp_path):
    """Neither labels nor copies of the same data, from another test."""
    monkeypatch.setattr(subset, "_made", {})
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, client):
    """Gives the address of a folder after it is written."""

    def put(folder):
        if request.param == "local":
            return str(folder)
        return upload(client, folder, f"{request.node.name.encode().hex()[-40:]}-{folder.name}")

    return put


def write(folder, labels=tuple(range(10)) * 3, *, side=8, num_classes=10, classes=None):
    folder.mkdir()
    images = np.random.default_rng(side).integers(0, 256, (len(labels), 1, side, side), dtype=np.uint8)
    line = write_shard(images, np.asarray(labels), folder, 0, num_classes=num_classes)
    write_manifest(folder, [line], name="own", shape=images.shape[1:], num_classes=num_classes, classes=classes)
    return folder


def plan(*changes):
    """What a sweep does before it looks at the record."""
    flags = [flag for change in changes for flag in ("--set", change)]
    job = resolve(sweep, parse_flags(sweep, ["--plan", *flags]))
    check_inputs(job)
    return job


def half_written(folder):
    (folder / "manifest.json").unlink()


def torn(folder):
    (folder / "manifest.json").write_text('{"version": 1')


def edited(folder):
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | {"num_classes": 9}))


def cut_short(folder):
    os.truncate(folder / "images-00000.npy", 1000)


def other_labels(folder):
    content = bytearray((folder / "labels-00000.npy").read_bytes())
    content[-8] ^= 1
    (folder / "labels-00000.npy").write_bytes(content)


def other_images(folder):
    content = bytearray((folder / "images-00000.npy").read_bytes())
    content[-1] ^= 1
    (folder / "images-00000.npy").write_bytes(content)


def missing_shard(folder):
    (folder / "images-00000.npy").unlink()


BROKEN = [
    (half_written, "is half-written: it has shards, but no manifest.json"),
    (torn, "manifest.json cannot be read"),
    (edited, "contradicts itself"),
    (cut_short, "images-00000.npy has 1,000 bytes, but 2,048 were written"),
    (missing_shard, "images-00000.npy is missing"),
    (other_labels, "labels-00000.npy has a wrong checksum"),
]


def test_what_is_right_passes(tmp_path, place):
    assert plan(f"data.path={place(write(tmp_path / 'set'))}").cells


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_data_set(tmp_path, place, damage, message):
    folder = write(tmp_path / "set")
    damage(folder)
    with pytest.raises(SdditError, match=message):
        plan(f"data.path={place(folder)}")


def test_other_images(tmp_path):
    """Of a folder, all files are read the first time; of remote data each is, when it is copied (test_remote.py)."""
    folder = write(tmp_path / "set")
    assert plan(f"data.path={folder}").cells
    other_images(folder)
    for _ in range(2):
        with pytest.raises(SdditError, match=r"images-00000.npy has a wrong checksum"):
            plan(f"data.path={folder}")


UNFIT = [
    ({"labels": tuple(range(9)) * 3}, (), "have no image of class 9: samples of it would come from a label"),
    ({"classes": [*"abcdefghi", "a"]}, (), "has the class 'a' twice"),
    ({"side": 9}, (), "patches of 2×2, which do not divide the data"),
    ({}, ("data.shape=[3, 32, 32]",), "are 1 × 8 × 8 .* but this experiment is for 3 × 32 × 32"),
    ({}, ("data.max_images=31",), "data.max_images is 31, but .* has 30 images"),
    ({}, ("data.per_class=4",), "data.per_class is 4, but there are fewer images of class.* Use at most 3"),
    ({}, ("data.per_class=2", "data.max_images=9"), "cannot both be given"),
    ({}, ("data.hold_out=0.001",), "must leave at least one on each side"),
]


@pytest.mark.parametrize(("data", "changes", "message"), UNFIT, ids=lambda value: str(value)[:20])
def test_data_that_do_not_fit(tmp_path, place, data, changes, message):
    with pytest.raises(SdditError, match=message):
        plan(f"data.path={place(write(tmp_path / 'set', **data))}", *changes)


def test_a_reference_of_another_size(tmp_path, place):
    reference = place(write(tmp_path / "reference", side=16))
    with pytest.raises(SdditError, match=r"The images are 8×8 .* but the reference is 16×16"):
        plan(f"data.path={place(write(tmp_path / 'set'))}", f"eval.reference={reference}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "No data set at nowhere"),
        ("s3://bucket/nothing", "No data set at s3://bucket/nothing. No such file"),
        ("s3://wrong/data", "There is no bucket s3://wrong. Correct the name, or make the bucket first"),
        ("s5://bucket/data", "Unknown scheme 's5'"),
    ],
)
def test_a_wrong_place(client, path, message):
    with pytest.raises(SdditError, match=message):
        plan(f"data.path={path}")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "ExpiredToken", "cannot be read: the credentials have expired. Sign in again"),
        (403, "InvalidAccessKeyId", "cannot be read: the credentials are missing or not valid"),
        (403, "AccessDenied", "cannot be read: access is denied. Give this user or this node's role the right"),
    ],
)
def test_storage_that_refuses(client, monkeypatch, status, code, message):
    with refusing(status, code) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(SdditError, match=message):
            plan(f"data.path=s3://bucket/{code}")


def test_storage_that_cannot_be_reached(client, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SdditError, match="cannot be read: the storage cannot be reached"):
        plan("data.path=s3://bucket/unreached")
