"""Intruder: is what a latent fires on alike enough that a window without it stands out?

No explanation is needed. Each trial shows five marked windows:

1. four activating test windows of one quantile, marked truly;
2. the intruder. Variant ``all``: a silent test window that copies the marks of another activating
   window of the quantile. Variant ``internal``: a truly marked window of another quantile.

The judge says which is the intruder; one in five is chance. Trials go through the quantiles in
turn, in a drawn order. A quantile with fewer than four test windows is left out, and no two trials
of a variant share an intruder: a latent may have fewer trials than asked for, or none.

Source:
    arXiv 2507.08473. There the false marks of the intruder are drawn at random.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import IntruderConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import LLM, Choice, Completion, JournalBlock, Request, Token
from autointerp_dagster.core.prompts.intruder import (
    INTRUDER_OPTIONS,
    INTRUDER_VERSION,
    N_WINDOWS,
    intruder_prompt,
)
from autointerp_dagster.core.schemas import MAIN_VARIANT
from autointerp_dagster.core.scorers.judging import draw_key
from autointerp_dagster.core.scorers.marks import mark_truly
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.rounds import balanced, by_quantile, drawn_one, drawn_order
from autointerp_dagster.core.scorers.tasks import Verdict, silent_windows
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"2.{INTRUDER_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way windows are shown."""

INTERNAL_VARIANT = "internal"

N_ALIKE = N_WINDOWS - 1
"""Activating windows of one quantile in a trial."""

TOP_LOGPROBS = 10
"""Candidates asked for: the five options in more than one spelling."""

_ANSWER = Choice(INTRUDER_OPTIONS)
_QUOTES = " \n\t\"'`*."
"""What ``llm.Choice`` ignores around an option."""


class Trial(NamedTuple):
    """One question to the judge."""

    variant: str
    turn: int
    """From 0, over both variants of the latent."""
    quantile: int
    """Of the four windows that belong together."""
    intruder: Window
    texts: tuple[str, ...]
    """Five, marked and escaped, as shown."""
    place: int
    """Of the intruder in ``texts``, from 0."""


def trials_of(
    record: LatentRecord, config: IntruderConfig, detokenizer: Detokenizer
) -> list[Trial]:
    """The questions about one latent, in the order in which they are asked.

    At most ``config.n_trials`` of each variant; fewer where windows run out.
    """
    variants = (MAIN_VARIANT, INTERNAL_VARIANT) if config.internal else (MAIN_VARIANT,)
    trials: list[Trial] = []
    for variant in variants:
        trials += _trials_of_variant(record, config, detokenizer, variant, len(trials))
    return trials


def verdicts(
    jobs: Iterable[Job],
    config: IntruderConfig,
    detokenizer: Detokenizer,
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Verdict]:
    """One verdict per trial, on the intruder, in the order of the answers.

    ``prediction`` says whether the judge found it, ``probability`` how probable it found it, and
    ``quantile`` is that of the four others. Only the records of the jobs are used, and these are
    drawn lazily.

    Raises:
        LLMError: If no model answers at all.
    """
    asked: dict[int, tuple[LatentId, Trial]] = {}

    def requests() -> Iterator[Request]:
        for job in jobs:
            latent = job.record.latent
            block = block_of(latent)
            for trial in trials_of(job.record, config, detokenizer):
                request = _request(latent, trial, block)
                asked[id(request)] = (latent, trial)
                yield request

    for request, completion in llm.answer(requests()):
        yield verdict_of(*asked.pop(id(request)), completion)


def verdict_of(latent: LatentId, trial: Trial, completion: Completion) -> Verdict:
    """What one answer says; an answer that is none of the options is failed, not wrong."""
    chosen, reason = None, completion.reason
    if reason is None and completion.text is not None:
        chosen = _ANSWER.read(completion.text)
    if chosen is None:
        reason = reason or ("call_failed" if completion.text is None else "unparsable")
    return Verdict(
        latent=latent,
        explainer=None,
        subject="own",
        variant=trial.variant,
        window_id=trial.intruder.window_id,
        explanation_of=None,
        is_activating=trial.intruder.is_activating,
        quantile=trial.quantile,
        negative_kind=trial.intruder.negative_kind,
        prediction=None if chosen is None else chosen == trial.place,
        probability=None if chosen is None else option_probability(completion.tokens, trial.place),
        score=None,
        status="failed" if chosen is None else "ok",
        reason=reason,
        call_id=completion.call_id,
        turn=trial.turn,
    )


