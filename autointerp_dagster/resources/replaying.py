"""A language model of a study as the journal knows it: nothing is sent, everything is noted."""

from collections import deque
from collections.abc import Iterable, Iterator

from autointerp_dagster.adapters.llm import Journal, JournaledLLM, open_backend
from autointerp_dagster.core.config import LLMConfig, RemoteLLMConfig
from autointerp_dagster.core.llm import Completion, Request

_NOWHERE = "http://127.0.0.1/v1"
"""Stands for the address of a server that is not started: nothing is sent there."""

Heard = deque[tuple["Replayed", Request, Completion]]


class Replayed:
    """A model whose answers come from the journal alone; an ``LLM``."""

    def __init__(self, config: LLMConfig, journal: Journal, heard: Heard) -> None:
        """Describe the model; nothing is started, asked or loaded.

        Args:
            config: As the study describes it.
            journal: Where its answers are.
            heard: Is given every question with its answer.

        Raises:
            ModelError: If a local model cannot be found.
        """
        self.config = config
        self._missing: dict[str, Request] = {}
        self._heard = heard
        self._llm = JournaledLLM(
            open_backend(unserved(config)),
            journal,
            mode="replay",
            on_missing=self._note,
        )
        self.identity = self._llm.identity

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """See :class:`~autointerp_dagster.core.llm.LLM`."""
        for request, completion in self._llm.answer(requests):
            sent = self._missing.pop(completion.call_id, request)
            self._heard.append((self, sent, completion))
            yield request, completion

    def close(self) -> None:
        """End its background thread."""
        self._llm.close()

    def _note(self, request: Request, call_id: str) -> None:
        self._missing[call_id] = request


def unserved(config: LLMConfig) -> LLMConfig:
    """The same model, its identity included, for somebody who asks it nothing.

    A server that a run would start is not started for it.
    """
    if isinstance(config, RemoteLLMConfig) and config.serve is not None:
        return config.at(_NOWHERE)
    return config
