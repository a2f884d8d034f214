"""Random faults under a running sweep, for ``make torture``: whatever happens, the same command finishes it.

``python tests/torture/faults.py --seeds 0-49`` appends a line a seed to benchmarks/faults.jsonl and draws
benchmarks/FAULTS.md from all of them. A seed says everything: the setting, the faults, their moments and victims. Seeds
that are there with the same code are passed over, so a batch that was cut short goes on.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import conftest  # noqa: F401 - the environment of the tests
from commands import MASK_RATIO, ROOT, Running
from nodes import Nodes
from servers import Door, MlflowServer
from storage import BUCKET, s3
from tiny import set_flags
from written import assert_once, table

from sddit.environment import source_digest
from sddit.tracking import code_revision, open_client

RECORD, REPORT = (ROOT / "benchmarks" / name for name in ("faults.jsonl", "FAULTS.md"))
EVERY, STEPS = 40, 400  # half a minute of training, undisturbed
TINY = {"eval__every": EVERY, "train__log_every": 5, "eval__samples": 200, "method__mask_ratio": "[0.2, 0.5]"}
LIMIT = 600  # seconds that a command may take once nothing disturbs it
DISK_MIB = 64

SIGNALS = ("killed", "stopped", "stopped, then killed")
PROCESSES = {"trial": "ray::ImplicitFunc", "worker": "ray::RayTrainWorker"}  # how their titles begin
COMMON = [f"{victim} {what}" for victim in ("driver", "trial") for what in SIGNALS] + ["Ctrl-C", "clock jumps"]
OUTAGES = ["MLflow killed", "storage refuses", "storage slow"]
KINDS = {
    "one machine": [*COMMON, "raylet killed", "disk full"],
    "one machine, MLflow server, S3": [*COMMON, *OUTAGES],
    "three nodes, MLflow server, S3": [*COMMON, *OUTAGES, *(f"raylet {what}" for what in SIGNALS), "node lost"],
    "one machine, two workers a cell": [*COMMON, *(f"worker {what}" for what in SIGNALS)],
}
# How a command may end by itself, for the faults it met.
ENDINGS = {"Ctrl-C": 130, "disk full": 1} | dict.fromkeys(OUTAGES, 1)

# A patched clock, in every Python process of the sweep: psutil and Ray's own keep the true one.
CLOCK = """
import os, time
true, true_ns, state = time.time, time.time_ns, [-1.0, 0]

def jump():
    if time.monotonic() > state[0] + 0.2:
        state[0] = time.monotonic()
        try:
            with open(os.environ["SDDIT_TEST_CLOCK"]) as file:
                state[1] = int(file.read())
        except (KeyError, OSError, ValueError):
            state[1] = 0
    return state[1]

time.time = lambda: true() + jump()
time.time_ns = lambda: true_ns() + jump() * 10**9
"""


@dataclass
class Fault:
    kind: str
    training: bool  # whether it waits for a cell that trains
    after: float  # seconds, after that or after the fault before
    lasts: float  # seconds, of what has an end
    pick: float  # which of several victims, and which way
    happened: str = ""  # what it hit, once it did
    moment: str = ""  # when: the start of the command, its seconds, the last it had said of a cell


def draw(seed):
    """The setting of a seed, whether outages outlast the patience there, and its faults."""
    rng = random.Random(seed)
    setting = list(KINDS)[seed % len(KINDS)]

    def fault():
        what = rng.choice(list(dict.fromkeys(kind.split()[0] for kind in KINDS[setting])))
        kind = rng.choice([kind for kind in KINDS[setting] if kind.split()[0] == what])
        lasts = rng.uniform(1, 55 if kind.startswith("raylet") else 30)
        return Fault(kind, rng.random() < 0.7, rng.uniform(0, 12), lasts, rng.random())

    return setting, rng.random() < 0.5, [fault() for _ in range(rng.randint(3, 5))]


class Place:
    """Where a sweep runs and what it writes to."""

    def __init__(self, setting, folder, stack):
        self.folder, self.flags, self.env = folder, [], {}
        self.door = self.server = self.nodes = self.disk = None
        self.clock = folder / "clock"
        stack.enter_context(mock.patch.dict(os.environ, SDDIT_TEST_CLOCK=str(self.clock)))
        self.database, self.uri = folder / "mlflow.db", f"sqlite:///{folder}/mlflow.db"
        if "S3" in setting:
            client = stack.enter_context(s3())
            host, port = client.meta.endpoint_url.removeprefix("http://").split(":")
            self.door = Door(host, int(port))
            stack.callback(self.door.shut)
            door = f"http://127.0.0.1:{self.door.port}"
            stack.enter_context(mock.patch.dict(os.environ, AWS_ENDPOINT_URL=door))
            self.server = stack.enter_context(MlflowServer(folder, f"s3://{BUCKET}/artifacts"))
            self.database, self.uri = self.server.database, self.server.uri
            self.flags += ["--storage", f"s3://{BUCKET}/runs", "--tracking-uri", self.uri]
        if "disk full" in KINDS[setting] and (disk := small_disk(folder / "disk", stack)):
            self.disk = disk
            self.flags += ["--storage", f"{disk}/runs"]
        if "nodes" in setting:
            self.nodes = Nodes(1, 1, 1)
            stack.callback(self.nodes.close)
            self.env |= self.nodes.environment
        if "workers" in setting:
            self.flags += ["--workers", "2"]


def small_disk(path, stack):
    """A file system that is soon full; None where this machine does not let us mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", path]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    stack.callback(subprocess.run, ["umount", "--lazy", path], check=False)
    return path