def option_probability(tokens: Sequence[Token] | None, place: int) -> float | None:
    """P(option) over the options that the endpoint returned candidates for, in [0, 1].

    Null without candidates that read as options, or if one of theirs is no log-probability.

    Args:
        tokens: Of an answer that is one of the options.
        place: Index of the option asked about.
    """
    spoken = (token for token in tokens or () if _option(token.text) is not None)
    token = next(spoken, None)
    mass = [0.0] * N_WINDOWS
    for text, logprob in () if token is None else token.top:
        option = _option(text)
        if option is None:
            continue
        if math.isnan(logprob) or logprob == math.inf:
            return None
        mass[option] += math.exp(min(logprob, 0.0))
    total = sum(mass)
    return mass[place] / total if total > 0 else None


def _trials_of_variant(
    record: LatentRecord,
    config: IntruderConfig,
    detokenizer: Detokenizer,
    variant: str,
    first_turn: int,
) -> list[Trial]:
    bands = by_quantile(record.activating("test"))
    usable = [quantile for quantile, windows in bands.items() if len(windows) >= N_ALIKE]
    if not usable:
        return []
    is_main = variant == MAIN_VARIANT
    candidates = silent_windows(record, "test") if is_main else record.activating("test")
    pool = drawn_order(candidates, _key(record, config, f"{variant}-intruders"))
    order = balanced(usable, _key(record, config, f"{variant}-quantiles"))
    trials: list[Trial] = []
    for number in range(config.n_trials):
        quantile, use = order[number % len(order)], number // len(order)
        chosen = next((i for i, w in enumerate(pool) if w.quantile != quantile), None)
        if chosen is None:
            continue
        intruder = pool.pop(chosen)
        alike = _alike(record, config, variant, bands[quantile], quantile, use)
        shown = {window.window_id for window in alike}
        others = [window for window in bands[quantile] if window.window_id not in shown]
        donor = drawn_one(others or alike, _key(record, config, f"{variant}-marks-{number}"))
        place = _key(record, config, f"{variant}-place-{number}") % N_WINDOWS
        texts = [mark_truly(window, detokenizer).text for window in alike]
        texts.insert(place, _intruding(intruder, donor, detokenizer))
        turn = first_turn + len(trials)
        trials.append(Trial(variant, turn, quantile, intruder, tuple(texts), place))
    return trials


def _alike(
    record: LatentRecord,
    config: IntruderConfig,
    variant: str,
    band: Sequence[Window],
    quantile: int,
    use: int,
) -> list[Window]:
    """Four windows of a quantile: its ``use``-th four, so that each is shown equally often."""
    order = drawn_order(band, _key(record, config, f"{variant}-four-{quantile}"))
    chosen = [order[(N_ALIKE * use + i) % len(order)] for i in range(N_ALIKE)]
    return drawn_order(chosen, _key(record, config, f"{variant}-order-{quantile}-{use}"))


def _intruding(intruder: Window, donor: Window, detokenizer: Detokenizer) -> str:
    marked = mark_truly(intruder, detokenizer)
    if intruder.is_activating:
        return marked.text
    return marked.text_marked_as(mark_truly(donor, detokenizer).marks)


def _request(latent: LatentId, trial: Trial, block: JournalBlock) -> Request:
    chat = intruder_prompt(trial.texts)
    return Request(
        messages=chat.messages,
        answer=_ANSWER,
        unit=f"{latent}/intruder",
        block=block,
        n_shared=chat.n_shared,
        max_tokens=16,
        top_logprobs=TOP_LOGPROBS,
    )


def _option(text: str) -> int | None:
    """Index of the option that a token reads as."""
    said = text.strip(_QUOTES)
    return INTRUDER_OPTIONS.index(said) if said in INTRUDER_OPTIONS else None


def _key(record: LatentRecord, config: IntruderConfig, purpose: str) -> int:
    return draw_key(record.latent, config.seed, f"intruder-{purpose}")
