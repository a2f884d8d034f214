"""What others can reach and read of a sweep on one machine (docs/security.md): nothing beyond it, and no secret."""

import ipaddress
import re
from pathlib import Path

import psutil
import pytest
from commands import MASK_RATIO, Running, sweep
from servers import MlflowServer
from tiny import set_flags

pytestmark = pytest.mark.slow

PLANTED = "planted-0451"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{PLANTED}-aws",
    "MLFLOW_TRACKING_PASSWORD": f"{PLANTED}-mlflow",
    "HF_TOKEN": f"{PLANTED}-hub",
    "RAY_AUTH_TOKEN": f"{PLANTED}-ray-{'0' * 24}",
    "DATABASE_URL": f"postgresql://me:{PLANTED}-database@host/db",
}


def listening(process):
    """(address, port, command) of every socket that a process and those below it listen on."""
    for each in [process, *process.children(recursive=True)]:
        try:
            for socket in each.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    yield socket.laddr.ip, socket.laddr.port, " ".join(each.cmdline())[:80]
        except psutil.Error:
            continue


def is_loopback(address):
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_but_loopback_listens_and_no_secret_is_written(workers, tmp_path):
    flags = [*set_flags(method__mask_ratio="[0.2]", eval__every=20), "--steps", "20", "--workers", str(workers)]
    running = Running(MASK_RATIO, *flags, cwd=tmp_path, **SECRETS)
    running.wait_for_step(0)
    family = psutil.Process(running.process.pid)
    sockets = set(listening(family))
    assert len(sockets) > 3, "Ray's processes listen"
    assert [each for each in sockets if not is_loopback(each[0])] == []
    assert running.wait() == 0, running.output

    assert_nothing_planted(running.output, tmp_path)


def assert_nothing_planted(output, folder):
    """In what was said, in the folder (record, artifacts, report, checkpoints) and in Ray's logs."""
    (logs,) = re.findall(r"Logs of Ray and of the cells: (\S+)", output)
    files = [f for f in [*folder.rglob("*"), *Path(logs).rglob("*")] if f.is_file()]
    assert len(files) > 20
    assert PLANTED not in output
    assert [file for file in files if PLANTED.encode() in file.read_bytes()] == []


def test_a_password_in_the_address_of_the_record_is_not_repeated(tmp_path):
    with MlflowServer(tmp_path, tmp_path / "artifacts") as server:
        address = server.uri.replace("://", f"://me:{PLANTED}@")
        done = sweep("--tracking-uri", address, cwd=tmp_path, ratios="[0.2]")
        assert done.returncode == 0, done.stdout + done.stderr
        assert_nothing_planted(done.stdout + done.stderr, tmp_path)
    refused = sweep("--tracking-uri", address, cwd=tmp_path)
    assert refused.returncode == 1 and "cannot be reached" in refused.stderr
    assert PLANTED not in refused.stdout + refused.stderr
