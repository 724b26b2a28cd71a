"""The settings that docs/deploy.md hands out are Dagster's, and hold no secret."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from autointerp_dagster.resources.versions import CHECKOUT

DEPLOY = CHECKOUT / "deploy"
RECORDS = {
    "workstation": "SqliteRunStorage",
    "gpu_node": "PostgresRunStorage",
    "cluster": "PostgresRunStorage",
}
"""Where Dagster keeps its runs, by place."""
HAS_RAY = importlib.util.find_spec("dagster_ray") is not None


@pytest.fixture(params=RECORDS)
def place(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_place_has_settings() -> None:
    assert {path.parent.name for path in DEPLOY.glob("*/dagster.yaml")} == RECORDS.keys()


def test_settings_make_an_instance(
    place: str, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOINTERP_POSTGRES_URL", postgres)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    shutil.copy(DEPLOY / place / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert type(instance.run_storage).__name__ == RECORDS[place]
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert instance.run_monitoring_enabled
        assert instance.get_settings("concurrency")["pools"]["granularity"] == "op"
        if place == "cluster" and HAS_RAY:
            launcher = instance.run_launcher
            assert (launcher.address, launcher.num_gpus) == ("http://127.0.0.1:8265", 0.5)


def test_settings_without_their_secret_say_which_variable_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTOINTERP_POSTGRES_URL", raising=False)
    shutil.copy(DEPLOY / "gpu_node" / "dagster.yaml", tmp_path)
    with pytest.raises(dg.DagsterInvalidConfigError, match="AUTOINTERP_POSTGRES_URL"):
        dg.DagsterInstance.from_config(str(tmp_path))


def test_services_start_programs_that_are_installed_and_listen_on_loopback(place: str) -> None:
    starts = [
        line.partition("=")[2].split()
        for unit in (DEPLOY / place).glob("*.service")
        for line in unit.read_text().splitlines()
        if line.startswith("ExecStart=")
    ]
    for program, *arguments in starts:
        assert (Path(sys.executable).parent / Path(program).name).exists(), program
        assert "-h" not in arguments or arguments[arguments.index("-h") + 1] == "127.0.0.1"
        assert ("-h" in arguments) == ("daemon" not in program)


def test_scripts_are_sound_bash(place: str) -> None:
    for script in (DEPLOY / place).glob("*.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)


def test_no_file_holds_a_password(place: str) -> None:
    for path in (DEPLOY / place).iterdir():
        for user, password in re.findall(r"://(\w+):([^@\s]+)@", path.read_text()):
            assert (user, password) == ("autointerp", "PASSWORD"), path
