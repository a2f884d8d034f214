"""Data on object storage: read through verified copies, one per node, in a bounded cache."""

import json
import logging
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from storage import BUCKET, s3, upload

from sddit.data import open_manifest, remote
from sddit.data.shards import Shards, write_shards
from sddit.errors import DataError, StorageError

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8), np.arange(60) % 5
SIZE = 128 + 10 * 64  # of a shard's images on disk
ORDER = np.random.default_rng(1).permutation(60)


@pytest.fixture(scope="module")
def client():
    with s3() as client:
        yield client


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))
    remote.warn_if_too_small.cache_clear()
    return tmp_path / "cache" / "shards"


@pytest.fixture
def uri(client, cache, tmp_path, request):
    """A data set of six shards under a name of its own; what a process remembers for a while is of no other test."""
    write_shards(IMAGES, LABELS, tmp_path / "set", name="synthetic", num_classes=5, shard_size=10)
    return upload(client, tmp_path / "set", re.sub(r"\W", "_", request.node.name))


@pytest.fixture
def requests():
    """The requests that the storage answers, as in 'GET /bucket/name/images-00000.npy'."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(re.findall(r"[A-Z]+ /[^ ?]*", record.getMessage()))
    logger = logging.getLogger("werkzeug")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def copies(cache):
    return sorted(path.name for path in cache.glob("*/*.npy"))


def reads_right(shards, indices=ORDER):
    images, labels = shards.read(indices)
    return np.array_equal(images, IMAGES[indices]) and np.array_equal(labels, LABELS[indices])


def test_read_through_copies(uri, cache, tmp_path, requests):
    manifest = open_manifest(uri + "/")
    assert manifest.folder == uri and manifest.digest == open_manifest(tmp_path / "set").digest
    assert not cache.exists(), "nothing is copied before it is read"
    shards = Shards(manifest)
    assert reads_right(shards, np.array([3, 14]))
    assert copies(cache) == [f"{kind}-0000{i}.npy" for kind in ("images", "labels") for i in (0, 1)]
    assert {path.parent.name for path in cache.glob("*/*.npy")} == {manifest.digest}
    assert reads_right(shards)
    requests.clear()
    assert reads_right(shards) and reads_right(Shards(manifest))
    assert requests == [], "what is here is not asked for again"
    manifest.verify()


def test_a_plan_asks_once(uri, requests):
    for _ in range(5):
        open_manifest(uri)
    assert len([line for line in requests if line.endswith("manifest.json")]) <= 2  # the folder, and its file


def test_labels_come_without_images(uri, cache):
    assert np.array_equal(Shards(open_manifest(uri)).labels(), LABELS)
    assert copies(cache) == [f"labels-0000{i}.npy" for i in range(6)]


def test_one_copy_among_processes(uri, requests, cache):
    code = f"""
import numpy as np
from sddit.data import open_manifest
from sddit.data.shards import Shards
manifest = open_manifest("{uri}")
print("ready", flush=True)
input()
print(Shards(manifest).read(np.arange(60))[0].astype(int).sum())
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    requests.clear()
    for process in processes:  # now all at once
        process.stdin.write("\n")
        process.stdin.flush()
    assert [int(process.communicate()[0]) for process in processes] == 3 * [IMAGES.astype(int).sum()]
    copied = sorted(line for line in requests if line.startswith("GET") and line.endswith(".npy"))
    names = [f"{kind}-0000{i}.npy" for kind in ("images", "labels") for i in range(6)]
    assert copied == [f"GET /{uri.removeprefix('s3://')}/{name}" for name in names] and copies(cache) == names


