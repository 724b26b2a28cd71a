"""Surprisal: does the explanation make a latent's activating windows likelier than other windows?

For a window x and an explanation z, a base model gives

    I(x) = sum over the tokens t of x of  log p(t | P(z), before t) - log p(t | P(z0), before t)

in nats, where P is a prompt of worked blocks that ends in a description (``core.prompts``) and z0
describes nothing in particular. Every token of x counts, the first included. Windows are ranked by
I in variant ``all`` and by I / (number of tokens of x) in variant ``per_token``; there is no
prediction and no probability.

1. Each (explanation, window) is one request; those of an explanation are one unit, so that a local
   model runs what they share once.
2. Each window under z0 is one request whose content names no latent and no explanation. It is asked
   once for all latents that show the window, so its rounding is that of another latent's batch:
   below 1e-4 nats per token in float32, but some .1 nats per window in bfloat16, where scores
   differ from those in float32 by .3 to .4 (their own standard deviation is 2.3 to 3.4).
3. The two log-probabilities are compared only where both are of exactly the same tokens.

Windows are shown as judges see them, escaped and on one line (``core.highlight``): what a window
holds cannot open a description of its own.

Source:
    arXiv 2410.13928, section 3.2.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import SurprisalConfig
from autointerp_dagster.core.latent_records import Window
from autointerp_dagster.core.llm import LLM, Completion, JournalBlock, PromptScores, Request
from autointerp_dagster.core.prompts.surprisal import (
    SURPRISAL_VERSION,
    UNRELATED,
    surprisal_prompt,
)
from autointerp_dagster.core.schemas import MAIN_VARIANT, VerdictReason
from autointerp_dagster.core.scorers.judging import ensure_own_windows
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict, judged_windows
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"1.{SURPRISAL_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way windows are shown."""

PER_TOKEN_VARIANT = "per_token"

KEPT_BACKGROUNDS = 50_000
"""Windows whose reading under z0 is kept in memory; of those before, the journal knows it."""


class Reading(NamedTuple):
    """The log-probability of a window under one description."""

    total: float
    """Nats, summed over its tokens."""
    n_tokens: int
    """>= 1."""
    fingerprint: bytes
    """Of the tokens' texts in order: equal where the window was cut into the same tokens."""


