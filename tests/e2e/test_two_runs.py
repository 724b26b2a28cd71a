"""Two processes run one study on one store at the same time."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import dagster as dg
import pytest
from bench import Bench, Script

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.heads import read_heads
from autointerp_dagster.adapters.verifying import verify

RUN = """
import sys, time
from pathlib import Path
from autointerp_dagster.cli import app
folder = Path(sys.argv[1])
(folder / f"ready-{sys.argv[2]}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
app(["run", sys.argv[3]])
"""
"""The second run begins when the first does, however long either takes to be loaded."""


def run_twice(bench: Bench, folder: Path) -> list[str]:
    """The damage that a third one has seen meanwhile."""
    environment = os.environ | {"DAGSTER_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(folder)]
    logs = [folder / f"log-{name}" for name in "ab"]
    runs = [
        subprocess.Popen(
            [*command, log.name[-1], str(bench.path)],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for log in logs
    ]
    stop, seen = threading.Event(), list[str]()

    def watch() -> None:
        while not stop.wait(0.1):
            seen.extend(read_heads(bench.store, bench.name).damaged.values())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        while not all((folder / f"ready-{name}").exists() for name in "ab"):
            assert all(run.poll() is None for run in runs), [log.read_text() for log in logs]
        (folder / "go").touch()
        codes = [run.wait(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
        stop.set()
        watcher.join()
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_two_runs_of_a_study_at_once_end_as_one(
    small: Bench, script: Script, tmp_path: Path, monkeypatch, request, kind: str
) -> None:
    monkeypatch.setenv("AUTOINTERP_CACHE", str(tmp_path / "cache"))
    script.latency_s = lambda number: 0.02
    overrides = dict(small.overrides)
    if kind == "s3":
        overrides["store"] = request.getfixturevalue("s3").new_root()
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    # Dagster's SQLite is made before the two begin: made by both at once, it is spoilt.
    with dg.DagsterInstance.from_config(str(home)) as instance:
        bench = Bench(tmp_path, small.world, small.base_url, instance, overrides)
        assert run_twice(bench, tmp_path) == []
        assert bench.stale() == set()
    assert bench.contents() == small.contents()
    assert verify(bench.store, bench.name).faults == []
    files = list_files(bench.store.root, "")
    assert [path for path in files if path.endswith((".tmp", ".new"))] == []
    assert [path for path in files if path.startswith("journal-wal/")] == []
    manifests = [path for path in files if path.startswith("token_dataset/")]
    assert 1 <= len(manifests) <= 2  # two where neither found the other's: at the same moment
    runs = {head.provenance.run_id for head in bench.heads().values()}
    assert len(runs) > 1
