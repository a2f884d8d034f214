"""Preparing data: every kind of source gives the same data set, kills and bad input included. Without Ray."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import no_traceback, run
from pictures import CLASSES, KINDS, contents, encoded, images_of, write_parquet, write_source, write_tar
from PIL import Image
from storage import BUCKET, s3

from sddit.data import job as jobs
from sddit.data import open_manifest
from sddit.data.job import Job
from sddit.data.prepare import center_crop, decode, make_shards
from sddit.data.shards import Shards
from sddit.data.sources import expand_braces, index_source, list_source
from sddit.errors import DataError, SdditError, StorageError, UsageError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(jobs, "SHARD_IMAGES", 8)


@pytest.fixture(scope="module")
def client():
    with s3() as client:
        yield client


def put(client, path: Path, prefix: str) -> str:
    """Copies a source into the bucket."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(path.parent)}")
    return f"s3://{BUCKET}/{prefix}/{path.name}"


def prepare(source, out, **options):
    job = Job(str(source), str(out), **options)
    return job.run(make_shards)


def refused(source, out, kind=SdditError, **options):
    """The message with which a job is refused; nothing is written by it."""
    with pytest.raises(kind) as caught:
        Job(str(source), str(out), **options)
    assert not Path(out).exists() or not (Path(out) / "images-00000.npy").exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_data(kind, tmp_path):
    images, labels = images_of(20)
    made = prepare(write_source(kind, tmp_path / kind), tmp_path / "out", name="mine")
    opened = open_manifest(tmp_path / "out")
    opened.verify()
    assert (made.digest, opened.name, opened.shape, len(opened.shards)) == (opened.digest, "mine", (3, 8, 8), 3)
    read = Shards(opened).read(np.arange(20))
    assert np.array_equal(read[0], images.transpose(0, 3, 1, 2)) and np.array_equal(read[1], labels)
    assert opened.classes == (CLASSES if kind in ("folder", "parquet") else None)
    assert set(contents(tmp_path / "out")) == {
        "manifest.json", "prepare.json", *(f"{what}-0000{i}.npy" for what in ("images", "labels") for i in range(3))
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_source_and_output_may_be_on_object_storage(kind, client, tmp_path):
    local = write_source(kind, tmp_path / kind)
    straight = prepare(local, tmp_path / "straight")
    uri, out = put(client, local, f"{kind}/source"), f"s3://{BUCKET}/{kind}/out"
    listed = [list_source(str(each)) for each in (local, uri)]
    assert listed[0].digest == listed[1].digest, "wherever a copy lies"
    assert prepare(uri, out).digest == straight.digest == open_manifest(out).digest
    assert Job(uri, out).done
    assert not any("/.parts/" in key["Key"] for key in client.list_objects_v2(Bucket=BUCKET)["Contents"])


def test_any_scheme_of_fsspec(tmp_path):
    import fsspec

    local = write_source("webdataset", tmp_path / "tars")
    fsspec.filesystem("memory").put(str(local), "/tars", recursive=True)
    made = prepare("memory://tars", "memory://out")
    assert made.digest == prepare(local, tmp_path / "out").digest == open_manifest("memory://out").digest


def test_patterns_choose_files(tmp_path):
    folder = write_source("webdataset", tmp_path / "tars")
    both = list_source(f"{folder}/images-{{000..001}}.tar")
    assert both.files == list_source(str(folder)).files == list_source(f"{folder}/images-*.tar").files
    assert len(list_source(f"{folder}/images-{{001,001}}.tar").files) == 1
    assert expand_braces("a{09..11}b{x,y}") == [f"a{n}b{z}" for n in ("09", "10", "11") for z in "xy"]
    with pytest.raises(DataError, match=r"no images-002\.tar \(1 of 3 are missing\)"):
        list_source(f"{folder}/images-{{000..002}}.tar")


def test_a_compressed_npz_and_the_names_of_the_adm_suite(tmp_path):
    images, labels = images_of(20)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    np.savez(tmp_path / "b.npz", images=images, labels=labels)
    assert prepare(tmp_path / "a.npz", tmp_path / "a").digest == prepare(tmp_path / "b.npz", tmp_path / "b").digest


def halved(values):
    """Means of the pixels whose centres lie in each cell (of even sides, of 2×2), rows first, in whole levels."""
    for axis in (1, 0):
        n = values.shape[axis]
        scale = n / (n // 2)
        centres = np.arange(n) + 0.5
        cells = [
            values.take(np.flatnonzero((centres > i * scale) & (centres <= (i + 1) * scale)), axis).mean(axis)
            for i in range(n // 2)
        ]
        values = np.floor(np.stack(cells, axis) + 0.5)
    return values


@pytest.mark.parametrize(("width", "height"), [(64, 64), (70, 50), (33, 90), (20, 31), (16, 16), (12, 9), (203, 131)])
def test_the_centre_crop_is_adms(width, height):
    """Against means of blocks, torch's bicubic with antialiasing, and indexing: within rounding to whole levels."""
    import torch

    size = 16
    smooth = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(image).astype(np.float64)
    while min(values.shape[:2]) >= 2 * size:
        values = halved(values)
    scale = size / min(values.shape[:2])
    target = [round(n * scale) for n in values.shape[:2]]
    tensor = torch.from_numpy(values).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(tensor, size=target, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    y, x = ((n - size) // 2 for n in target)
    expected = resized[y : y + size, x : x + size].clamp(0, 255).numpy()
    found = np.asarray(center_crop(image, size)).astype(np.float64)
    assert found.shape == (size, size, 3)
    assert np.abs(found - expected).max() <= 2 and np.abs(found - expected).mean() < 0.6


def test_a_crop_of_images_of_different_sizes(tmp_path):
    for i, (label, side) in enumerate((("cat", (40, 30)), ("cat", (16, 16)), ("dog", (17, 90)))):
        path = tmp_path / "images" / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*side, 3), 10 * i, np.uint8)).save(path)
    assert prepare(tmp_path / "images", tmp_path / "out", size=16).shape == (3, 16, 16)
    images, _ = Shards(open_manifest(tmp_path / "out")).read(np.arange(3))
    assert images.reshape(3, -1).min(1).tolist() == images.reshape(3, -1).max(1).tolist() == [0, 10, 20]
    job = Job(str(tmp_path / "images"), str(tmp_path / "plain"))
    with pytest.raises(DataError, match=r"cat/1\.png is 16×16 .* the first image is 40×30\. Give --size N"):
        job.run(make_shards)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_colours(mode, tmp_path):
    image = Image.fromarray(images_of(1)[0][0]).convert(mode)
    file = tmp_path / "image.tiff"
    image.save(file)
    colours, grey = decode(file.read_bytes(), None, 3), decode(file.read_bytes(), None, 1)
    assert (colours.shape, grey.shape) == ((3, 8, 8), (1, 8, 8))
    assert np.array_equal(colours.transpose(1, 2, 0), np.asarray(image.convert("RGB")))
    assert mode not in ("L", "1") or np.array_equal(colours, np.repeat(grey, 3, 0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no bytes"),
        (None, "no bytes"),
        (b"<html>not found</html>", "no image of a known kind"),
        (encoded(images_of(1, 64)[0][0])[:2000], "truncated|broken"),
        (encoded(images_of(1, 64)[0][0], "JPEG")[:2000], "truncated"),
        (encoded(np.zeros((4, 4), np.uint16)), "more than 8 bits a channel"),
    ],
)
def test_what_is_no_image_is_said(content, reason):
    with pytest.raises(ValueError, match=reason):
        decode(content, None, 3)


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_unreadable_images_are_listed_and_left_out_or_refused(kind, tmp_path):
    source = write_source(kind, tmp_path / kind, broken=(3, 17))
    job = Job(str(source), str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"1 of 20 images cannot be read, such as .*--max-unreadable .*0\.001"):
        job.run(make_shards)
    job = Job(str(source), str(tmp_path / "out"), max_unreadable=0.1)
    made = job.run(make_shards)
    kept = np.delete(np.arange(20), [3, 17])
    assert (made.count, [shard.count for shard in made.shards]) == (18, [7, 8, 3])
    images, labels = Shards(open_manifest(tmp_path / "out")).read(np.arange(18))
    assert np.array_equal(images, images_of(20)[0][kept].transpose(0, 3, 1, 2))
    assert np.array_equal(labels, images_of(20)[1][kept])
    lines = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert len(lines) == 2 and all("\t" in line for line in lines)
    assert prepare(source, tmp_path / "again", max_unreadable=0.1).digest == made.digest


def test_a_class_must_not_lose_all_its_images(tmp_path):
    source = write_source("folder", tmp_path / "images", count=24, broken=tuple(range(8)))
    with pytest.raises(DataError, match=r"without what cannot be read, has no image of 1 of 3 classes: 'n01440764'"):
        prepare(source, tmp_path / "out", max_unreadable=0.5)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("remote", [False, True], ids=["here", "s3"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(after, remote, tmp_path, client):
    source = write_source("folder", tmp_path / "images", count=24, broken=(9,))
    straight = prepare(source, tmp_path / "straight", max_unreadable=0.1, name="x")
    out = f"s3://{BUCKET}/killed-{after}" if remote else str(tmp_path / "killed")

    class Kill(Exception):
        pass

    def run(tasks):
        for i, report in enumerate(make_shards(list(tasks)[::-1])):  # in any order
            yield report
            if i + 1 == after:
                raise Kill

    with pytest.raises(Kill):
        Job(str(source), out, max_unreadable=0.1, name="x").run(run)
    if not remote:  # a kill while a file was written, and one before a report
        (tmp_path / "killed" / ".parts" / "0123").mkdir()
        (tmp_path / "killed" / "images-00000.npy").write_bytes(b"torn")
    job = Job(str(source), out, max_unreadable=0.1, name="x")
    assert len(job.finished) == after - (after == 3 and not remote) and not job.done
    made = job.run(make_shards)
    assert made.digest == straight.digest
    if not remote:
        assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
        assert not (tmp_path / "killed" / ".parts").exists()
    again = Job(str(source), out, max_unreadable=0.1, name="x")
    assert again.done and again.plan == job.plan


def test_a_finished_data_set_that_lost_a_file_is_not_called_done(tmp_path):
    source = write_source("npz", tmp_path / "npz")
    prepare(source, tmp_path / "out")
    (tmp_path / "out" / "images-00001.npy").unlink()
    assert "images-00001.npy is missing" in refused_done(source, tmp_path / "out")


def refused_done(source, out):
    with pytest.raises(DataError) as caught:
        Job(str(source), str(out))
    return str(caught.value)


def test_another_request_in_the_same_place_is_refused_by_name(tmp_path):
    source = write_source("folder", tmp_path / "images")
    prepare(source, tmp_path / "out", size=8)

    def says(source=source, size=8, **options):
        with pytest.raises(UsageError) as caught:
            Job(str(source), str(tmp_path / "out"), size=size, **options)
        return str(caught.value)

    assert "was begun with another --size (8, now 4)" in says(size=4)
    assert "another --size (8, now None) and another --channels (3, now 1)" in says(size=None, channels=1)
    (source / CLASSES[0] / "new.png").write_bytes(encoded(images_of(1)[0][0]))
    assert "another source (20 folder files of " in says()
    other = write_source("npz", tmp_path / "npz")
    assert re.search(r"another source \(20 folder files .* now 1 npz", says(other))
    assert "choose another folder with --out, or delete" in says(other)


# --- bad input --------------------------------------------------------------------------------------------


def no_class(folder):
    write_source("folder", folder)
    (folder / "loose.png").write_bytes(encoded(images_of(1)[0][0]))


def empty_class(folder):
    write_source("folder", folder)
    (folder / "n99999999").mkdir()


def twins(folder):
    write_source("folder", folder)
    shutil.copytree(folder / CLASSES[0], folder / CLASSES[0].upper())


def splits_of_folders(folder):
    write_source("folder", folder / "train")
    write_source("folder", folder / "val")


def splits_of_files(folder):
    folder.mkdir()
    for split in ("train", "test"):
        write_parquet(folder / f"{split}-0.parquet", [encoded(each) for each in images_of(3)[0]], [0, 1, 2])


def two_kinds(folder):
    write_source("webdataset", folder)
    write_parquet(folder / "more.parquet", [], np.array([], np.int64))


def parquet(labels=(0, 1, 2), **options):
    def write(folder):
        folder.mkdir()
        write_parquet(folder / "a.parquet", [encoded(each) for each in images_of(len(labels))[0]], labels, **options)

    return write


def other_columns(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    pq.write_table(pa.table({"img": [b"x"], "fine_label": [3]}), folder / "a.parquet")


def cut(kind, name, keep):
    def write(folder):
        write_source(kind, folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[:keep])

    return write


def tar(**files):
    def write(folder):
        folder.mkdir()
        image = encoded(images_of(1)[0][0])
        write_tar(folder / "a.tar", {name.replace("_", "."): content or image for name, content in files.items()})

    return write


def npz(**arrays):
    def write(folder):
        folder.mkdir()
        np.savez(folder / "a.npz", **arrays)

    return write


IMAGES = images_of(6)[0]
BAD = {
    "nothing": (lambda folder: None, "Cannot read .*No such file|does not exist"),
    "no images": (lambda folder: folder.mkdir(), "has no images. Give a folder with a subfolder of images"),
    "images in no class": (no_class, r"in no class, such as loose\.png"),
    "empty class": (empty_class, "has no image of 1 of 4 classes: 'n99999999'"),
    "two folders of one class": (twins, "the class folders 'N01440764' and 'n01440764'"),
    "several splits, folders": (splits_of_folders, r"subfolders train, val, which are no classes.*images/train"),
    "several splits, files": (splits_of_files, r"several splits \(test, train\).*images/test\*\.parquet"),
    "two kinds": (two_kinds, "holds parquet and webdataset files"),
    "parquet: other columns": (other_columns, r"columns img: binary, fine_label: int64, but must have image"),
    "parquet: names twice": (parquet(names=("cat", "dog", "cat")), "several classes of the name 'cat'"),
    "parquet: kept back": (parquet([-1, -1, -1]), r"labels from -1 to -1, but they must be in \[0, 3\)"),
    "parquet: too high": (parquet([0, 1, 3]), r"labels from 0 to 3, but they must be in \[0, 3\)"),
    "parquet: empty class": (parquet([0, 2, 2]), "no image of 1 of 3 classes: 'n01443537'"),
    "parquet: a gap": (parquet([0, 2, 2], names=()), "no image of 1 of 3 classes: 1"),
    "parquet: without a label": (parquet([0, None, 1], names=()), "1 images without a label"),
    "parquet: words": (parquet(["a", "b", "c"]), "labels of string, but they must be integers"),
    "parquet: cut": (cut("parquet", "train-00001-of-00002.parquet", 300), "not a parquet file, or only part"),
    "tar: cut in an image": (cut("webdataset", "images-001.tar", 2600), "cut short within 00011.png"),
    "tar: cut in a header": (cut("webdataset", "images-001.tar", 2200), "cut short after 1 images"),
    "tar: no tar": (cut("webdataset", "images-001.tar", 100), "not a plain tar"),
    "tar: no class": (tar(a_png=b"", b_png=b"", b_cls=b"0"), "a has an image and no label"),
    "tar: no image": (tar(a_png=b"", a_cls=b"0", b_cls=b"0"), "b has a label and no image"),
    "tar: two labels": (tar(a_png=b"", a_jpg=b"", a_cls=b"0"), "two images for 'a'"),
    "tar: a word": (tar(a_png=b"", a_cls=b"cat"), "b'cat', but a .cls must hold a class as a number"),
    "npz: no labels": (npz(arr_0=IMAGES), r"holds arr_0, but training data need .* labels"),
    "npz: floats": (npz(images=IMAGES / 255, labels=np.zeros(6, int)), r"images float64 \(6, 8, 8, 3\), but images"),
    "npz: too few labels": (npz(images=IMAGES, labels=np.zeros(5, int)), r"labels int64 \(5,\), but 6 integers"),
    "npz: pickled": (npz(images=IMAGES, labels=np.array([0, "a", None, 1, 1, 1], object)), "Object arrays cannot be"),
    "npz: cut": (cut("npz", "images.npz", 3000), "cannot be read as an .npz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_named_before_anything_is_written(name, tmp_path):
    write, message = BAD[name]
    write(tmp_path / "images")
    source = tmp_path / "images"
    if name.startswith("npz"):
        source = next(source.glob("*.npz"))
    said = refused(source, tmp_path / "out", (DataError, StorageError))
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"--size is 0, but must be"),
        ({"channels": 2}, r"--channels is 2, but must be 3 \(RGB\) or 1"),
        ({"max_unreadable": 1.0}, r"--max-unreadable is 1, but must be a fraction in \[0, 1\)"),
        ({"mirrored": True}, r"--mirrored is for latents"),
        ({"vae": "no/such folder"}, r"no folder no/such folder"),
        ({"out": "file/below"}, r"--out .*file/below cannot be made: .*/file is a file"),
        ({"out": "full"}, r"full holds other files \(notes\.txt\)"),
        ({"out": "other"}, r"other holds a data set that was made otherwise"),
        ({"out": "images/out"}, r"lies in the source"),
        ({"source": "file"}, r"is a file of another kind"),
        ({"source": "im*/a.tar"}, r"pattern in a folder's name"),
        ({"source": "s4://bucket/a"}, r"Unknown scheme 's4'"),
    ],
)
def test_bad_arguments(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source("folder", tmp_path / "images")
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("")
    prepare("images", "other")
    Path("other/prepare.json").unlink()
    arguments = {"source": "images", "out": "out"} | options
    with pytest.raises(SdditError, match=message):
        Job(**arguments)
    assert not Path("out").exists()


def test_a_wrong_bucket_is_named(client, tmp_path):
    assert "no bucket s3://nowhere" in refused("s3://nowhere/images", tmp_path / "out")
    source = write_source("npz", tmp_path / "npz")
    with pytest.raises(StorageError, match="no bucket s3://nowhere"):
        prepare(source, "s3://nowhere/out")


def test_the_command_refuses_bad_input_without_ray(tmp_path):
    code = "import sys; from sddit.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", "images", "--out", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "images" in no_traceback(done)
    assert not {"ray", "torch"} & set(done.stdout.split())
    done = run("-m", "sddit", "prepare", "images", "--out", "out", "--workers", "0", cwd=tmp_path)
    assert done.returncode == 2 and "--workers is 0, but must be at least 1." in no_traceback(done)


# --- latents --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from latents import write_vae

    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.mark.parametrize("mirrored", [False, True])
def test_latents_are_those_of_the_autoencoder(mirrored, vae, tmp_path):
    from sddit.data.vae import Vae, encoded

    source = write_source("npz", tmp_path / "npz", side=16)
    images, labels = images_of(20, 16)
    made = prepare(source, tmp_path / "out", vae=str(vae), mirrored=mirrored)
    encoder = Vae(str(vae))
    assert (made.kind, made.shape) == ("latents", (4, 8, 8))
    assert made.vae == encoded(str(vae), (3, 16, 16))[0].model_copy(update={"mirrored": mirrored, "name": str(vae)})
    stored, kept = Shards(open_manifest(tmp_path / "out")).read(np.arange(20))
    assert np.array_equal(kept, labels)
    for lo in (0, 8, 16):
        part = np.ascontiguousarray(images[lo : lo + 8].transpose(0, 3, 1, 2))
        assert np.array_equal(stored[lo : lo + 8], encoder.encode(part, mirrored=mirrored))


def test_another_autoencoder_or_size_is_refused(vae, tmp_path):
    from latents import write_vae

    source = write_source("npz", tmp_path / "npz", side=16)
    prepare(source, tmp_path / "out", vae=str(vae))
    other = write_vae(tmp_path / "other", seed=1)
    for options in ({"vae": str(other)}, {}):
        with pytest.raises(UsageError, match=r"was begun with another --vae \(\w{12}, now "):
            Job(str(source), str(tmp_path / "out"), **options)
    with pytest.raises(UsageError, match=r"3 channels with sides divisible by 2, but these are 3 × 15 × 15"):
        Job(str(source), str(tmp_path / "odd"), vae=str(vae), size=15)
    with pytest.raises(UsageError, match=r"of 3 channels .* 1 × 16 × 16"):
        Job(str(source), str(tmp_path / "grey"), vae=str(vae), channels=1)


def test_shards_of_large_images_hold_fewer(monkeypatch):
    monkeypatch.undo()
    assert [jobs.images_in_shard((3, n, n)) for n in (32, 256, 512, 1024)] == [4096, 1024, 256, 64]


def test_indexing_reads_labels_alone(tmp_path):
    index = index_source(list_source(str(write_source("parquet", tmp_path / "parquet"))))
    assert index.places(0, 3)[0][1:] == [0, 3] and [each[1:] for each in index.places(8, 12)] == [[8, 10], [0, 2]]
    plan = json.loads(Job(str(tmp_path / "parquet"), str(tmp_path / "out")).plan.model_dump_json())
    assert plan["count"] == 20 and plan["request"]["kind"] == "parquet"
