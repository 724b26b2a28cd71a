import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from llm_requests import FAST, ask, questions
from managed_servers import Served
from upath import UPath

from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.managed.backend import ManagedBackend
from autointerp_dagster.adapters.llm.managed.servers import ManagedServers
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend
from autointerp_dagster.core.errors import LLMError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.fixture
def servers() -> Iterator[ManagedServers]:
    with ManagedServers(grace_s=0.5, max_restarts=2) as servers:
        yield servers


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(UPath(tmp_path / "store")) as journal:
        yield journal


def backend_of(served: Served, servers: ManagedServers, *options: str, **changes) -> ManagedBackend:
    return ManagedBackend(served.config(*options, **changes), servers, served.log_dir)


def test_a_check_starts_nothing_and_names_what_is_missing(served, servers, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    asyncio.run(backend_of(served, servers).check())
    with pytest.raises(LLMError, match="'no-such-program' is not a program"):
        asyncio.run(backend_of(served, servers, serve="no-such-program {port}").check())
    with pytest.raises(LLMError, match="NO_SUCH_KEY is not set"):
        asyncio.run(backend_of(served, servers, api_key_env="NO_SUCH_KEY").check())
    assert served.processes() == []


def test_identity_is_that_of_the_command_wherever_the_server_listens(served, servers):
    backend = backend_of(served, servers)
    assert backend.identity == f"{backend._config.serve}|tiny"
    elsewhere = backend._config.at("http://127.0.0.1:2345/v1")
    assert OpenAIBackend(elsewhere).identity == backend.identity


def test_the_first_calls_start_one_server_without_blocking_the_loop(served, servers):
    backend = backend_of(served, servers)

    async def ask_and_count() -> tuple[list[str | None], int]:
        calls = asyncio.gather(*(backend.ask([request]) for request in questions(5)))
        n_turns = 0
        while not calls.done():
            n_turns += 1
            await asyncio.sleep(0.01)
        await backend.close()
        return [reply.text for (reply,) in await calls], n_turns

    texts, n_turns = asyncio.run(ask_and_count())
    assert texts == ["[1, 0]"] * 5
    assert n_turns >= 10  # the start alone takes 0.25 s
    assert len(served.living()) == 1  # closing a backend is not the end of the run


def test_a_server_that_dies_again_and_again_loses_no_request(served, servers, journal):
    backend = backend_of(served, servers, "--die-after", "5", max_in_flight=1)
    with JournaledLLM(backend, journal, backoff=FAST) as llm:
        completions = [completion for _, completion in llm.answer(questions(12))]
    assert [completion.reason for completion in completions] == [None] * 12
    assert len(served.processes()) == 3  # 5 + 5 + 2 answers


def test_a_server_killed_under_many_calls_loses_none(served, servers, journal):
    backend = backend_of(served, servers, max_in_flight=8)
    with JournaledLLM(backend, journal, backoff=FAST) as llm:
        answered = 0
        for _, completion in llm.answer(questions(60)):
            assert completion.reason is None
            answered += 1
            if answered == 20:
                os.kill(served.living()[0], signal.SIGKILL)
    assert answered == 60
    assert len(served.processes()) == 2


def test_a_server_that_dies_too_often_ends_the_run_with_its_log(served, servers, journal):
    backend = backend_of(served, servers, "--die-after", "0", "--say", "out of memory")
    with (
        JournaledLLM(backend, journal, backoff=FAST) as llm,
        pytest.raises(LLMError, match=r"3 times \(exit code 7 at last\)(.|\n)*out of memory"),
    ):
        list(llm.answer([ask("question 0")]))
    assert len(served.processes()) == 3


def test_a_server_that_does_not_start_is_not_tried_for_every_request(served, servers, journal):
    backend = backend_of(served, servers, "--exit", "4", max_in_flight=4)
    with (
        JournaledLLM(backend, journal, backoff=FAST) as llm,
        pytest.raises(LLMError, match="exit code 4"),
    ):
        list(llm.answer(questions(20)))
    assert len(list(served.log_dir.iterdir())) == 1


def test_a_journal_answers_without_starting_a_server(served, servers, journal):
    with JournaledLLM(backend_of(served, servers), journal, backoff=FAST) as llm:
        list(llm.answer(questions(3)))
    servers.close()
    with JournaledLLM(backend_of(served, servers), journal, backoff=FAST) as llm:
        assert all(completion.from_journal for _, completion in llm.answer(questions(3)))
    assert len(served.processes()) == 1


def test_a_step_given_up_while_the_server_starts_leaves_it_to_the_next(served, servers):
    async def give_up() -> None:
        backend = backend_of(served, servers)
        asking = asyncio.create_task(backend.ask([ask("question 0")]))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.wait([asking])
        await backend.close()

    asyncio.run(give_up())
    replies = asyncio.run(backend_of(served, servers).ask([ask("question 0")]))
    assert [reply.text for reply in replies] == ["[1, 0]"]
    assert len(served.processes()) == 1