def lives(pid):
    """A raylet that was stopped for long is given up, and ends when it learns of it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Torture:
    """A sweep's command, started again whenever it has ended, and what happens to it."""

    def __init__(self, place):
        self.place = place
        self.endings = []  # exit statuses of the starts before
        self.left = set()  # every process seen, so that none stays
        self.start()

    def start(self):
        self.met, self.begun = set(), time.monotonic()  # the faults of this start
        self.command = Running(
            MASK_RATIO, *set_flags(**TINY), "--steps", STEPS, *self.place.flags, cwd=self.place.folder, **self.place.env
        )

    def ended(self):
        return self.command.process.poll() is not None

    def judge(self):
        """Whether the command ended in a way that what happened to it explains."""
        status, output = self.command.process.returncode, self.command.output
        allowed = {0, *(ENDINGS[kind] for kind in self.met if kind in ENDINGS)}
        if {"driver killed", "driver stopped, then killed"} & self.met:
            allowed.add(-9)
        self.endings.append(status)
        if "raylet killed" in self.met and not self.place.nodes:  # the machine's end
            allowed.add(status)
        if "nothing was started" in output and any(kind.split()[0] in ("node", "raylet") for kind in self.met):
            allowed.add(1)  # the node went away while it was examined
        assert status in allowed, f"ended with {status} after {self.met or 'nothing'}:\n{output}"
        assert "Traceback" not in output, f"traceback after {self.met}:\n{output}"

    def watch(self, seconds, until=lambda: False):
        """Lets time go by, and keeps account of processes and nodes. Whether `until` came."""
        deadline = time.monotonic() + seconds
        while not (came := until()) and time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.left |= set(psutil.Process(self.command.process.pid).children(recursive=True))
            if nodes := self.place.nodes:
                nodes.raylets = {number: pid for number, pid in nodes.raylets.items() if lives(pid)}
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        return came

    def bear(self, fault):
        """Lets a fault happen after its time; starts the command again where it ended before."""
        trains = re.compile(r": running, step [1-9]")
        if fault.training:
            self.watch(LIMIT / 3, lambda: self.ended() or trains.search(self.command.output))
        deadline = time.monotonic() + fault.after
        while self.watch(deadline - time.monotonic(), self.ended):
            self.judge()
            self.start()
        self.met.add(fault.kind)
        begun = time.monotonic()
        said = re.findall(r"step (\d+)/", self.command.output)
        fault.moment = f"start {len(self.endings) + 1}, {begun - self.begun:.0f} s, step {said[-1] if said else 0}"
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has just ended by itself
            self.inject(fault)
        fault.lasts = round(time.monotonic() - begun, 1)
        while self.place.nodes and len(self.place.nodes.raylets) < 3:
            self.place.nodes.add()

    def inject(self, fault):
        """Does it to its victim, if there is one."""
        place, (what, _, how) = self.place, fault.kind.partition(" ")
        if what in ("driver", "raylet", *PROCESSES):
            self.signal(what, how, fault)
            return
        if fault.kind == "disk full" and not place.disk:
            return
        fault.happened = what
        if fault.kind == "Ctrl-C":
            self.command.interrupt()
            assert self.watch(90, self.ended), f"Ctrl-C did not end it:\n{self.command.output}"
        elif fault.kind == "clock jumps":
            fault.happened = "+3600 s" if fault.pick < 0.5 else "-3600 s"
            place.clock.write_text(fault.happened.split()[0])
        elif fault.kind == "disk full":
            full = place.disk / "full"
            with contextlib.suppress(OSError), open(full, "wb", buffering=0) as file:
                while file.write(bytes(2**20)):
                    pass
            self.watch(fault.lasts)
            full.unlink()
        elif fault.kind == "storage slow":
            place.door.delay = 0.05 + 0.45 * fault.pick
            self.watch(fault.lasts)
            place.door.delay = 0.0
        elif fault.kind == "node lost":
            number = sorted(place.nodes.raylets)[int(fault.pick * len(place.nodes.raylets))]
            fault.happened = f"node {number}"
            place.nodes.kill(number)
            self.watch(fault.lasts)
        else:
            ends, begins = {
                "MLflow killed": (place.server.stop, place.server.start),
                "storage refuses": (place.door.shut, place.door.open),
            }[fault.kind]
            ends()
            self.watch(fault.lasts)
            begins()

    def victims(self, what):
        nodes = self.place.nodes
        if what == "driver":
            return [psutil.Process(self.command.process.pid)]
        if what == "raylet" and nodes:
            return [psutil.Process(pid) for _, pid in sorted(nodes.raylets.items())]
        if nodes:
            return [process for _, found in sorted(nodes.running(PROCESSES[what]).items()) for process in found]
        family = psutil.Process(self.command.process.pid).children(recursive=True)
        begins = PROCESSES.get(what, what)
        return [p for p in family if p.name().startswith(begins)]

    def signal(self, what, how, fault):
        """SIGKILL or SIGSTOP, which SIGCONT or SIGKILL follows, to a process that may have to come up first."""
        self.watch(60, lambda: self.ended() or self.victims(what))
        if self.ended() or not (victims := self.victims(what)):
            return
        victim = victims[int(fault.pick * len(victims))]
        fault.happened = f"{what} {victims.index(victim) + 1} of {len(victims)}"
        if how != "killed":
            victim.suspend()
            self.watch(fault.lasts)
        if how == "stopped":
            victim.resume()
        else:
            victim.kill()
        if how != "stopped" and (what == "driver" or (what == "raylet" and not self.place.nodes)):
            assert self.watch(120, self.ended), f"the machine is gone, but not the command:\n{self.command.output}"

    def finish(self):
        """The same command finishes the sweep."""
        while True:
            assert self.watch(LIMIT, self.ended), f"not done after {LIMIT} s:\n{self.command.output}"
            self.judge()
            if self.command.process.returncode == 0:
                return
            self.start()

    def close(self):
        """No process of the sweep stays."""
        with contextlib.suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.command.process.pid)
            self.left |= {driver, *driver.children(recursive=True)}
        for process in self.left:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in [*process.children(recursive=True), process]:
                    one.kill()
        self.command.process.wait()


