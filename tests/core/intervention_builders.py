"""Hand-made interventions, and base models with made-up rules."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from autointerp_dagster.core.interventions.record import Intervention, SteeredPrompt
from autointerp_dagster.core.llm import (
    Completion,
    Continuation,
    JournalBlock,
    PromptScores,
    Request,
    Token,
)
from autointerp_dagster.core.types import LatentId

LATENT = LatentId("sae", "layers.3", 17)
BLOCK = JournalBlock("score_intervention", "c0de", 0)


def scoring(number: int = 0, clean: str | None = " a road", steered: str | None = " a fish",
            prompt: str = "They came upon", quintile: int = 2) -> SteeredPrompt:  # fmt: skip
    return SteeredPrompt(
        window_id=number << 16 | 9,
        is_for_explainer=False,
        quintile=quintile,
        activation=1.5,
        prompt=prompt,
        clean=clean,
        steered=steered,
        promoted=(),
        rises=(),
    )


def explaining(
    number: int = 0,
    promoted: Sequence[str] = (" fish", " trout"),
    rises: Sequence[float] = (0.25, 0.125),
    prompt: str = "They came upon",
) -> SteeredPrompt:
    return SteeredPrompt(
        window_id=number << 16 | 9,
        is_for_explainer=True,
        quintile=2,
        activation=1.5,
        prompt=prompt,
        clean=None,
        steered=None,
        promoted=tuple(promoted),
        rises=tuple(rises),
    )


def intervention(
    prompts: Sequence[SteeredPrompt] = (), *, status: str = "ok", target: float = 1.0,
    latent: LatentId = LATENT,
) -> Intervention:  # fmt: skip
    has_strength = status in ("ok", "off_target")
    return Intervention(
        latent=latent,
        kl_target=target,
        status=status,
        strength=8.0 if has_strength else None,
        kl=target if has_strength else None,
        prompts=tuple(prompts),
    )


class Writer:
    """A base model that writes what a rule says; requests come back in the order wanted."""

    identity = "writer"

    def __init__(self, rule: Callable[[Request], Completion], *, backwards: bool = False) -> None:
        self._rule = rule
        self._backwards = backwards
        self.asked: list[Request] = []

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        if self._backwards:
            requests = list(requests)[::-1]
        for request in requests:
            self.asked.append(request)
            assert isinstance(request.answer, Continuation | PromptScores)
            yield request, self._rule(request)


def last_passage(prompt: str) -> str:
    """The passage in question, as it was shown."""
    return re.findall(r"(?m)^Passage: (.*)$", prompt)[-1]


def by_words(request: Request) -> Completion:
    """A word of the explanation has -1 nat if it occurs in the passage and -4 if not; the rest -2.

    Tokens are words with the spaces before them, and single signs.
    """
    passage, tail = last_passage(request.prompt), request.prompt[request.answer.start :]
    pieces = re.findall(r"\s*\w+|.", tail)
    known = set(re.findall(r"\w+", passage))
    tokens = []
    for piece in pieces:
        is_word = piece.strip().isalnum()
        tokens.append(Token(piece, (-1.0 if piece.strip() in known else -4.0) if is_word else -2.0))
    return Completion(request.call_id("m"), "", tuple(tokens))
