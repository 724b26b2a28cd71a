"""The ``output`` explainer: a base model names what the latent makes more likely.

It reads the explainer's prompts of an intervention with the tokens whose probability rose most, and
completes "Explanation:". Nothing is shown of the windows on which the latent fires beyond these
prompts, so the explanation is about the latent's effect, not its cause.

Source:
    arXiv 2410.13928, section 3.3.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import OutputExplainerConfig
from autointerp_dagster.core.explainers.explanation import (
    Explanation,
    failed_explanation,
    skipped_explanation,
)
from autointerp_dagster.core.interventions.record import Intervention
from autointerp_dagster.core.llm import LLM, Completion, Continuation, JournalBlock, Request
from autointerp_dagster.core.prompts.output import OUTPUT_VERSION, PromotedAfter, output_prompt
from autointerp_dagster.core.schemas import UNDONE, LatentStatus
from autointerp_dagster.core.types import LatentId

VERSION = f"1.{OUTPUT_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way texts are shown."""

MAX_PROMPTS = 10
"""Prompts shown at most, the first by window."""

_ANSWER = Continuation(stop=("\n",))
_SEEDS_APART = 1000
"""Between the server seeds of two studies' seeds: samples must not meet."""


class OutputCase(NamedTuple):
    """One latent to be explained by its effect."""

    latent: LatentId
    status: LatentStatus
    """Of the latent's record."""
    intervention: Intervention | None
    """At the strength to be shown; null where there is none."""


class _Open(NamedTuple):
    """A case under way."""

    case: OutputCase
    answers: dict[int, Completion]
    """By sample number."""
    requests: tuple[Request, ...]


def explain_outputs(
    name: str,
    config: OutputExplainerConfig,
    cases: Iterable[OutputCase],
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Explanation]:
    """The rows of each case, in the order of the answers.

    A latent that can be asked about has ``n_samples`` rows, one per answer; the first (by sample
    number) that says something is selected. Where none does there is a single failed row. Other
    latents have a skipped row: ``dead``, ``rare``, ``dense`` or ``no_intervention``.
    Cases are drawn lazily and kept only until they are answered.

    Args:
        name: The explainer's name in the study.
        config: Its parameters; ``kl`` is the affair of who makes the cases.
        cases: Latents, each once.
        llm: A base model.
        block_of: Where the calls of a latent are kept.

    Raises:
        ValueError: If an intervention is on another latent than its case.
        LLMError: If no model answers at all.
    """
    under_way: dict[int, tuple[Request, _Open]] = {}
    skipped: list[Explanation] = []

    def requests() -> Iterator[Request]:
        for case in cases:
            prompt = None if case.status != "ok" else _prompt_of(case, config.n_tokens)
            if prompt is None:
                reason = "no_intervention" if case.status == "ok" else case.status
                skipped.append(skipped_explanation(case.latent, name, reason))
                continue
            asked = _requests(name, config, case.latent, prompt, block_of(case.latent))
            opened = _Open(case, {}, asked)
            under_way.update({id(request): (request, opened) for request in asked})
            yield from asked

    for answered, completion in llm.answer(requests()):
        request, opened = under_way.pop(id(answered))
        opened.answers[request.sample] = completion
        if len(opened.answers) == len(opened.requests):
            yield from _candidates(name, opened)
        yield from _drained(skipped)
    yield from _drained(skipped)


def _prompt_of(case: OutputCase, n_tokens: int) -> str | None:
    """What to ask; null where the latent was not steered as wanted, or nothing became likelier."""
    intervention = case.intervention
    if intervention is None or intervention.status != "ok":
        return None
    if intervention.latent != case.latent:
        raise ValueError(
            f"{case.latent}: got an intervention on {intervention.latent}. Pass the latent's own."
        )
    shown = [p for p in intervention.prompts if p.is_for_explainer and any(p.promoted)]
    examples = [
        PromotedAfter(
            highlight.escape(prompt.prompt),
            tuple(
                (highlight.escape(token), rise)
                for token, rise in zip(prompt.promoted, prompt.rises, strict=True)
                if token  # part of a character has no text
            ),
        )
        for prompt in shown[:MAX_PROMPTS]
    ]
    return output_prompt(examples, n_tokens) if examples else None


def _requests(
    name: str, config: OutputExplainerConfig, latent: LatentId, prompt: str, block: JournalBlock
) -> tuple[Request, ...]:
    return tuple(
        Request(
            messages=(),
            prompt=prompt,
            answer=_ANSWER,
            unit=f"{latent}/{name}",
            block=block,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            # A server that honours seeds would give one answer n times.
            seed=_SEEDS_APART * config.seed + sample,
            sample=sample,
        )
        for sample in range(config.n_samples)
    )


def _candidates(name: str, opened: _Open) -> Iterator[Explanation]:
    latent = opened.case.latent
    answers = [opened.answers[sample] for sample in sorted(opened.answers)]
    texts = [_said(completion) for completion in answers]
    best = next((sample for sample, text in enumerate(texts) if text is not None), None)
    if best is None:
        # What lies with the run is tried again by the next: it must not hide behind the rest.
        undone = [completion for completion in answers if completion.reason in UNDONE]
        yield failed_explanation(latent, name, [*undone, *answers][0])
        return
    for sample, (completion, text) in enumerate(zip(answers, texts, strict=True)):
        if text is None:
            row = failed_explanation(latent, name, completion)
            yield replace(row, candidate=sample, selected=False)
        else:
            yield Explanation(
                latent, name, text, "ok", None, completion.call_id, sample, sample == best
            )


def _said(completion: Completion) -> str | None:
    """The answer's line; null if it failed or holds neither letter nor digit."""
    if completion.reason is not None or completion.text is None:
        return None
    lines = completion.text.strip().splitlines()
    text = " ".join(lines[0].split()) if lines else ""
    return text if any(c.isalnum() for c in text) else None


def _drained(rows: list[Explanation]) -> Iterator[Explanation]:
    while rows:
        yield rows.pop()
