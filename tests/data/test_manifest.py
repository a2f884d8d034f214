import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sddit import data
from sddit.data import open_manifest
from sddit.data.shards import Shards, write_shards
from sddit.errors import DataError


def _write(folder: Path, n: int = 23, shard_size: int = 10, seed: int = 0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, 4, 5), dtype=np.uint8)
    return write_shards(images, np.arange(n) % 7, folder, name="synthetic", num_classes=7, shard_size=shard_size)


def _edit(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_written_folder_opens_as_it_was_written(tmp_path):
    written = _write(tmp_path / "set")
    opened = open_manifest(str(tmp_path / "set"))
    assert opened == written
    assert (opened.count, opened.shape, opened.num_classes, len(opened.shards)) == (23, (3, 4, 5), 7, 3)
    opened.verify()


def test_digest_stands_for_the_content_alone(tmp_path):
    here, there = _write(tmp_path / "here"), _write(tmp_path / "there")
    assert here.digest == there.digest
    assert here.digest != _write(tmp_path / "other", seed=1).digest
    (tmp_path / "here").rename(tmp_path / "moved")
    _edit(tmp_path / "moved", name="renamed")
    assert open_manifest(tmp_path / "moved").digest == here.digest


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    manifest = open_manifest("digits")
    assert (manifest.count, manifest.shape, manifest.num_classes) == (1797, (1, 8, 8), 10)
    images, labels = Shards(manifest).read(np.arange(1797))
    expected = load_digits()
    assert np.array_equal(labels, expected.target)
    assert np.array_equal(np.rint(images[:, 0] * (16 / 255)), expected.images)
    manifest.verify()


def test_digest_of_digits_is_pinned():
    # Part of the identity of every cell trained on them: another digest would have finished cells run again.
    assert open_manifest("digits").digest == "8d163955de1bf7e38b10ddf3b24a835541f5f4b162968422dae71d3cafc3fb2c"


def test_data_are_free_of_torch_and_opening_of_scikit_learn():
    open_manifest("digits")
    code = """
import sys
from sddit.data import open_manifest, shards, sampler
open_manifest("digits")
assert not {"torch", "sklearn"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_processes_materialise_at_once(tmp_path):
    code = "from sddit.data import open_manifest; m = open_manifest('digits'); m.verify(); print(m.digest)"
    environment = os.environ | {"SDDIT_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert digests[0] == digests[1]
    assert os.listdir(tmp_path / "data") == ["digits"]


def test_the_slower_of_two_writers_takes_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path))
    calls = []

    def write(folder):
        calls.append(folder)
        if len(calls) == 1:
            open_manifest("twin")  # another writer, done first
        return _write(folder)

    monkeypatch.setitem(data.DATASETS, "twin", write)
    assert open_manifest("twin").count == 23
    assert len(calls) == 2
    assert os.listdir(tmp_path / "data") == ["twin"]


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path))

    def write(folder):
        _write(folder)
        raise KeyboardInterrupt

    monkeypatch.setitem(data.DATASETS, "torn", write)
    with pytest.raises(KeyboardInterrupt):
        open_manifest("torn")
    assert os.listdir(tmp_path / "data") == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"Cannot write the data set 'digits' .* Set SDDIT_CACHE to a folder"):
        open_manifest("digits")


def test_a_broken_built_in_set_says_how_to_get_it_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path))
    folder = open_manifest("digits").folder
    (folder / "images-00000.npy").unlink()
    with pytest.raises(DataError, match=r"images-00000.npy is missing.* Delete .*: it is made anew"):
        open_manifest("digits")


def test_missing(tmp_path):
    with pytest.raises(DataError, match=r"No data set at digit. Did you mean 'digits'\? .* sddit prepare"):
        open_manifest("digit")
    with pytest.raises(DataError, match=r"No data set at .*nowhere. .* sddit prepare <images> --out .*nowhere"):
        open_manifest(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file, but a data set is a folder"):
        open_manifest(tmp_path / "file")


def test_a_folder_without_a_manifest(tmp_path):
    (tmp_path / "photo.png").write_text("")
    with pytest.raises(DataError, match=r"is not a data set: it has no manifest.json. For images: sddit prepare"):
        open_manifest(tmp_path)


def test_half_written(tmp_path):
    _write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"is half-written: it has shards, but no manifest.json.* prepare it again"):
        open_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", '{"version": 1', "[]"])
def test_a_torn_manifest(tmp_path, text):
    _write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest.json (cannot be read|is not a manifest)"):
        open_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "is of version 2, but this sddit reads version 1"),
        ({"count": 24}, "contradicts itself"),
        ({"num_classes": 8}, "contradicts itself"),
        ({"shape": [3, 4]}, "shape"),
        ({"dtype": "float32"}, "dtype: Input should be 'uint8'"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ],
)
def test_a_manifest_that_does_not_fit(tmp_path, changes, message):
    _write(tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        open_manifest(tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    _write(tmp_path)
    shards = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    shards[0]["images"]["file"] = "../images-00000.npy"
    _edit(tmp_path, shards=shards)
    with pytest.raises(DataError, match="String should match pattern"):
        open_manifest(tmp_path)


@pytest.mark.parametrize("name", ["images-00001.npy", "labels-00002.npy"])
def test_a_missing_shard(tmp_path, name):
    _write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing: no such file"):
        open_manifest(tmp_path)


def test_a_shard_cut_short(tmp_path):
    _write(tmp_path)
    with open(tmp_path / "images-00001.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(DataError, match=r"images-00001.npy has 500 bytes, but 728 were written"):
        open_manifest(tmp_path)


def test_verified_once_and_again_when_a_file_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))
    manifest = _write(tmp_path / "set")
    verified = []
    monkeypatch.setattr(data.Manifest, "verify", lambda self: verified.append(self.folder))
    manifest.verify_once()
    manifest.verify_once()
    assert len(verified) == 1
    os.utime(tmp_path / "set" / "images-00001.npy", (1, 1))
    manifest.verify_once()
    assert len(verified) == 2


@pytest.mark.parametrize("name", ["images-00001.npy", "labels-00000.npy"])
def test_a_flipped_bit_is_found_by_verify_alone(tmp_path, name):
    _write(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    manifest = open_manifest(tmp_path)  # sizes are right
    with pytest.raises(DataError, match=f"{name} has a wrong checksum"):
        manifest.verify()
