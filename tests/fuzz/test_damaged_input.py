"""Whatever a file or a flag holds: a result or a message. Never an error that is not a user's, memory without bound,
code from a file, or a file written elsewhere.

Hypothesis damages what was written whole; the same examples each time. `make torture` draws a hundred for each target.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import sqlite3
import warnings
from pathlib import Path

import numpy as np
import official
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latents import write_vae
from pictures import write_source
from recorded import Recorded
from tiny import experiment

import sddit
from analysis import plot_convergence, report, table1
from sddit import presets
from sddit.config import Experiment, flatten, parse_assignment
from sddit.data import open_manifest
from sddit.data.job import Job
from sddit.data.prepare import make_shards
from sddit.data.shards import Shards, write_shards
from sddit.data.vae import Vae
from sddit.describe import describe
from sddit.errors import SdditError, UsageError
from sddit.metrics.features import get_extractor
from sddit.metrics.reference import build_reference, open_reference
from sddit.training.store import CheckpointStore

ROOM = 4 * 2**30  # address space that an example may take beyond what is there
TORTURE = (pytest.mark.slow, pytest.mark.torture, pytest.mark.timeout(1800))
COUNTS = [pytest.param(8, id="some"), pytest.param(100, id="many", marks=TORTURE)]

# ------------------------------------------------------------------------------------------------------------ damage

HOSTILE = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "../../outside", "/outside", "\0", "x" * 5000, [], {},
           [[]], "${jndi:x}", "<script>", "../" * 40 + "etc/passwd"]  # fmt: skip


class Bomb:
    """Who unpickles it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def bombs(name: str) -> bytes:
    """A pickle where a file of this kind might hold one."""
    file, array = io.BytesIO(), np.array([Bomb()], dtype=object)
    if name.endswith(".npy"):
        np.save(file, array)
    elif name.endswith(".npz"):
        np.savez(file, arr_0=array, mu=array, images=array, about=array)
    elif name.endswith((".pt", ".safetensors")):
        torch.save({"model": Bomb()}, file)
    else:
        pickle.dump(Bomb(), file)
    return file.getvalue()


def test_the_bombs_are_live(here):
    """Read with the pickles that nothing here allows: else what damage proves would be nothing."""
    for name, load in (("a.npy", lambda f: np.load(f, allow_pickle=True)), ("a.json", pickle.load),
                       ("a.npz", lambda f: np.load(f, allow_pickle=True)["mu"]),
                       ("a.pt", lambda f: torch.load(f, weights_only=False))):  # fmt: skip
        load(io.BytesIO(bombs(name)))
        Path("unpickled").rmdir()


