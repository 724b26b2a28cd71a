"""A Ray cluster of one node on loopback, which offers one GPU that nobody has to have."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def serving(log: Path, **environment: str) -> Iterator[str]:
    """The address to which jobs are submitted; jobs have the environment besides their own."""
    # Sockets below the folder: their paths must be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="r") as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        for name, value in environment.items():
            patch.setenv(name, value)
        address = f"http://127.0.0.1:{(dashboard := _free_port())}"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        command += ["--node-ip-address", "127.0.0.1", "--port", str(_free_port())]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        command += ["--num-cpus", "4", "--num-gpus", "1", "--temp-dir", folder]
        command += ["--object-store-memory", str(100 * 2**20)]
        with log.open("w") as file:
            head = subprocess.Popen(
                command, stdout=file, stderr=file, env=dict(os.environ), start_new_session=True
            )
        try:
            deadline = time.monotonic() + 120
            while not _answers(address):
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield address
        finally:
            head.terminate()  # ends what it has started
            try:
                head.wait(timeout=60)
            finally:
                _end_group(head.pid)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
