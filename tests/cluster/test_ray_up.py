"""`ray up` to a finished sweep and back, on a machine of one's own: a real sshd on loopback, its home an empty folder.

`ray stop` ends every Ray of a user on a machine, so this one is a process namespace of its own: what runs in it is all
that it sees, and all of it ends with the test.
"""

import contextlib
import getpass
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml
from cluster_yaml import FILE, ROOT, for_own_machines
from commands import environment, no_traceback
from servers import free_port
from tiny import set_flags

from sddit import results

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def why_not():
    for tool in (SSHD, "ssh", "ssh-keygen", "rsync", "unshare"):
        if shutil.which(tool) is None:
            return f"{Path(tool).name} is not installed"
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        return "this user may not make a process namespace, and without one `ray stop` would end all of the user's Ray"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.skipif(bool(why_not()), reason=why_not())]

TINY = [*set_flags(method__mask_ratio="[0.2,0.5]"), "--steps", "6"]
SWEEP = ["python", "sweeps/mask_ratio.py", *TINY]


def plain(text):
    """What a terminal shows, on one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split())


class Machine:
    """A machine reached by ssh on a port of loopback. `lose` takes its disk away, `close` ends all that runs on it."""

    def __init__(self, folder: Path, env: dict) -> None:
        self.folder, self.home, self.port = folder, folder / "home", free_port()
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.new_home()
        # ssh takes the home folder from the password file, everything else from here.
        env = env | {"HOME": str(self.home), "RAY_TMPDIR": str(folder / "r")}
        assignments = " ".join(f'"{name}={value}"' for name, value in env.items())
        (folder / "sshd.conf").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"SetEnv {assignments}\n"
        )
        # bash takes the children of those that ended, as the first process of a machine does.
        serve = f"{SSHD} -D -f {folder}/sshd.conf -E {folder}/sshd.log & wait"
        self.process = subprocess.Popen([*NAMESPACE, "bash", "-c", serve], start_new_session=True)
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < until and self.process.poll() is None, "sshd did not start"
            time.sleep(0.05)

    def new_home(self) -> None:
        """An empty one, but that python3 is the one that runs the tests."""
        self.home.mkdir()
        python = Path(sys.base_prefix) / "bin"
        (self.home / ".bashrc").write_text(f"cd\nexport PATH={python}:$PATH\n")

    def lose(self) -> None:
        shutil.rmtree(self.home)
        self.new_home()

    def processes(self) -> list[str]:
        """What runs on it, beside sshd."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()) or process.name())
        return [line for line in found if "sshd" not in line]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Cluster:
    """The operator's side: `ray` commands with cluster.yaml, edited as it says."""

    def __init__(self, folder: Path, machine: Machine, bucket: str) -> None:
        self.project, self.home = folder / "project", folder / "operator"
        self.file = self.project / "cluster.yaml"
        for path in (self.project, self.home):
            path.mkdir()
        self.mlflow = free_port()
        config = yaml.safe_load(self.edited(machine, bucket))
        # There is no field for the port of ssh.
        join = f"exec 3<>/dev/tcp/127.0.0.1/{machine.port}; cat <&3 & cat >&3; kill $!"
        config["auth"]["ssh_proxy_command"] = f"bash -c {shlex.quote(join)}"
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))
        for source in config["file_mounts"].values():  # which nobody edits meanwhile
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, self.project / source)
            elif not source.startswith("~"):
                shutil.copy(ROOT / source, self.project / source)
        self.env = environment(HOME=str(self.home), RAY_TMPDIR=str(folder / "o"), RAY_UP_enable_autoscaler_v2="0")

    def edited(self, machine: Machine, bucket: str) -> str:
        changes = {
            r"^cluster_name: .*": f"cluster_name: sddit-{machine.port}",  # of ssh's shared sockets, too
            r"head_ip: \S+": "head_ip: 127.0.0.1",
            r"worker_ips: \[.*?\]": "worker_ips: []",
            r"ssh_user: \S+": f"ssh_user: {getpass.getuser()}",
            r"ssh_private_key: \S+": f"ssh_private_key: {machine.folder}/user_key",
            r"s3://CHANGE-ME/sddit": bucket,
            r"\b5000\b": str(self.mlflow),  # others may use these here
            r"\b6379\b": str(free_port()),
        }
        text = for_own_machines(FILE.read_text())
        for pattern, value in changes.items():
            text, found = re.subn(pattern, value, text, flags=re.MULTILINE)
            assert found, pattern
        return text

    def ray(self, *arguments: str, timeout: int = 400, status: int = 0) -> str:
        """Runs a command of ray's from the project's folder."""
        ray = Path(sys.executable).parent / "ray"
        done = subprocess.run(
            [ray, *arguments], cwd=self.project, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == (status == 0), done.stdout
        return plain(done.stdout)

    def up(self) -> str:
        return self.ray("up", "-y", "--no-config-cache", str(self.file))

    def exec(self, command: str, status: int = 0) -> str:
        return self.ray("exec", str(self.file), command, status=status)

    def down(self) -> None:
        self.ray("down", "-y", str(self.file))


@pytest.fixture(scope="module")
def folder():
    # Short: Ray's sockets lie below it.
    path = Path(tempfile.mkdtemp(prefix="ru", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def machine(folder, s3):
    """With what an operator has given it: credentials for the bucket, and where packages come from."""
    kept = ("UV_", "PIP_", "SSL_", "HTTP_", "HTTPS_", "NO_PROXY", "REQUESTS_CA", "CURL_CA")
    env = {k: v for k, v in os.environ.items() if k.upper().startswith(kept)}
    home = Path.home()
    env |= {
        "UV_CACHE_DIR": env.get("UV_CACHE_DIR", f"{os.environ.get('XDG_CACHE_HOME', home / '.cache')}/uv"),
        "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME", f"{home}/.config"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    machine = Machine(folder, env | s3)
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def cluster(folder, machine):
    cluster = Cluster(folder, machine, "s3://lab/cluster")
    token = f"umask 077; {Path(sys.executable).parent}/ray get-auth-token --generate > /dev/null"
    subprocess.run(["bash", "-c", token], env=cluster.env, check=True, timeout=120)
    return cluster


def keys(prefix):
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix=prefix)
    return [each["Key"] for page in pages for each in page.get("Contents", [])]


LOOK = """
import json, os, pathlib, ray, sddit
ray.init(log_to_driver=False, logging_level="ERROR")
node, = ray.nodes()
cpus = int(node["Resources"]["CPU"])
threads = ray.remote(num_cpus=cpus)(lambda: os.environ.get("OMP_NUM_THREADS"))
print("LOOK" + json.dumps({
    "sddit": sddit.__file__, "threads": ray.get(threads.remote()), "cpus": cpus,
    "token": oct(pathlib.Path("~/.ray/auth_token").expanduser().stat().st_mode & 0o777),
    "env": {k: os.environ.get(k) for k in ("RAY_ADDRESS", "RAY_AUTH_MODE", "SDDIT_STORAGE", "MLFLOW_TRACKING_URI")},
}))
"""


def test_from_an_empty_machine_to_a_finished_sweep_and_again_after_its_loss(machine, cluster):
    cluster.up()
    home = machine.home
    assert (home / "sddit-lab/.venv/made-for.json").exists(), "the locked environment"
    assert not (home / "sddit-lab/tests").exists() and not (home / "sddit-lab/.git").exists()

    found = json.loads(re.search(r"LOOK(\{.*\}\})", cluster.exec(f"python -c {shlex.quote(LOOK)}"))[1])
    assert found["sddit"] == f"{home}/sddit-lab/sddit/__init__.py"
    assert found["token"] == "0o600" and found["threads"] == str(found["cpus"]), "as Ray does elsewhere"
    assert found["env"]["RAY_AUTH_MODE"] == "token" and found["env"]["RAY_ADDRESS"] == "auto"
    assert found["env"]["SDDIT_STORAGE"] == "s3://lab/cluster/runs"
    tracking = found["env"]["MLFLOW_TRACKING_URI"]
    assert re.fullmatch(rf"http://[\d.]+:{cluster.mlflow}", tracking)
    refused = cluster.exec("RAY_AUTH_MODE=disabled ray status", status=1)
    assert "Authentication" in refused

    # The one command, as docs/cluster.md gives it for long sweeps. It finds cluster, record and storage by itself.
    cluster.exec(f"cd ~/sddit-lab && setsid nohup {shlex.join(SWEEP)} > ~/sweep.log 2>&1 < /dev/null &")
    done = no_traceback(when_over(machine, "sweep.log"))
    assert f"Record: {tracking}" in done and "Checkpoints: s3://lab/cluster/runs/mask_ratio" in done
    assert results.load_cells("mask_ratio", tracking)["state"].tolist() == ["done", "done"], done
    checkpoints = [key for key in keys("cluster/runs/mask_ratio/") if key.endswith("manifest.json")]
    assert len({key.split("/")[3] for key in checkpoints}) == 2
    assert any(key.endswith(".png") for key in keys("cluster/artifacts/")), "sample grids, through the server"

    # A second `ray up` sets up nothing, as nothing was written below what is mounted; `ray submit` brings one script.
    again = cluster.up()
    assert "Running setup commands" not in again and "make --no-print" not in again
    done = no_traceback(cluster.ray("submit", str(cluster.file), "sweeps/mask_ratio.py", *TINY))
    assert "all 2 cells are done; nothing to run" in done

    assert "its record is in s3://lab/cluster/mlflow" in cluster.exec("sddit serve --data ~/sddit-mlflow --stop")
    cluster.down()
    assert wait_for_nothing(machine) == []

    machine.lose()
    said = cluster.up()
    assert "Restored from s3://lab/cluster/mlflow/mlflow-" in said
    done = no_traceback(cluster.exec(f"cd ~/sddit-lab && {shlex.join(SWEEP)}"))
    assert "all 2 cells are done; nothing to run" in done
    cluster.exec("sddit serve --data ~/sddit-mlflow --stop")
    cluster.down()
    assert wait_for_nothing(machine) == []


def when_over(machine, log):
    """What a sweep in the background has printed by its end."""
    until = time.monotonic() + 300
    while any("sweeps/mask_ratio.py" in line for line in machine.processes()) and time.monotonic() < until:
        time.sleep(0.5)
    return plain((machine.home / log).read_text())


def wait_for_nothing(machine):
    """What still runs a while after all was stopped; the exit status of `ray down` says nothing about it."""
    until = time.monotonic() + 60
    while (left := machine.processes()) and time.monotonic() < until:
        time.sleep(0.5)
    return left