def written(place):
    """What the sweep left: its table, and the key and step of every point. Each cell and grid is there, and once."""
    cells = assert_once(place.database, "mask_ratio", place.uri, every=EVERY, steps=STEPS)
    client, identities = open_client(place.uri), {}
    for identity, run in cells["run_id"].items():
        identities[run] = identity
        grids = [a.path for a in client.list_artifacts(run, "images") if a.path.endswith(".png")]
        steps = sorted(int(path.split("+")[2]) for path in grids)
        assert steps == list(range(0, STEPS + 1, EVERY)), f"grids at {steps}"
    with contextlib.closing(sqlite3.connect(f"file:{place.database}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT run_uuid, key, step FROM metrics").fetchall()
    return table("mask_ratio", place.uri), {(identities[run], key, step) for run, key, step in rows}


def undisturbed(setting, folder):
    """The same of a sweep to which nothing happens. Where a cell's number of workers is the same, so is the result."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        place = Place(setting, folder, stack)
        torture = Torture(place)
        stack.callback(torture.close)
        torture.finish()
        assert torture.endings == [0]
        return written(place)


def run(seed, folder, expected):
    """The line of a seed in the record."""
    setting, impatient, faults = draw(seed)
    begun, reason, torture = time.monotonic(), "", None
    folder.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            place = Place(setting, folder, stack)
            if impatient:
                place.env["SDDIT_PATIENCE_SECONDS"] = "10"
            torture = Torture(place)
            stack.callback(torture.close)
            for fault in faults:
                torture.bear(fault)
                print(f"  {fault.moment}: {fault.kind}: {fault.happened or 'no victim'}", flush=True)
            torture.finish()
            found, points = written(place)
            assert found.equals(expected[0]), f"another result:\n{found.compare(expected[0])}"
            assert points == expected[1], f"other points: {sorted(points ^ expected[1])[:20]}"
    except Exception as error:  # whatever it is, the batch goes on
        reason = f"{type(error).__name__}: {error}"
    rows = [row[:400] for row in reason.splitlines() if not re.match(r"\s+[\[(]|.*\(raylet\)", row)]  # Ray's own noise
    reason = "\n".join(rows)
    for name, public in (
        (str(folder), "…"), (str(ROOT), "."), (sys.base_prefix, "python"), (socket.gethostname(), "host"),
    ):  # fmt: skip
        reason = reason.replace(name, public)
    return {
        "seed": seed,
        "setting": setting,
        "patience_s": 10 if impatient else 600,
        "faults": [
            {"kind": f.kind, "moment": f.moment, "lasted": round(f.lasts, 1), "hit": f.happened} for f in faults
        ],
        "survived": not reason,
        "reason": reason if len(reason) < 2000 else f"{reason[:500]}\n…\n{reason[-1500:]}",
        "endings": torture.endings if torture else [],  # exit statuses of all starts
        "seconds": round(time.monotonic() - begun),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(lines):
    """FAULTS.md: the latest run of each seed counts; what did not survive is named for ever."""
    latest = {line["seed"]: line for line in lines}
    met, survived = Counter(), Counter()
    for line in latest.values():
        for fault in line["faults"]:
            if fault["hit"]:
                met[fault["kind"], line["setting"]] += 1
                survived[fault["kind"], line["setting"]] += line["survived"]
    injected = sum(bool(fault["hit"]) for line in lines for fault in line["faults"])
    seeds = f"{sum(line['survived'] for line in latest.values())} of {len(latest)} sweeps"
    text = [
        "# Random faults",
        "",
        "Several random faults to each sweep of two tiny cells, at random moments; a seed says which. `make torture "
        "SEEDS=0-49` runs the seeds that are missing for the code as it is and appends them to `faults.jsonl`, from "
        "which this page is made. After the faults the same command has to finish the sweep: exit status 0, every "
        "point and grid once and none missing, the table bit for bit that of an undisturbed sweep. In between it may "
        "end only as the fault explains (130 after Ctrl-C, 1 with the cause after an outage), never with a traceback.",
        "",
        f"**{sum(survived.values())} of {sum(met.values())} faults survived, {seeds}** (latest run of each seed, "
        f"revisions {', '.join(sorted({line['revision'] for line in latest.values()}))}; with earlier runs {injected} "
        f"faults in {len(lines)} sweeps). A fault counts as survived where its whole sweep did. Survived / injected:",
        "",
        "| | " + " | ".join(KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
    ]
    for kind in dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds):
        cells = [
            f"{survived[kind, s]} / {met[kind, s]}" if met[kind, s] else "0" if kind in KINDS[s] else "–" for s in KINDS
        ]
        text.append(f"| {kind} | " + " | ".join(cells) + " |")
    text += [
        "",
        "Stopped processes (SIGSTOP) go on or are killed within a minute; a node that was lost comes back. A raylet "
        "killed on one machine is that machine's end. Clocks jump by an hour, either way. Outages last up to half a "
        "minute, in half of the sweeps longer than the patience (`SDDIT_PATIENCE_SECONDS=10`). The full disk is a "
        "small mount; where none can be mounted, that fault is left out. Nodes are simulated on one machine.",
        "",
        "## Not survived",
        "",
    ]
    failed = [line for line in lines if not line["survived"]]
    for line in failed:
        faults = "; ".join(f"{f['kind']} ({f['hit']})" for f in line["faults"] if f["hit"])
        again = ", survived later" if latest[line["seed"]]["survived"] else ""
        where = f"{line['setting']}, {line['date']}, revision {line['revision']}{again}"
        text += [f"Seed {line['seed']}, {where}: {faults}", ""]
        text += [*(f"    {row}" for row in line["reason"].splitlines()), ""]
    return "\n".join(text if failed else [*text, "None.", ""])


def main():
    # In the background a shell has it ignored, and so would the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0-4", help="as in 0-49 or 3,7")
    parser.add_argument("--again", action="store_true", help="also seeds that are in the record")
    parser.add_argument("--keep", type=Path, help="a folder in which everything is left")
    options = parser.parse_args()
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part).groups() for part in options.seeds.split(",")]
    seeds = list(dict.fromkeys(s for first, last in parts for s in range(int(first), int(last or first) + 1)))

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's requests
    about = {"revision": code_revision(), "source": source_digest()}
    lines = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    there = {line["seed"] for line in lines if line["source"] == about["source"]}
    root = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    (root / "site").mkdir(parents=True)
    (root / "site" / "sitecustomize.py").write_text(CLOCK)
    os.environ["PYTHONPATH"] = str(root / "site")
    expected = {}  # by the number of workers
    try:
        for seed in seeds:
            if seed in there and not options.again:
                continue
            setting = draw(seed)[0]
            if (workers := "workers" in setting) not in expected:
                base = "one machine, two workers a cell" if workers else "one machine"
                expected[workers] = undisturbed(base, root / f"undisturbed-{len(expected)}")
            print(f"Seed {seed}: {setting}", flush=True)
            line = run(seed, root / str(seed), expected[workers]) | about
            print(f"  {'survived' if line['survived'] else line['reason']} ({line['seconds']} s)", flush=True)
            lines.append(line)
            with open(RECORD, "a") as file:
                file.write(json.dumps(line) + "\n")
            REPORT.write_text(report(lines))
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    here = {line["seed"]: line["survived"] for line in lines if line["source"] == about["source"]}
    return 0 if all(here.get(seed) for seed in seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
