"""The planted world, a fake model, and studies materialized once for all tests of this folder."""

import random
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from bench import SMALL, Bench, Script, in_flight
from planted import build_world

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer

_SCRIPT = Script()


@pytest.fixture(scope="session", autouse=True)
def _no_telemetry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_DISABLE_TELEMETRY", "1")
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``coders`` and ``corpus``. Do not write in it."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def server() -> Iterator[FakeLLMServer]:
    """One server for all tests, so that its address, a part of the model's identity, is one."""
    with _SCRIPT.server() as started:
        yield started


@pytest.fixture
def script() -> Iterator[Script]:
    """What the server does in this test."""
    yield _SCRIPT
    _SCRIPT.reset()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as fresh:
        yield fresh


@pytest.fixture(scope="session")
def whole(
    world: Path, server: FakeLLMServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """The whole study, materialized. Do not run it again."""
    with dg.DagsterInstance.ephemeral() as kept:
        bench = Bench(tmp_path_factory.mktemp("whole"), world, server.base_url, kept)
        bench.run()
        yield bench


@pytest.fixture(scope="session")
def small(
    world: Path, server: FakeLLMServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """A small study, materialized by one request at a time. Do not run it again."""
    overrides = {**SMALL, "models": in_flight(1)}
    with dg.DagsterInstance.ephemeral() as kept:
        folder = tmp_path_factory.mktemp("small")
        bench = Bench(folder, world, server.base_url, kept, overrides)
        bench.run()
        yield bench


@pytest.fixture
def lots() -> random.Random:
    """For delays only: nothing that a result may depend on."""
    return random.Random(0)
