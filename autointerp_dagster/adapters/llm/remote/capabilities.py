"""What a server can do, learnt from its first answers, so that nothing is paid only to find out."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.remote.body import STRUCTURED, Feature
from autointerp_dagster.adapters.llm.remote.reply import follows_schema
from autointerp_dagster.core.llm import Request

TRIAL_WAIT_S = 2.0
"""How long others wait for the first request: a refusal is quick, an answer need not be."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server was seen to do; null where nothing was asked that would tell."""

    structured_outputs: bool | None = None
    """Every answer asked for with a schema had its form. False: the server refuses schemas, or
    takes them and answers as it likes."""
    log_probabilities: bool | None = None
    """Of what the model writes. False: the server refuses, or takes the wish and gives none."""
    seed: bool | None = None
    """Whether a seed is taken; whether it is heeded cannot be seen."""
    prompt_log_probabilities: bool | None = None
    """Of a prompt's own tokens, each at its own place."""

    def to_json(self) -> dict[str, bool]:
        """What is known, for manifests."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Learnt:
    """What one backend has learnt of its server. For one event loop."""

    def __init__(self, name: str, lacks: Iterable[Feature] = ()) -> None:
        """Start with what need not be tried.

        Args:
            name: The server's, for the log.
            lacks: Features that are not to be used.
        """
        self._name = name
        self._lacks = set(lacks)
        self._taken: set[Feature] = set()
        self._taken_with: dict[tuple[bool, type], set[Feature]] = {}
        self._trial = asyncio.Lock()
        self._follows: bool | None = None
        self._has_logprobs: bool | None = None
        self._warned: set[str] = set()
        self.prompt_scores: bool | None = None
        """Whether log-probabilities of prompts can be had; null before the first wish for them."""

    @property
    def lacks(self) -> frozenset[Feature]:
        """What the server refused so far."""
        return frozenset(self._lacks)

    @property
    def capabilities(self) -> Capabilities:
        """As far as they are known."""
        return Capabilities(
            structured_outputs=self._structured(),
            log_probabilities=False if "logprobs" in self._lacks else self._has_logprobs,
            seed=False if "seed" in self._lacks else ("seed" in self._taken or None),
            prompt_log_probabilities=self.prompt_scores,
        )

    @asynccontextmanager
    async def trial(self, features: Iterable[Feature]) -> AsyncIterator[None]:
        """Let one request at a time, or none for long, try what no request has tried yet."""
        is_mine = False
        if not self.knows(features):
            with suppress(TimeoutError):
                async with asyncio.timeout(TRIAL_WAIT_S):
                    is_mine = await self._trial.acquire()
        if is_mine and self.knows(features):  # found out while we waited
            self._trial.release()
            is_mine = False
        try:
            yield
        finally:
            if is_mine:
                self._trial.release()

    def refused(self, features: Iterable[Feature]) -> None:
        """The server answered only once it was asked without these."""
        for feature in set(features) - self._lacks:
            logger.warning("%s does not support %s; going on without.", self._name, feature)
            self._lacks.add(feature)

    def taken_with(self, request: Request) -> frozenset[Feature]:
        """What the server took in requests of this kind: same endpoint, same form of answer."""
        return frozenset(self._taken_with.get(_kind(request), ()))

    def took(self, request: Request, features: Iterable[Feature]) -> None:
        """The server answered a request with these features."""
        self._taken_with.setdefault(_kind(request), set()).update(features)

    def answered(self, request: Request, reply: Reply, features: Iterable[Feature]) -> None:
        """The server took a request with these features, and gave this reply."""
        features = set(features)
        self._taken |= features
        if features & set(STRUCTURED) and self._follows is not False:
            follows = follows_schema(reply, request)
            self._follows = self._follows if follows is None else follows
            if follows is False:
                self._warn("takes a schema for its answers, but does not keep to it")
        if "logprobs" in features and reply.text:
            self._has_logprobs = bool(self._has_logprobs) or reply.tokens is not None
            if not self._has_logprobs:
                self._warn("takes the wish for log-probabilities, but gives none")

    def _structured(self) -> bool | None:
        if "response_format" in self._lacks and not self._taken & set(STRUCTURED[1:]):
            return False
        return self._follows

    def knows(self, features: Iterable[Feature]) -> bool:
        """Whether nothing is left to try of these."""
        return set(features) <= self._taken | self._lacks

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s %s.", self._name, what)


def _kind(request: Request) -> tuple[bool, type]:
    return request.prompt is None, type(request.answer)
