"""A Postgres server of its own, from whatever version is installed."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_USER = "autointerp"
_PASSWORD = "not-a-secret"
_DEBIAN = "/usr/lib/postgresql"


def _folder_of_programs() -> Path:
    on_path = shutil.which("initdb")
    found = sorted(Path(_DEBIAN).glob("*/bin"), key=lambda path: int(path.parent.name))
    if on_path is None and not found:
        pytest.skip(f"no Postgres on the PATH or in {_DEBIAN} (apt-get install postgresql)")
    return Path(on_path).resolve().parent if on_path else found[-1]


def _as_whom() -> dict[str, Any]:
    """Postgres refuses to be run by root."""
    return {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving() -> Iterator[str]:
    """The URL of an empty database on loopback; skips the test if Postgres is not installed."""
    programs, whom, port = _folder_of_programs(), _as_whom(), _free_port()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        if whom:
            shutil.chown(folder, whom["user"], whom["group"])
        (folder / "password").write_text(_PASSWORD)
        (folder / "password").chmod(0o644)
        making = [programs / "initdb", "-D", folder / "data", "-U", _USER, "-A", "scram-sha-256"]
        making += ["--pwfile", folder / "password", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run(making, check=True, capture_output=True, cwd=folder, **whom)
        serve = [programs / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port)]
        serve += ["-k", folder, "-c", "fsync=off"]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(serve, stdout=log, stderr=log, cwd=folder, **whom)
        try:
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            deadline = time.monotonic() + 60
            while subprocess.run(ready, check=False).returncode != 0:
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield f"postgresql://{_USER}:{_PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()  # ends when nobody is connected any more
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a database."""
    with serving() as url:
        yield url
