"""Checkpoints: whole or not at all, verified, never unpickled, kept and slimmed as said."""

import json
import pickle

import pytest
import torch

from sddit.errors import CheckpointError, SupersededError
from sddit.training.store import SAMPLING, TRAINING, CheckpointStore, read_checkpoint

GROUPS = {SAMPLING: {"w": torch.arange(6.0).reshape(2, 3)}, TRAINING: {"m/w": torch.ones(3), "step": torch.tensor(4.0)}}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "runs" / "cell")


def save(store, step, **values):
    return store.save(step, GROUPS, {"step_was": step, **values})


def test_what_is_saved_comes_back(store):
    uri = save(store, 7, note="µ", none=None)
    checkpoint, groups = store.latest()
    tensors = groups[TRAINING]
    assert (checkpoint.uri, checkpoint.step) == (uri, 7)
    assert checkpoint.values == {"step_was": 7, "note": "µ", "none": None}
    assert torch.equal(tensors["m/w"], GROUPS[TRAINING]["m/w"]) and tensors["step"].shape == ()
    assert torch.equal(read_checkpoint(uri).load(SAMPLING)["w"], GROUPS[SAMPLING]["w"])


def test_two_are_kept(store):
    for step in (5, 10, 15):
        save(store, step)
    assert [c.step for c in store.checkpoints()] == [15, 10]
    store.prune(keep=1)
    assert [c.step for c in store.checkpoints()] == [15]


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def damage_remove(path):
    path.unlink()


def damage_pickle(path):
    path.write_bytes(pickle.dumps({"step": 1}))


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_pickle])
@pytest.mark.parametrize("file", ["training.safetensors", "sampling.safetensors", "manifest.json"])
def test_a_corrupt_checkpoint_is_named_and_the_previous_one_used(store, caplog, damage, file):
    save(store, 5)
    save(store, 10)
    damage(store_path(store) / "step-00000010" / file)
    checkpoint, _ = store.latest()
    assert checkpoint.step == 5
    assert "step-00000010" in caplog.text


def test_with_none_left_the_cell_starts_again(store, caplog):
    save(store, 5)
    save(store, 10)
    for step in (5, 10):
        damage_flip(store_path(store) / f"step-{step:08d}" / "training.safetensors")
    assert store.latest() is None
    assert "step-00000010" in caplog.text and "step-00000005" in caplog.text


def test_storage_that_cannot_be_read_is_no_reason_to_start_again(store):
    save(store, 5)
    file = store_path(store) / "step-00000005" / "training.safetensors"
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"Cannot read .*step-00000005.*Run again"):
        store.latest()


def test_torn_writes_are_not_checkpoints(store):
    save(store, 5)
    torn = store_path(store) / "step-00000010"
    torn.mkdir()
    (torn / "training.safetensors").write_bytes(b"half")
    assert store.latest()[0].step == 5
    save(store, 10)
    assert store.latest()[0].step == 10


def test_slimming_keeps_what_sampling_needs(store):
    uri = save(store, 5)
    before = store.total_bytes()
    assert store.slim() > 0 and store.total_bytes() < before
    assert torch.equal(read_checkpoint(uri).load(SAMPLING)["w"], GROUPS[SAMPLING]["w"])
    with pytest.raises(CheckpointError, match="slimmed"):
        store.latest()
    assert store.slim() == 0


def test_a_fence_stops_the_writing(tmp_path):
    def fence():
        raise SupersededError("taken over")

    store = CheckpointStore(tmp_path, fence=fence)
    with pytest.raises(SupersededError):
        save(store, 5)
    assert store.checkpoints() == []


def test_unwritable_storage_is_said_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Cannot write checkpoints to .*--storage"):
        CheckpointStore(tmp_path / "file" / "cell").check_writable()
    store = CheckpointStore(tmp_path / "new")
    store.check_writable()
    assert list((tmp_path / "new").iterdir()) == []


def test_uris_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(CheckpointStore("here"), 1)
    save(CheckpointStore((tmp_path / "there").as_uri()), 2)
    assert (tmp_path / "here" / "step-00000001" / "manifest.json").exists()
    assert json.loads((tmp_path / "there" / "step-00000002" / "manifest.json").read_text())["step"] == 2
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        read_checkpoint(tmp_path / "nowhere")


def store_path(store):
    from pathlib import Path

    return Path(store.path)