def test_a_changed_copy_is_made_anew(uri, cache, caplog):
    manifest = open_manifest(uri)
    assert reads_right(Shards(manifest))
    [path] = cache.glob("*/images-00002.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    os.truncate(cache / manifest.digest / "images-00003.npy", 0)
    assert reads_right(Shards(manifest))
    assert "images-00002.npy is not what was copied, so it is copied anew" in caplog.text
    assert path.read_bytes() != content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]), "images-00001.npy has a wrong checksum"),
        (lambda whole: b"\0" * len(whole), "images-00001.npy is not a .npy file of numbers"),
        (lambda whole: whole[:-7], f"images-00001.npy has {SIZE - 7} bytes, but {SIZE} were written"),
        (lambda whole: None, "images-00001.npy is no longer there"),
    ],
)
def test_a_wrong_file_is_named_and_never_used(client, uri, cache, content, message):
    manifest = open_manifest(uri)
    key = uri.removeprefix(f"s3://{BUCKET}/") + "/images-00001.npy"
    wrong = content(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    client.delete_object(Bucket=BUCKET, Key=key) if wrong is None else client.put_object(
        Bucket=BUCKET, Key=key, Body=wrong
    )
    shards = Shards(manifest)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{uri}/{message}.*again"):
            shards.read(np.array([15]))
    assert "images-00001.npy" not in copies(cache) and not list(cache.glob("*/.*.npy"))
    assert reads_right(shards, np.arange(10))
    with pytest.raises(DataError, match=message):
        manifest.verify()


def test_what_a_killed_process_left_is_written_over(uri, cache):
    manifest = open_manifest(uri)
    (cache / manifest.digest).mkdir(parents=True)
    (cache / manifest.digest / ".images-00000.npy").write_bytes(b"torn" * 1000)
    assert reads_right(Shards(manifest))
    assert not list(cache.glob("*/.*.npy"))


def test_a_cache_smaller_than_the_data(uri, cache, monkeypatch, caplog):
    limit = 3 * SIZE + 2 * 208  # three shards of images, and some labels
    monkeypatch.setenv("SDDIT_CACHE_GB", f"{limit / 1e9:.9f}")
    shards = Shards(open_manifest(uri))
    assert "shards will be copied again and again" in caplog.text and "Raise SDDIT_CACHE_GB" in caplog.text
    rng = np.random.default_rng(2)
    for _ in range(10):
        assert reads_right(shards, rng.integers(0, 60, 7))
        assert sum(path.stat().st_size for path in cache.glob("*/*.npy")) <= limit
        assert len(shards._opened) <= 3, "what has left is not kept on the disk by a map"


def test_what_was_used_longest_ago_leaves_first(uri, client, tmp_path, cache, monkeypatch):
    first = open_manifest(uri)
    shards = Shards(first)
    for i in (0, 1, 2):
        assert reads_right(shards, np.array([10 * i]))
    assert reads_right(Shards(first), np.array([0]))  # used again, so shard 1 is the oldest
    held = shards._opened[1]
    used = sum(path.stat().st_size for path in cache.glob("*/*.npy"))
    monkeypatch.setenv("SDDIT_CACHE_GB", f"{used / 1e9:.9f}")
    write_shards(IMAGES[::-1], LABELS, tmp_path / "other", name="other", num_classes=5, shard_size=10)
    other = open_manifest(upload(client, tmp_path / "other", "other"))
    Shards(other).read(np.array([0]))
    assert copies(cache).count("images-00001.npy") == 0 and copies(cache).count("images-00000.npy") == 2
    assert np.array_equal(held.images, IMAGES[10:20]), "who has it mapped reads on"


def test_a_data_set_that_has_left_takes_its_folder_with_it(uri, cache, monkeypatch):
    manifest = open_manifest(uri)
    assert reads_right(Shards(manifest))
    monkeypatch.setenv("SDDIT_CACHE_GB", "1e-9")
    remote.make_room(0)
    assert [path.name for path in cache.iterdir()] == [".locks"]


@pytest.mark.parametrize("text", ["0", "-1", "much"])
def test_a_limit_that_is_none(uri, monkeypatch, text):
    monkeypatch.setenv("SDDIT_CACHE_GB", text)
    with pytest.raises(DataError, match=f"SDDIT_CACHE_GB is '{text}', but must be a number of gigabytes above 0"):
        Shards(open_manifest(uri)).read(np.array([0]))


def test_without_a_limit_a_tenth_of_the_disk_is_left(uri, cache):
    cache.mkdir(parents=True)
    free, total = (lambda disk: (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize))(os.statvfs(cache))
    assert abs(remote.limit_bytes() - (free - total // 10)) < 1e9  # others write, too


def test_a_cache_that_cannot_be_written(uri, cache):
    cache.parent.mkdir()
    cache.write_text("in the way")
    with pytest.raises(DataError, match=r"Cannot (copy|write).* Set SDDIT_CACHE to a folder"):
        Shards(open_manifest(uri)).read(np.array([0]))


@pytest.mark.slow
def test_an_outage_in_the_middle(uri, client, monkeypatch, caplog):
    """The storage goes away while shards are copied and comes back: training waits, and reads what it should."""
    address = os.environ["AWS_ENDPOINT_URL"]
    shards = Shards(open_manifest(uri))
    assert reads_right(shards, np.array([0]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    back = threading.Timer(3.0, lambda: os.environ.update(AWS_ENDPOINT_URL=address))
    back.start()
    assert reads_right(shards)
    back.join()
    assert re.search(r"Copying .*npy: .*trying again for \d+ s more", caplog.text)


def test_storage_that_stays_away(uri, monkeypatch):
    """No fault of the data: the next command goes on."""
    shards = Shards(open_manifest(uri))
    monkeypatch.setattr("sddit.filesystem.PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=rf"Cannot read {uri}/images-00000.npy: the storage cannot be reached"):
        shards.read(np.array([0]))


def test_any_fsspec_storage(tmp_path, cache):
    import fsspec

    write_shards(IMAGES, LABELS, tmp_path / "set", name="synthetic", num_classes=5, shard_size=10)
    fsspec.filesystem("memory").put(f"{tmp_path}/set/", "/data/", recursive=True)
    assert reads_right(Shards(open_manifest("memory://data")))


def test_the_address_of_a_local_folder_is_not_copied(tmp_path, cache):
    write_shards(IMAGES, LABELS, tmp_path / "set", name="synthetic", num_classes=5)
    manifest = open_manifest((tmp_path / "set").as_uri())
    assert manifest.folder == tmp_path / "set" and reads_right(Shards(manifest)) and not cache.exists()


def edit(client, uri, **changes):
    key = uri.removeprefix(f"s3://{BUCKET}/") + "/manifest.json"
    values = json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(values | changes).encode())


def delete(client, uri, name):
    client.delete_object(Bucket=BUCKET, Key=uri.removeprefix(f"s3://{BUCKET}/") + f"/{name}")


def put(client, uri, name, content):
    client.put_object(Bucket=BUCKET, Key=uri.removeprefix(f"s3://{BUCKET}/") + f"/{name}", Body=content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, u: delete(c, u, "manifest.json"), "is half-written: it has shards, but no manifest.json"),
        (lambda c, u: put(c, u, "manifest.json", b'{"version": 1'), "manifest.json cannot be read"),
        (lambda c, u: put(c, u, "manifest.json", b"[]"), "is not a manifest"),
        (lambda c, u: edit(c, u, version=2), "is of version 2, but this sddit reads version 1"),
        (lambda c, u: edit(c, u, count=61), "contradicts itself"),
        (lambda c, u: delete(c, u, "images-00004.npy"), "images-00004.npy is missing"),
        (lambda c, u: put(c, u, "labels-00004.npy", b"short"), "labels-00004.npy has 5 bytes, but 208 were written"),
    ],
)
def test_a_broken_data_set_is_named_when_it_is_opened(client, uri, damage, message):
    damage(client, uri)
    with pytest.raises(DataError, match=f"{uri}.*{message}"):
        open_manifest(uri)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            f"s3://{BUCKET}/nothing",
            "No data set at s3://bucket/nothing. .* sddit prepare <images> --out s3://bucket/no",
        ),
        ("s3://wrong/data", "No data set at s3://wrong/data. There is no bucket s3://wrong. Correct the name"),
        ("s4://bucket/data", "Unknown scheme 's4'"),
    ],
)
def test_a_wrong_address(client, path, message):
    with pytest.raises(Exception, match=message):
        open_manifest(path)


def test_a_file_instead_of_a_folder(uri):
    with pytest.raises(DataError, match="is a file, but a data set is a folder"):
        open_manifest(f"{uri}/manifest.json")
