"""A real ``dagster dev``: webserver, daemon and code server, as a person starts them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

STARTING_S = 120
SETTINGS = "telemetry: {enabled: false}\nnux: {enabled: false}\n"


class LiveDagster:
    """One server with its daemon."""

    def __init__(self, folder: Path, studies: Path, settings: str = SETTINGS) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        home = folder / "home"
        home.mkdir()
        (home / "dagster.yaml").write_text(settings)
        environment = os.environ | {
            "DAGSTER_HOME": str(home),
            "AUTOINTERP_STUDIES": str(studies),
            "OMP_NUM_THREADS": "1",
        }
        dagster = str(Path(sys.executable).parent / "dagster")
        command = ["env", "--default-signal=INT,TERM", dagster, "dev"]
        command += ["-m", "autointerp_dagster.definitions", "-h", "127.0.0.1", "-p", str(self.port)]
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=self.log, stderr=self.log
        )

    def ask(self, query: str, **variables: object) -> dict:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def is_up(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(timeout=60)
        self.log.close()
        return code


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(1)
