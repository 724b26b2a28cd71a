"""A toy study in real Dagster; the end-to-end tests' planted world where models are needed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # planted, bench

from planted import answer, build_world
from toy import Toy

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "1")
    with dg.DagsterInstance.ephemeral() as fresh:
        yield fresh


@pytest.fixture
def toy(tmp_path: Path, instance: dg.DagsterInstance) -> Toy:
    return Toy(tmp_path / "store", instance)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``coders`` and ``corpus``. Do not write in it."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def server() -> Iterator[FakeLLMServer]:
    """An ideal model."""
    with FakeLLMServer(answer) as started:
        yield started