@dataclass(slots=True, eq=False)
class _Background:
    """A window under z0, shared by all rows that need it."""

    outcome: Reading | VerdictReason | None = None
    """Null until it is answered."""
    waiting: "list[tuple[_Row, Completion]]" = field(default_factory=list)
    """Rows that were answered before it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """A window under an explanation."""

    task: ScoringTask
    window: Window
    turn: int
    background: _Background


class _Question(NamedTuple):
    """A request, and what its answer is for."""

    request: Request
    asker: _Background | _Row


def verdicts(
    jobs: Iterable[Job],
    config: SurprisalConfig,
    detokenizer: Detokenizer,
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Verdict]:
    """Two verdicts per explanation and test window, in the order of the answers.

    Jobs are drawn lazily and kept only until they are answered.

    Args:
        jobs: Latents with the explanations to be tested.
        config: Which windows.
        detokenizer: Of the subject model.
        llm: A base model that tells log-probabilities of given text.
        block_of: Where the calls of a latent are kept.

    Raises:
        LLMError: If no model answers at all, or it gives no log-probabilities of prompts.
        ValueError: If a task is about another latent than its record.
    """
    asked: dict[int, _Question] = {}

    def requests() -> Iterator[Request]:
        known: OrderedDict[tuple[JournalBlock, str], _Background] = OrderedDict()
        for job in jobs:
            for question in _questions(job, config, detokenizer, block_of, known):
                asked[id(question.request)] = question
                yield question.request

    for request, completion in llm.answer(requests()):
        asker = asked.pop(id(request)).asker
        if isinstance(asker, _Background):
            asker.outcome = reading_of(completion)
            waiting, asker.waiting = asker.waiting, []
            for row, earlier in waiting:
                yield from _verdicts_of(row, earlier)
        elif asker.background.outcome is None:
            asker.background.waiting.append((asker, completion))
        else:
            yield from _verdicts_of(asker, completion)


def reading_of(completion: Completion) -> Reading | VerdictReason:
    """What an answer says of the window, or why it says nothing.

    A log-probability that is NaN or infinite makes the whole window unknown, and so does an answer
    without tokens.
    """
    if completion.reason is not None:
        return completion.reason
    if completion.text is None:
        return "call_failed"
    tokens = completion.tokens
    if not tokens or not all(math.isfinite(token.logprob) for token in tokens):
        return "no_logprobs"
    texts = json.dumps([token.text for token in tokens])
    return Reading(
        total=math.fsum(token.logprob for token in tokens),
        n_tokens=len(tokens),
        fingerprint=hashlib.blake2b(texts.encode(), digest_size=16).digest(),
    )


def _questions(
    job: Job,
    config: SurprisalConfig,
    detokenizer: Detokenizer,
    block_of: Callable[[LatentId], JournalBlock],
    known: OrderedDict[tuple[JournalBlock, str], _Background],
) -> Iterator[_Question]:
    """The windows under z0 that no earlier job asked for, then those under each explanation.

    ``known`` holds the windows that were asked for, by journal block and text; it grows, up to a
    bound.
    """
    latent = job.record.latent
    block = block_of(latent)
    activating, silent = judged_windows(job.record, config.n_examples)
    windows = (*activating, *silent)
    texts = [highlight.escape("".join(detokenizer.pieces(w.tokens))) for w in windows]
    backgrounds: dict[str, _Background] = {}
    for text in dict.fromkeys(texts) if job.tasks else ():
        if (block, text) not in known:
            known[block, text] = _Background()
            request = _request(UNRELATED, text, f"{latent}/surprisal/z0", block)
            yield _Question(request, known[block, text])
        known.move_to_end((block, text))
        backgrounds[text] = known[block, text]
    while len(known) > KEPT_BACKGROUNDS:
        known.popitem(last=False)
    for task in job.tasks:
        ensure_own_windows(job.record, task)
        explanation = highlight.shown_explanation(task.text)
        unit = f"{latent}/{task.explainer}/{task.subject}/surprisal"
        for turn, (window, text) in enumerate(zip(windows, texts, strict=True)):
            request = _request(explanation, text, unit, block)
            yield _Question(request, _Row(task, window, turn, backgrounds[text]))


def _request(explanation: str, text: str, unit: str, block: JournalBlock) -> Request:
    prompt = surprisal_prompt(explanation, text)
    return Request(
        messages=(),
        prompt=prompt.text,
        answer=PromptScores(prompt.start),
        unit=unit,
        block=block,
        max_tokens=1,
    )


def _verdicts_of(row: _Row, completion: Completion) -> Iterator[Verdict]:
    """Both variants of a row whose background is known."""
    given, background = reading_of(completion), row.background.outcome
    assert background is not None
    gain, n_tokens, reason = None, 1, None
    if not isinstance(given, Reading):
        reason = given
    elif not isinstance(background, Reading):
        reason = background
    elif given.fingerprint != background.fingerprint:
        reason = "no_logprobs"
    else:
        gain, n_tokens = given.total - background.total, given.n_tokens
    per_token = None if gain is None else gain / n_tokens
    for variant, score in ((MAIN_VARIANT, gain), (PER_TOKEN_VARIANT, per_token)):
        yield _verdict(row, variant, score, reason, completion.call_id)


def _verdict(
    row: _Row, variant: str, score: float | None, reason: VerdictReason | None, call_id: str
) -> Verdict:
    return Verdict.of_window(
        row.task,
        row.window,
        variant=variant,
        reason=reason,
        call_id=call_id,
        score=score,
        turn=row.turn,
    )