def paths_in(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from paths_in(each, (*prefix, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def damaged(draw, content: bytes, name: str) -> bytes | None:
    """None: the file is gone."""
    ways = ["gone", "empty", "cut", "flip", "splice", "bomb"] + ["value", "value", "value"] * name.endswith(".json")
    way = draw(st.sampled_from(ways))
    if way == "value":
        value = json.loads(content)
        path = draw(st.sampled_from(list(paths_in(value))))
        return json.dumps(replaced(value, path, draw(st.sampled_from(HOSTILE)))).encode()
    places = st.integers(0, max(len(content) - 1, 0)) | st.integers(0, min(len(content) - 1, 200))  # headers more often
    if way == "gone":
        return None
    if way == "cut":
        return content[: draw(places)]
    if way == "bomb":
        return bombs(name)
    if way == "splice":
        at, cut = draw(places), draw(st.integers(0, 64))
        return content[:at] + draw(st.binary(max_size=64)) + content[at + cut :]
    changed = bytearray(content)
    if way == "empty" or not changed:
        return b""
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(places)] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@contextlib.contextmanager
def bounded():
    """Memory of this process while an example runs: what asks for more fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def survive(act, *arguments):
    """Runs it: an error must be a user's."""
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            act(*arguments)
        except SdditError as error:
            assert str(error) and "Traceback" not in str(error)


# ----------------------------------------------------------------------------------------------------------- targets


def write_data(folder: Path) -> None:
    images, labels = np.zeros((40, 1, 8, 8), np.uint8), np.arange(40) % 4
    images[:] = np.arange(40, dtype=np.uint8)[:, None, None, None]
    write_shards(images, labels, folder, name="pictures", num_classes=4)


def read_data(folder: Path) -> None:
    manifest = open_manifest(folder)
    Shards(manifest).read(np.arange(len(Shards(manifest))))
    manifest.verify()


def write_checkpoint(folder: Path) -> None:
    sddit.train(experiment("dit", train__steps=1), tracking_uri=f"sqlite:///{folder}.db", storage=f"{folder}-runs")
    (made,) = Path(f"{folder}-runs").glob("*/*/step-*")
    shutil.copytree(made, folder / "step-1")


def read_stored(folder: Path) -> None:
    CheckpointStore(folder).latest()


def sample(folder: Path) -> None:
    sddit.sample(folder / "step-1", [0])


def write_export(folder: Path) -> None:
    write_checkpoint(folder)
    sddit.export_weights(folder / "step-1", folder / "out")
    shutil.rmtree(folder / "step-1")


def write_official(folder: Path) -> None:
    torch.save(official.weights("dit", **official.S4), folder / "dit.pt")


def import_from(source: str, file: str):
    def act(folder: Path) -> None:
        out = folder.parent / "imported"
        shutil.rmtree(out, ignore_errors=True)
        sddit.import_weights(folder / file, source, out)

    return act


def write_reference(folder: Path) -> None:
    built = build_reference(open_reference("digits"), get_extractor("digits-cnn", metrics=["fid"]), ["fid"])
    shutil.copy(built["path"], folder / "built.npz")


def write_samples(folder: Path) -> None:
    np.savez(folder / "samples.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8))


def score(folder: Path) -> None:
    sddit.evaluate(np.zeros((20, 8, 8, 1), np.uint8), str(folder / "built.npz"))


def score_samples(folder: Path) -> None:
    sddit.evaluate(folder / "samples.npz", "digits", "digits-cnn")


def read_vae(folder: Path) -> None:
    Vae(str(folder)).encode(np.zeros((1, 3, 16, 16), np.uint8))


def source_of(kind: str):
    def write(folder: Path) -> None:
        shutil.rmtree(folder)
        write_source(kind, folder)

    return write


def prepare(folder: Path) -> None:
    source = folder / "images.npz" if (folder / "images.npz").exists() else folder
    job = Job(str(source), str(folder.parent / "prepared"), max_unreadable=0.9)
    job.run(make_shards)
    read_data(folder.parent / "prepared")


def continue_preparing(folder: Path) -> None:
    """What a killed run left is damaged."""
    Job(str(folder / "source"), str(folder / "out")).run(make_shards)
    read_data(folder / "out")


def begin_preparing(folder: Path) -> None:
    write_source("parquet", folder / "source")
    job = Job(str(folder / "source"), str(folder / "out"))
    job.clean = lambda: None  # as if killed just before
    job.run(make_shards)
    (folder / "out" / "manifest.json").unlink()


TARGETS = {
    "data": (write_data, read_data),
    "checkpoint, resumed": (write_checkpoint, read_stored),
    "checkpoint, sampled": (write_checkpoint, sample),
    "exported weights": (write_export, import_from("sddit", "out")),
    "weights of DiT": (write_official, import_from("dit", "dit.pt")),
    "reference": (write_reference, score),
    "samples": (write_samples, score_samples),
    "autoencoder": (write_vae, read_vae),
    "folder": (source_of("folder"), prepare),
    "parquet": (source_of("parquet"), prepare),
    "webdataset": (source_of("webdataset"), prepare),
    "npz": (source_of("npz"), prepare),
    "begun output": (begin_preparing, continue_preparing),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Current folder and cache of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_a_message(name, count, here, monkeypatch):
    write, act = TARGETS[name]
    whole, damaged_folder = here / "whole", here / "work" / "damaged"
    whole.mkdir()
    write(whole)
    act(shutil.copytree(whole, here / "intact" / "damaged"))  # as it was written, it is read
    (here / "current").mkdir()
    monkeypatch.chdir(here / "current")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())

    @settings(max_examples=count, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        shutil.rmtree(here / "work", ignore_errors=True)
        shutil.copytree(whole, damaged_folder)
        for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
            content = data.draw(damaged((whole / file).read_bytes(), file.name))
            if content is None:
                (damaged_folder / file).unlink()
            else:
                (damaged_folder / file).write_bytes(content)
        survive(act, damaged_folder)
        assert not list(Path.cwd().iterdir()), "nothing is unpickled, nothing written here"
        assert {path.name for path in (here / "work").iterdir()} <= {"damaged", "prepared", "imported"}

    check()


def test_a_checkpoint_names_no_code_that_is_run(here):
    write_checkpoint(here)
    manifest = here / "step-1" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["values"]["experiment"]["eval"]["extractor"] = "somebodys_module:Class"
    manifest.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="names the extractor somebodys_module:Class, which is code outside"):
        sddit.api.diagnose(here / "step-1", ["seeds"])


# ------------------------------------------------------------------------------------------------- settings and flags

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["0", "-1", "1e400", "nan", "inf", "null", "true", "[]", "{}", "[1,2", "'", "S/2", "1" * 400, "../..", "\0", "0.5",
     "1_0", "０", "[[0.1,0.2],[0.3]]", '{"a":1}', "power:1", "power:-1", "module:Class", "os:system", "9" * 20]
)  # fmt: skip


VALUES = TEXTS | st.floats().map(str) | st.integers().map(str)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("method", ["dit", "maskdit", "mdt", "sddit"])
def test_any_setting_is_taken_or_refused(method, count):
    base = presets.digits(method=method)
    names = sorted(flatten(base.model_dump()))

    @settings(max_examples=10 * count, derandomize=True, database=None)
    @given(st.lists(st.tuples(st.sampled_from(names) | TEXTS, VALUES), min_size=1, max_size=3))
    def check(assignments):
        def act():
            changes = dict(parse_assignment(f"{name}={value}") for name, value in assignments)
            changed = base.replace(changes)
            again = Experiment.parse(json.loads(json.dumps(changed.model_dump())))
            assert again == changed and again.identity("data") == changed.identity("data")
            describe("digits", "S/2", method, changes, (1, 8, 8), 10)

        survive(act)

    check()


# ------------------------------------------------------------------------------------------------------- the record


def record_of(folder: Path) -> None:
    recorded = Recorded(folder)
    recorded.sweep("convergence", axes=["system"])
    for method in ("dit", "sddit"):
        for seed in range(2):
            recorded.cell("convergence", method, seed=seed, point={"system": method}, images=1797,
                          scores={"eval/fid": {200: 90.0, 400: 60.0 + seed, 600: 40.0}})  # fmt: skip


DRAWN = (plot_convergence.figure, table1.figure, report.report)


@pytest.mark.parametrize("count", COUNTS)
def test_a_record_with_anything_in_it_is_drawn_or_refused(count, here, monkeypatch):
    record_of(here)
    whole = here / "mlflow.db"
    with contextlib.closing(sqlite3.connect(whole)) as db:
        db.execute("PRAGMA journal_mode=DELETE")
        cells = [(table, rowid, column)
                 for table, column in (("tags", "value"), ("params", "value"), ("metrics", "value"), ("runs", "status"),
                                       ("experiments", "name"), ("tags", "key"), ("metrics", "step"))
                 for (rowid,) in db.execute(f"SELECT rowid FROM {table}")]  # fmt: skip
    for draw in DRAWN:
        assert draw("convergence", tracking_uri=f"sqlite:///{whole}", out=here / "figures"), "as it was written"
    numbers = itertools.count()

    @settings(max_examples=count, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        folder = here / f"work-{next(numbers)}"  # MLflow keeps a database open, and we what was read of it
        folder.mkdir()
        monkeypatch.setenv("SDDIT_CACHE", str(folder / "cache"))
        path = folder / "mlflow.db"
        shutil.copy(whole, path)
        if data.draw(st.booleans()):
            path.write_bytes(data.draw(damaged(whole.read_bytes(), "mlflow.db")) or b"")
        else:
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                for table, rowid, column in data.draw(st.lists(st.sampled_from(cells), min_size=1, max_size=3)):
                    value = data.draw(st.sampled_from([json.dumps(each) for each in HOSTILE]) | TEXTS)
                    with contextlib.suppress(sqlite3.Error):  # a constraint of the database
                        db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rowid))
        for draw in DRAWN:
            survive(draw, "convergence", f"sqlite:///{path}", folder)

    check()
