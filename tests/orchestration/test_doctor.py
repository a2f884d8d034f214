"""Each check of the doctor: what is well is one line, what is not names the fix. On a real cluster: integration/."""

import json
import os
import shutil
import socket
import subprocess
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import storage
from tiny import experiment

from sddit.data import open_manifest
from sddit.environment import check_source, source_digest, versions
from sddit.errors import DataError, SdditError, UsageError
from sddit.orchestration import checks, cluster, doctor
from sddit.orchestration.checks import Finding
from sddit.orchestration.cluster import GIB, Node
from sddit.orchestration.doctor import Line


@pytest.fixture
def need(tmp_path):
    """That of a tiny cell, as a node of a cluster gets it, with what the driver left for it."""
    cell = experiment(), open_manifest("digits")
    needed = doctor.need_of([cell], storage=f"{tmp_path}/runs", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    needed = replace(needed, mark="mark", on_cluster=True, resources={"CPU": 1})
    with doctor._marks(needed) as (needed, found):
        assert found == []
        yield needed
    assert sorted(p.name for p in tmp_path.iterdir()) == [], "nothing is left behind"


def only(findings):
    """The one finding."""
    (found,) = findings
    return found


def states(findings):
    return [finding.state for finding in findings]


def test_all_is_well_here(need, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")  # its value came by another way
    answer = json.loads(json.dumps(checks.examine(asdict(need))))  # plain values
    found = list(doctor.judge(answer, need.source))
    assert {finding.state for finding in found} == {"ok"}, found
    assert [finding.check for finding in found][:2] == ["code", "libraries"]
    assert {finding.check for finding in found} <= set(doctor.ORDER)


def test_a_check_that_fails_hides_no_other(need, monkeypatch):
    monkeypatch.setattr(checks, "open_client", lambda uri: 1 / 0)
    monkeypatch.setattr(checks, "open_manifest", lambda path: 1 / 0)
    monkeypatch.setattr(checks, "ON_NODES", (checks.check_data, checks.check_cores))
    found = [Finding(*values) for values in checks.examine(asdict(need))["findings"]]
    assert found[0] == ("data", "problem", "could not be checked: division by zero", "")
    assert found[1].state == "ok"


# ---------------------------------------------------------------------------------------------------------- the checks


def test_libraries(need, monkeypatch):
    def stale():
        raise UsageError("The environment is stale: requirements.lock has changed since it was made. Run: make setup")

    assert list(checks.check_libraries(need)) == []
    monkeypatch.setattr(checks, "check_environment", stale)
    found = only(checks.check_libraries(need))
    assert found.state == "problem" and "is stale" in found.text and "make setup" in found.fix


H100 = ["NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB]
DEVICES = [
    # GPUs that Ray counts, what torch prints, exit status, bytes that a worker needs → states, text, fix
    (0, "[]", 0, 0, ["ok"], "torch on the CPU, no GPU", ""),
    (2, json.dumps([H100, H100]), 0, 0, ["ok"], "2 × NVIDIA H100 80GB HBM3 with 80 GiB; each multiplied matrices", ""),
    (2, json.dumps([H100]), 0, 0, ["problem", "ok"], "torch sees 1 of 2 GPUs", "nvidia-smi"),
    (1, "[]", 0, 0, ["problem", "ok"], "torch sees 0 of 1 GPUs", "torch build"),
    (1, "", 1, 0, ["problem"], "torch cannot be used: CUDA error: no kernel image", "make setup"),
    (
        1,
        json.dumps([H100]),
        0,
        90 * GIB,
        ["ok", "warning"],
        "needs about 91 GiB, the smallest GPU has 80",
        "micro_batch",
    ),
    (1, json.dumps([["L4", 22 * GIB, GIB]]), 0, 0, ["ok", "warning"], "1 of 1 GPUs are in use", "nvidia-smi"),
]


@pytest.mark.parametrize(("gpus", "printed", "status", "needed", "expected", "text", "fix"), DEVICES)
def test_devices(gpus, printed, status, needed, expected, text, fix, need, monkeypatch):
    asked = {}

    def run(command, env, **_):
        asked.update(env)
        return subprocess.CompletedProcess(command, status, f"a warning\n{printed}\n", "CUDA error: no kernel image\n")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Ray sets it for a task without GPUs
    monkeypatch.setattr(checks.subprocess, "run", run)
    found = list(checks.check_devices(replace(need, resources={"GPU": gpus}, device_bytes=needed)))
    assert states(found) == expected and "CUDA_VISIBLE_DEVICES" not in asked
    told = found[0] if expected[0] == "problem" else found[-1]
    assert text in told.text and fix in told.fix


def test_the_program_that_uses_the_devices_runs(need):
    assert only(checks.check_devices(need)).state == "ok"  # for real, in a process of its own


def test_cores(need):
    assert only(checks.check_cores(need)).state == "ok"
    found = only(checks.check_cores(replace(need, resources={"CPU": 4096})))
    assert found.state == "warning" and "Ray counts 4096 CPUs" in found.text and "--num-cpus=" in found.fix


def test_shared_memory(need):
    assert only(checks.check_memory(need)).state == "ok"
    found = only(checks.check_memory(replace(need, resources={"object_store_memory": 1e15})))
    assert found.state == "warning" and "/dev/shm" in found.text and "--shm-size" in found.fix


DISK = [
    # bytes free of 1 TB, bytes of a checkpoint → states
    (500e9, 1e6, ["ok"]),
    (100e9, 40e9, ["warning"]),  # three checkpoints may be there at once
    (20e9, 1e6, ["warning", "problem", "warning"]),  # nearly full: Ray does not work
    (0.2e9, 1e6, ["problem", "problem", "warning"]),
]


@pytest.mark.parametrize(("free", "checkpoint", "expected"), DISK)
def test_disk(free, checkpoint, expected, need, monkeypatch):
    usage = SimpleNamespace(free=free, total=1e12)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    found = list(checks.check_disk(replace(need, checkpoint_bytes=int(checkpoint))))
    assert states(found) == expected
    if expected != ["ok"]:
        settings = {"SDDIT_CACHE", "TMPDIR", "--storage"}
        assert all("are free in" in f.text and settings & set(f.fix.split()) for f in found)
    remote = list(checks.check_disk(replace(need, storage="s3://bucket/runs", checkpoint_bytes=10**12)))
    assert len(remote) == max(1, len(expected) - 1) if free < 100e9 else states(remote) == ["ok"]


def test_token(need, tmp_path_factory, monkeypatch):
    file = tmp_path_factory.mktemp("home") / "auth_token"
    file.write_text("secret")
    file.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = only(checks.check_token(need))
    assert found.state == "warning" and "RAY_AUTH_MODE is disabled" in found.text and "RAY_AUTH_MODE=token" in found.fix
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = only(checks.check_token(need))
    assert found.state == "warning" and "can be read by others" in found.text and f"chmod 600 {file}" in found.fix
    file.chmod(0o600)
    assert only(checks.check_token(need)).state == "ok"
    assert "loopback" in only(checks.check_token(replace(need, on_cluster=False))).text


def test_storage(need, tmp_path_factory):
    found = only(checks.check_storage(need))
    assert found.state == "ok" and "the driver's too" in found.text
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # the same path on a machine that does not share it
    found = only(checks.check_storage(replace(need, storage=str(elsewhere))))
    assert found.state == "problem" and "is not the driver's" in found.text and "s3://" in found.fix
    assert list(elsewhere.iterdir()) == []


def test_storage_that_cannot_be_written_to_is_found_by_the_driver(need, tmp_path_factory):
    file = tmp_path_factory.mktemp("other") / "file"
    file.write_text("")
    with doctor._marks(replace(need, storage=f"{file}/runs")) as (without, found):
        assert only(found).state == "problem" and "Cannot write checkpoints" in found[0].text
        assert "--storage" in found[0].text and without.storage == ""
    assert list(checks.check_storage(without)) == []


def _files(client):
    """What lies in the bucket, but for the empty keys that stand for folders."""
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=storage.BUCKET)["Contents"]]
    return [key for key in keys if not key.endswith("/")]


def test_storage_and_data_in_a_bucket(need, monkeypatch):
    with storage.s3() as client:
        path = storage.upload(client, open_manifest("digits").folder, "data/digits")
        before = len(_files(client))
        remote = replace(
            need, storage=f"s3://{storage.BUCKET}/runs", experiments=[experiment(data__path=path).model_dump()]
        )
        with doctor._marks(remote) as (marked, found):
            assert found == [] and states(checks.check_storage(marked)) == ["ok"]
        left = _files(client)
        assert len(left) == before, left
        assert "is not the driver's" in only(checks.check_storage(remote)).text
        assert states(checks.check_data(remote)) == states(checks.check_disk(remote)) == ["ok"]
        monkeypatch.setenv("SDDIT_CACHE_GB", "much")
        with pytest.raises(DataError, match="SDDIT_CACHE_GB is 'much'"):  # which `examine` makes a finding
            list(checks.check_disk(remote))
        with doctor._marks(replace(need, storage="s3://no-such-bucket/runs")) as (_, found):
            assert only(found).state == "problem" and "there is no bucket s3://no-such-bucket" in found[0].text
        with storage.refusing(403, "AccessDenied", "Access Denied") as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            found = only(checks.check_storage(remote))
    assert found.state == "problem" and "access is denied" in found.text and "a role or files of its own" in found.fix


def test_a_record_that_is_a_file(need, tmp_path_factory):
    found = only(checks.check_tracking(need))
    assert found.state == "ok" and "is there" in found.text
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    found = only(checks.check_tracking(replace(need, tracking_uri=f"sqlite:///{elsewhere}/mlflow.db")))
    assert found.state == "problem" and "lies on another machine" in found.text and "sddit serve" in found.fix
    assert list(elsewhere.iterdir()) == [], "looking makes no database"


def test_a_record_behind_a_closed_port(need):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        uri = f"http://127.0.0.1:{bound.getsockname()[1]}"
        found = only(checks.check_tracking(replace(need, tracking_uri=uri)))
    assert found.state == "problem" and "is every node's own): Connection refused" in found.text
    assert "firewall" in found.fix and "sddit serve" in found.fix


class Refuses(BaseHTTPRequestHandler):
    """What a server answers that does not know the name it is called by."""

    def do_POST(self):
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Invalid Host header - possible DNS rebinding attack detected")

    do_GET = do_POST

    def log_message(self, *_):
        pass


def test_a_record_that_refuses(need):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        found = only(checks.check_tracking(replace(need, tracking_uri=uri)))
        server.shutdown()
    assert found.state == "problem" and "403" in found.text
    assert "--allowed-hosts" in found.fix and "never sent along" in found.fix


def test_writing_to_the_record(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    found = only(doctor.check_record(uri))
    assert found.state == "ok" and "will be made" in found.text and list(tmp_path.iterdir()) == []
    client = checks.open_client(uri)
    before = client.get_experiment("0").tags
    found = only(doctor.check_record(uri))
    assert found.state == "ok" and "can be written to" in found.text
    assert client.get_experiment("0").tags == before, "nothing is left behind"
    (tmp_path / "file").write_text("no database" * 100)
    for bad in ("file", "file/mlflow.db"):
        found = only(doctor.check_record(f"sqlite:///{tmp_path}/{bad}"))
        assert found.state == "problem" and found.check == "tracking"
        assert "--tracking-uri" in found.text + found.fix


def test_data(need, tmp_path_factory):
    found = only(checks.check_data(need))
    assert found.state == "ok" and "1,797 images" in found.text
    other = replace(need, digests={"digits": "0" * 64})
    found = only(checks.check_data(other))
    assert found.state == "problem" and "has other data than the driver's" in found.text and "Copy" in found.fix
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(open_manifest("digits").folder, folder / "half")
    (folder / "half" / "manifest.json").unlink()
    for path, text, fix in (
        (f"{folder}/half", "is half-written", "s3://"),
        (f"{folder}/none", "No data set at", f"at {folder}/none on every node"),
        ("relative/none", "No data set at", "as an absolute path"),
    ):
        found = only(checks.check_data(replace(need, experiments=[experiment(data__path=path).model_dump()])))
        assert found.state == "problem" and text in found.text and fix in found.fix


def test_weights(need):
    assert only(checks.check_weights(need)) == ("weights", "ok", "digits-cnn", "")
    vgg = replace(need, experiments=[experiment(eval__extractor="vgg16").model_dump()])
    found = only(checks.check_weights(vgg))
    assert found.state == "problem" and "curl -L" in found.text and "every node" in found.text
    both = experiment(eval__extractor="vgg16", data__path="/none").model_dump()
    assert only(checks.check_weights(replace(need, experiments=[both]))) == found, "though the data are missing too"


CAPACITY = [(1, "ok", "1 cell"), (2, "problem", "--workers 1 or fewer")]


@pytest.mark.parametrize(("workers", "state", "text"), CAPACITY)
def test_capacity(workers, state, text, need):
    found = doctor.check_capacity(need, experiment(resources__workers=workers), [Node(1, 0, 8 * GIB)])
    assert (found.check, found.state) == ("capacity", state) and text in found.text


SHARING = [
    # storage, record, machines, whether more may join → (check, state) of what is found
    ("/runs", "sqlite:////mlflow.db", 1, False, []),
    ("/runs", "sqlite:////mlflow.db", 3, False, [("tracking", "problem")]),  # the storage may be shared: nodes say so
    ("/runs", "sqlite:////mlflow.db", 1, True, [("tracking", "warning"), ("storage", "warning")]),
    ("s3://b/runs", "http://10.0.0.1:5000", 3, True, []),
]


@pytest.mark.parametrize(("storage", "record", "machines", "can_grow", "expected"), SHARING)
def test_sharing(storage, record, machines, can_grow, expected, need):
    found = list(doctor.check_sharing(replace(need, storage=storage, tracking_uri=record), machines, can_grow=can_grow))
    assert [(f.check, f.state) for f in found] == expected and all(f.fix for f in found)


def test_a_dead_autoscaler(tmp_path):
    assert list(doctor.check_autoscaler(tmp_path)) == [], "not the head"
    log = tmp_path / "monitor.log"
    log.write_text("")
    assert only(doctor.check_autoscaler(tmp_path)) == ("autoscaler", "ok", "alive", "")
    os.utime(log, (1, 1))
    found = only(doctor.check_autoscaler(tmp_path))
    assert found.state == "warning" and "may be dead" in found.text and f"{tmp_path}/monitor.err" in found.fix


# ------------------------------------------------------------------------------------------------- what the driver sees


def answer_of(**changes):
    about = {"source": "abc", "revision": "r1", "versions": versions(), "boot": "b"} | changes.pop("about", {})
    return {"about": about, "findings": [], "time": 100.0, "arrived": 100.2} | changes


JUDGED = [
    ({}, "code", "ok", "revision r1, source abc", ""),
    ({}, "libraries", "ok", "ray ", ""),
    ({}, "clock", "ok", "within a second", ""),
    ({"time": 97.0}, "clock", "warning", "3 s behind the driver's", "chrony"),
    ({"time": 105.0}, "clock", "warning", "5 s before the driver's", "chrony"),
    ({"about": {"source": "other"}}, "code", "problem", "runs other code (r1, source other) than the driver", "rsync"),
    ({"about": {"versions": versions() | {"torch": "1.0"}}}, "libraries", "problem", "torch 1.0 (driver: ", "setup"),
    ({"about": {"versions": versions() | {"mlflow": "missing"}}}, "libraries", "problem", "mlflow missing", "setup"),
    ({"findings": [["data", "problem", "gone", "bring it"]]}, "data", "problem", "gone", "bring it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "check", "state", "text", "fix"), JUDGED)
def test_an_answer_is_compared_with_the_driver(changes, check, state, text, fix):
    found = next(f for f in doctor.judge(answer_of(**changes), "abc") if f.check == check)
    assert found.state == state and text in found.text and fix in found.fix


def test_a_node_that_cannot_answer():
    error = "ModuleNotFoundError: No module named 'sddit'"
    found = only(doctor.judge({"error": error}, "abc"))
    assert (found.check, found.state) == ("code", "problem") and error in found.text and "make setup" in found.fix


def test_equal_findings_share_a_line():
    fine, gone = Finding("data", "ok", "there"), Finding("data", "problem", "gone\n  for ever.", "Bring it")
    late, own = Finding("clock", "warning", "late", "chrony"), Finding("code", "ok", "r1")
    lines = doctor.grouped([own], {"a": [fine, late], "b": [fine], "c": [gone]})
    assert lines == [Line(own), Line(late, ("a",)), Line(fine, ("a", "b")), Line(gone, ("c",))]
    assert [doctor.as_text(line, 3) for line in lines] == [
        "ok       code       r1.",
        "warning  clock      a: late. → chrony.",
        "ok       data       a, b: there.",
        "problem  data       c: gone for ever. → Bring it.",
    ]
    everywhere = Line(fine, tuple("abcdef"))
    assert doctor.as_text(everywhere, 6) == "ok       data       6 nodes: there."
    assert doctor.as_text(everywhere, 8) == "ok       data       6 of 8 nodes (a, b, c, d, …): there."
    assert doctor.as_text(Line(fine, ("this machine",)), 1) == "ok       data       there."


def test_nodes_are_called_by_their_address_and_told_apart():
    nodes = [{"NodeID": f"{i}" * 56, "NodeManagerAddress": a} for i, a in enumerate(["10.0.0.1", "10.0.0.2"])]
    assert list(doctor._names(nodes).values()) == ["10.0.0.1", "10.0.0.2"]
    nodes[1]["NodeManagerAddress"] = "10.0.0.1"
    assert list(doctor._names(nodes).values()) == ["10.0.0.1 (000000)", "10.0.0.1 (111111)"]


# -------------------------------------------------------------------------------------------- one revision everywhere


def test_the_source_digest_is_of_what_the_package_consists_of(tmp_path):
    def package(name, **files):
        for file, text in files.items():
            path = tmp_path / name / file.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source_digest(tmp_path / name)

    one = package("one", a_py="1", sub__b_py="2")
    assert one == package("two", a_py="1", sub__b_py="2", notes="of an editor")
    assert one != package("three", a_py="1", sub__b_py="3") and one != package("four", a_py="1", c_py="2")


def test_a_cell_refuses_a_node_of_another_revision():
    check_source(source_digest())
    with pytest.raises(SdditError, match=r"runs other code.*than the driver \(0123\).*rsync"):
        check_source("0123")


def test_what_goes_along_to_other_nodes(monkeypatch):
    for name in (*cluster.PASSED_ON, "RAY_JOB_CONFIG_JSON"):
        monkeypatch.delenv(name, raising=False)
    assert cluster.passed_on() == {}
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("SDDIT_CACHE", "/cache")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host")
    assert cluster.passed_on() == {"HF_HOME": "/models", "SDDIT_CACHE": "/cache"}
    # Ray refuses a variable that is given twice.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON", json.dumps({"runtime_env": {"env_vars": {"HF_HOME": "/other"}}}))
    assert cluster.passed_on() == {"SDDIT_CACHE": "/cache"}
    secrets = [name for name in cluster.PASSED_ON if any(word in name for word in ("KEY", "TOKEN", "PASSWORD"))]
    assert secrets == []


def test_an_address_that_cannot_be_joined_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(SdditError, match=r"ray://.* cannot be used: give the head's host:port"):
        cluster._check_address("ray://10.0.0.5:10001")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(SdditError, match=r"No Ray cluster answers.*Connection refused.*ray start --head"):
            cluster._check_address(f"127.0.0.1:{bound.getsockname()[1]}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    for text in (None, "\n"):
        if text:
            (tmp_path / "token").write_text(text)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        with pytest.raises(SdditError, match=r"no token in .*ray get-auth-token --generate"):
            cluster._check_address("127.0.0.1:1")


def test_the_mode_follows_the_token(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
    cluster.configure_environment(remote=True)
    assert os.environ.pop("RAY_AUTH_MODE") == "disabled"
    (tmp_path / "token").write_text("secret")
    cluster.configure_environment(remote=True)
    assert os.environ["RAY_AUTH_MODE"] == "token"
