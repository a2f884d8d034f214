"""A Ray cluster of several nodes on this machine, in a process of its own, that loses and gains nodes when told to.

As a script it keeps Ray's own `Cluster` and takes commands from its standard input, one a line:
``python nodes.py CPUS…`` starts a head without CPUs and a node for each number.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil


class Nodes:
    """The cluster as a test sees it. `environment` is what a command needs to join it.

    `hide` is a folder that no process of the cluster sees (where this system lets us): they have an empty one of the
    same name, as on other machines.
    """

    def __init__(self, *cpus, hide=None):
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets have short names only
        token = Path(self.folder) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        guarded = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        apart = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hide)]
        allowed = hide and subprocess.run([*apart, "true"], capture_output=True, check=False).returncode == 0
        self.process = subprocess.Popen(
            [*(apart if allowed else []), sys.executable, __file__, *map(str, cpus)],
            env=os.environ | guarded | loopback | {"RAY_TMPDIR": self.folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(f"{self.folder}/nodes.log", "w"),  # noqa: SIM115
            text=True,
            start_new_session=True,
        )
        started = self._answer()
        self.raylets = dict(enumerate(started["raylets"]))  # node → process id of its raylet
        self.environment = {"RAY_ADDRESS": started["address"], **guarded, **loopback}

    def add(self, cpus=1, **environment):
        """A node more, with variables of its own. Returns its number."""
        number = max(self.raylets) + 1
        self.raylets[number] = self._ask("add", cpus, environment)
        return number

    def kill(self, number):
        """A machine that is gone at once, with all that ran on it."""
        raylet = psutil.Process(self.raylets.pop(number))
        for process in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._ask("kill", number)

    def terminate(self, number):
        """A machine that is taken back: SIGTERM to the node's own process, which ends what runs there."""
        os.kill(self.raylets.pop(number), signal.SIGTERM)

    def running(self, name):
        """Node → processes there whose title begins with `name`, such as ray::RayTrainWorker; only nodes with some."""
        found = {}
        for number, pid in self.raylets.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(pid).children(recursive=True)
                found[number] = [p for p in children if _title(p).startswith(name)]
        return {number: processes for number, processes in found.items() if processes}

    def close(self):
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        for process in family:  # what did not end by itself
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, *command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)["answer"]
        raise AssertionError(Path(self.folder, "nodes.log").read_text())


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _serve(cpus):
    from ray.cluster_utils import Cluster

    def answer(value):
        print(json.dumps({"answer": value}), flush=True)

    def start(count, environment=None):
        node = cluster.add_node(num_cpus=count, object_store_memory=100 * 2**20, env_vars=environment or {})
        return node, node.all_processes["raylet"][0].process.pid

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes, raylets = map(list, zip(*(start(count) for count in cpus), strict=True))
    answer({"address": cluster.address, "raylets": raylets})
    for line in sys.stdin:
        name, number, *more = json.loads(line)
        if name == "add":
            node, raylet = start(number, *more)
            nodes.append(node)
            answer(raylet)
        else:
            cluster.remove_node(nodes[number], allow_graceful=False)
            answer(None)
    cluster.shutdown()


if __name__ == "__main__":
    _serve([int(count) for count in sys.argv[1:]])
