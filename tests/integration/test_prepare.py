"""``sddit prepare`` as a user runs it: on Ray, with any number of workers, killed and run again, on object storage."""

import time

import numpy as np
import pytest
from commands import Running, no_traceback, run
from latents import write_vae
from pictures import CLASSES, contents, images_of, write_parquet, write_source
from storage import BUCKET, s3

from sddit.data import open_manifest
from sddit.data.job import SHARD_IMAGES, Job
from sddit.data.prepare import make_shards

pytestmark = pytest.mark.slow
COUNT = 9 * SHARD_IMAGES + 5


def prepare(*arguments, cwd, **env):
    done = run("-m", "sddit", "prepare", *arguments, cwd=cwd, **env)
    no_traceback(done)
    assert not done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Ten shards of images, one of them unreadable."""
    from pictures import encoded

    distinct = [encoded(image) for image in images_of(500)[0]]
    files = [distinct[i % len(distinct)] for i in range(COUNT)]
    files[2000] = b"broken"
    path = tmp_path_factory.mktemp("source") / "a.parquet"
    write_parquet(path, files, np.arange(COUNT) * len(CLASSES) // COUNT, rows=500)
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def test_one_worker_two_and_none_give_the_same_bytes(source, vae, tmp_path):
    options = [str(source), "--name", "x", "--vae", str(vae), "--size", "16"]
    for count in ("1", "2"):
        done = prepare(*options, "--out", count, "--workers", count, cwd=tmp_path)
        assert done.returncode == 0 and f"{COUNT:,}/{COUNT:,} images, 10/10 shards" in done.stdout, done.stdout
        assert "1 images could not be read and are left out" in done.stdout
    Job(str(source), str(tmp_path / "here"), name="x", vae=str(vae), size=16).run(make_shards)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "here")
    again = prepare(*options, "--out", "2", cwd=tmp_path, RAY_ADDRESS="127.0.0.1:1")  # not asked for
    assert again.returncode == 0 and "is prepared already" in again.stdout


def test_a_command_that_was_stopped_goes_on_and_gives_the_same_bytes(source, tmp_path):
    """Ctrl-C, then a kill, each at a random moment."""
    straight, reports = tmp_path / "straight", tmp_path / "stopped" / ".parts"
    Job(str(source), str(straight), name="x").run(make_shards)
    command = ["-m", "sddit", "prepare", str(source), "--out", "stopped", "--name", "x", "--workers", "1"]
    print("seed", seed := time.time_ns())
    rng = np.random.default_rng(seed)
    for stop in ("interrupt", "kill"):
        running = Running(*command, cwd=tmp_path)
        wanted = min(len(list(reports.glob("shard-*"))) + rng.integers(1, 4), 9)  # of 10
        deadline = time.monotonic() + 400
        while len(list(reports.glob("shard-*"))) < wanted:
            assert time.monotonic() < deadline and running.process.poll() is None, running.output
            time.sleep(0.005)
        getattr(running, stop)()
        if stop == "interrupt":
            assert running.wait() == 130 and "the same command goes on" in no_traceback(running.output)
        assert not (tmp_path / "stopped" / "manifest.json").exists()
    done = prepare(*command[3:], cwd=tmp_path)
    assert done.returncode == 0 and "shards are there already" in done.stdout
    assert contents(tmp_path / "stopped") == contents(straight)


def test_from_and_to_object_storage_and_errors_of_workers_in_words(tmp_path):
    with s3() as client:
        for path in write_source("webdataset", tmp_path / "tars", count=60).iterdir():
            client.upload_file(str(path), BUCKET, f"tars/{path.name}")
        out = f"s3://{BUCKET}/out"
        done = prepare(f"s3://{BUCKET}/tars/images-{{000..001}}.tar", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        opened = open_manifest(out)
        opened.verify()
        assert (opened.count, opened.shape) == (60, (3, 8, 8))
    mixed = write_source("folder", tmp_path / "mixed")
    write_source("folder", tmp_path / "larger", side=16)
    first = next((mixed / "n01484850").iterdir())
    first.write_bytes((tmp_path / "larger" / "n01484850" / first.name).read_bytes())
    torn = write_source("folder", tmp_path / "torn", broken=(5,))
    for source, end in (
        (mixed, "Give --size N: a centre crop brings all images to N×N."),
        (torn, "or allow more with --max-unreadable (a fraction, now 0.001)."),
    ):
        done = run("-m", "sddit", "prepare", str(source), "--out", f"{source.name}-out", cwd=tmp_path)
        assert done.returncode == 1 and no_traceback(done)
        assert done.stderr.endswith(f"{end}\n") and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.torture
def test_encoding_beside_decoding_as_on_gpus(vae, tmp_path, monkeypatch):
    """The way through Ray's object store, with a GPU in name alone."""
    import ray
    from rich.console import Console

    from sddit.data import job as jobs
    from sddit.orchestration.prepare import run_on_ray

    monkeypatch.setattr(jobs, "SHARD_IMAGES", 8)
    source = write_source("folder", tmp_path / "images", side=16, count=44, broken=(9,))
    options = {"vae": str(vae), "max_unreadable": 0.1, "name": "x"}
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        job = Job(str(source), str(tmp_path / "out"), **options)
        job.run(lambda tasks: run_on_ray(tasks, None, None, Console(quiet=True)))
    finally:
        ray.shutdown()
    Job(str(source), str(tmp_path / "here"), **options).run(make_shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
