"""Servers on loopback that a test stops and starts again: MLflow's own, and a door in front of any other."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from commands import environment

from sddit.serve import SETTINGS


def free_port():
    """Below those that the system gives to clients: none takes it while a server is not up yet, or is down."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class MlflowServer:
    """MLflow's tracking server on a sqlite file in `folder`, artifacts on `artifacts`; always at the same `uri`."""

    def __init__(self, folder, artifacts):
        self.port = free_port()
        self.uri, self.database = f"http://127.0.0.1:{self.port}", Path(folder) / "server.db"
        self.artifacts, self.log = artifacts, Path(folder) / "server.log"
        self.start()

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", self.port,
            "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", self.artifacts,
        ]  # fmt: skip
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=environment(**SETTINGS), stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def stop(self):
        """As a machine that goes down: nobody is told."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Door:
    """A port of its own that leads to another; while it is shut, connections are refused and open ones end. Each piece
    of data takes `delay` seconds."""

    def __init__(self, host, port):
        self.target = (host, port)
        self.port = free_port()
        self.joined = set()
        self.delay = 0.0
        self.open()

    def open(self):
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def shut(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for end in list(self.joined):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener):
        while True:
            try:
                inside, outside = listener.accept()[0], socket.create_connection(self.target)
            except OSError:
                return
            self.joined |= {inside, outside}
            for source, sink in ((inside, outside), (outside, inside)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay)
                sink.sendall(data)
        for end in (source, sink):
            self.joined.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
