"""Builders for the tests of the LLM layer."""

from autointerp_dagster.adapters.llm.client import Backoff
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.llm import JournalBlock, LabelList, Message, Request

BLOCK = JournalBlock("score_detection", "c0ffee", 0)
FAST = Backoff(first_s=0.002, longest_s=0.01)


def ask(question: str, n: int = 2, **parameters) -> Request:
    """A request whose right answer :func:`count_of` knows."""
    return Request(
        messages=(Message("system", "Count."), Message("user", question)),
        answer=LabelList(n),
        unit="unit",
        block=BLOCK,
        **parameters,
    )


def questions(n: int) -> list[Request]:
    return [ask(f"question {i}") for i in range(n)]


def count_of(messages: list[dict[str, str]]) -> str:
    """``[1, 0]`` for even questions, ``[0, 1]`` for odd ones."""
    asked = next(m["content"] for m in messages if m["content"].startswith("question"))
    return "[1, 0]" if int(asked.split()[1]) % 2 == 0 else "[0, 1]"


def remote(base_url: str, **changes) -> RemoteLLMConfig:
    return RemoteLLMConfig(base_url=base_url, model="fake", **changes)
