"""Intervention: is an explanation less surprising after text that was written under the latent?

A base model reads a scoring prompt with what the subject model wrote next, and then the sentence
``The above passage contains an amplified amount of "z"``. The surprisal of an explanation z is

    -sum log p over the tokens of z and the closing quotation mark, in nats,

and the score of a prompt is surprisal(z | clean) - surprisal(z | steered): above 0 where steering
made the explanation likelier. There is no prediction and no probability. Scores of different
explanations are comparable only at equal length and divergence.

Source:
    arXiv 2410.13928, section 3.3. There, the text before the passages stood in the cache and in the
    prompt; here a prompt is one plain text, and what is cached of it is the backend's affair.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import InterventionConfig
from autointerp_dagster.core.interventions.record import Intervention, SteeredPrompt
from autointerp_dagster.core.llm import (
    LLM,
    Completion,
    JournalBlock,
    PromptScores,
    Request,
    Token,
)
from autointerp_dagster.core.prompts.intervention import INTERVENTION_VERSION, intervention_prompt
from autointerp_dagster.core.schemas import MAIN_VARIANT, VerdictReason
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict
from autointerp_dagster.core.types import LatentId

VERSION = f"1.{INTERVENTION_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way texts are shown."""


class InterventionJob(NamedTuple):
    """One latent's interventions with the explanations to be tested on them."""

    interventions: tuple[Intervention, ...]
    """The one with the main target first, then the others; targets are distinct."""
    tasks: tuple[ScoringTask, ...]
    """The latent's own explanation first."""


class _Asked(NamedTuple):
    """A scoring prompt under one explanation."""

    task: ScoringTask
    variant: str
    turn: int
    prompt: SteeredPrompt


class _Pair(NamedTuple):
    """The two questions about it, and the answers that have come."""

    asked: _Asked
    clean: Request
    steered: Request
    answers: dict[int, Completion]
    """By the request's identity."""


def verdicts(
    jobs: Iterable[InterventionJob],
    config: InterventionConfig,
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Verdict]:
    """One verdict per scoring prompt, intervention and explanation, in the order of the answers.

    ``variant`` is ``all`` for a job's first intervention and ``kl=<target>`` for the others,
    ``window_id`` and ``quantile`` are the prompt's context, last position and quintile,
    ``call_id`` is that of the steered passage, or of the answer that failed. An intervention that
    is off target gives failed rows; one without prompts (dead, rare, dense, too few) gives none.
    Jobs are drawn lazily and kept only until they are answered.

    Args:
        jobs: Latents with their interventions and the explanations to be tested.
        config: The scorer's own parameters.
        llm: A base model that gives the log-probabilities of a text.
        block_of: Where the calls of a latent are kept.

    Raises:
        ValueError: If a task is about another latent than an intervention, or a scoring prompt has
            no continuations.
        LLMError: If no model answers at all.
    """
    del config  # nothing is drawn
    pairs: dict[int, _Pair] = {}
    unasked: list[Verdict] = []

    def requests() -> Iterator[Request]:
        for asked, intervention in _asked_of(jobs):
            if intervention.status == "off_target":
                unasked.append(_verdict(asked, None, "off_target", None))
                continue
            pair = _pair(asked, block_of(asked.task.latent))
            pairs[id(pair.clean)] = pairs[id(pair.steered)] = pair
            yield from (pair.clean, pair.steered)

    for request, completion in llm.answer(requests()):
        pair = pairs.pop(id(request))
        pair.answers[id(request)] = completion
        if len(pair.answers) == 2:
            yield _scored(pair)
        yield from _drained(unasked)
    yield from _drained(unasked)


def _asked_of(jobs: Iterable[InterventionJob]) -> Iterator[tuple[_Asked, Intervention]]:
    """Every scoring prompt of every usable intervention, all of one explanation together."""
    for job in jobs:
        for task in job.tasks:
            for place, intervention in enumerate(job.interventions):
                _ensure_own(task, intervention)
                if intervention.status not in ("ok", "off_target"):
                    continue
                variant = MAIN_VARIANT if place == 0 else f"kl={intervention.kl_target:g}"
                scoring = [p for p in intervention.prompts if not p.is_for_explainer]
                for turn, prompt in enumerate(scoring):
                    yield _Asked(task, variant, turn, prompt), intervention


def _ensure_own(task: ScoringTask, intervention: Intervention) -> None:
    if task.latent != intervention.latent:
        raise ValueError(
            f"task for {task.latent}: got an intervention on {intervention.latent}. Pass those on "
            "the latent whose prompts are shown; the explanation may be another's."
        )


def _pair(asked: _Asked, block: JournalBlock) -> _Pair:
    clean, steered = (
        _request(asked, continuation, block)
        for continuation in (asked.prompt.clean, asked.prompt.steered)
    )
    return _Pair(asked, clean, steered, {})


def _request(asked: _Asked, continuation: str | None, block: JournalBlock) -> Request:
    task = asked.task
    if continuation is None:
        raise ValueError(
            f"{task.latent}, window {asked.prompt.window_id}: got a scoring prompt without "
            "continuation, wanted a clean and a steered one. Materialise the interventions again."
        )
    passage = highlight.escape(asked.prompt.prompt + continuation)
    statement = intervention_prompt(passage, highlight.shown_explanation(task.text))
    return Request(
        messages=(),
        prompt=statement.text,
        answer=PromptScores(statement.start),
        unit=f"{task.latent}/{task.explainer}/{task.subject}/intervention",
        block=block,
        max_tokens=1,
    )


def _scored(pair: _Pair) -> Verdict:
    clean, steered = (pair.answers[id(request)] for request in (pair.clean, pair.steered))
    for completion in (clean, steered):
        if completion.reason is not None or completion.text is None:
            reason = completion.reason or "call_failed"
            return _verdict(pair.asked, None, reason, completion.call_id)
    score = _fall(clean.tokens or (), steered.tokens or ())
    reason = "no_logprobs" if score is None else None
    return _verdict(pair.asked, score, reason, steered.call_id)


def _fall(clean: tuple[Token, ...], steered: tuple[Token, ...]) -> float | None:
    """Nats by which surprisal falls; null without usable log-probabilities of the same tokens."""
    if not clean or [t.text for t in clean] != [t.text for t in steered]:
        return None
    if not all(math.isfinite(token.logprob) for token in (*clean, *steered)):
        return None
    return math.fsum(token.logprob for token in steered) - math.fsum(
        token.logprob for token in clean
    )


def _verdict(
    asked: _Asked, score: float | None, reason: VerdictReason | None, call_id: str | None
) -> Verdict:
    return Verdict(
        latent=asked.task.latent,
        explainer=asked.task.explainer,
        subject=asked.task.subject,
        variant=asked.variant,
        window_id=asked.prompt.window_id,
        explanation_of=asked.task.explanation_of,
        is_activating=True,
        quantile=asked.prompt.quintile,
        negative_kind=None,
        prediction=None,
        probability=None,
        score=score,
        status="ok" if reason is None else "failed",
        reason=reason,
        call_id=call_id,
        turn=asked.turn if call_id is not None else None,
    )


def _drained(rows: list[Verdict]) -> Iterator[Verdict]:
    while rows:
        yield rows.pop()
