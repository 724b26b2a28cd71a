"""Simulation: how well does the explanation predict the activation of every token?

Each chosen test window is one question:

* ``json``: a chat model writes one integer from 0 to 10 per token.
* ``all_at_once``: a base model writes nothing. Its log-probabilities of the integers at the place
  of every token's number give an expectation; none of them sees another's answer.

The verdict holds predicted and true activations, 0..10; ``core.metrics.correlation`` reads them.
The base model's scale ends at 9 (see ``core.prompts.simulation``): correlations do not see scales.

Source:
    arXiv 2410.13928, section 3.2; Bills et al. 2023, "Language models can explain neurons in
    language models", for the expectation over number tokens.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import SimulationConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import (
    LLM,
    Completion,
    IntegerList,
    JournalBlock,
    PromptScores,
    Request,
    Token,
)
from autointerp_dagster.core.prompts.simulation import (
    HIGHEST,
    LOWEST,
    SIMULATION_VERSION,
    simulation_chat,
    simulation_text,
)
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.schemas import VerdictReason
from autointerp_dagster.core.scorers.judging import draw_key, ensure_own_windows
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict, judged_windows
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"2.{SIMULATION_VERSION}.{highlight.VERSION}"
"""Of this module, the prompts and the way windows are shown."""

DIGITS = tuple(map(str, range(10)))
"""What is compared at each place of a plain text."""
TOP_LOGPROBS = 20
"""Candidates asked for at each token: eleven integers, and what else may stand there."""

_TAB = ("\t", "<0x09>")
"""How a token may end that holds a tab: some servers name a byte's token. Corpus text has no ``<``
once it is escaped."""

_INTEGER = re.compile(r"\s*([0-9]|10)\s*")


class SimulatedWindow(NamedTuple):
    """A window as it is asked about."""

    window: Window
    pieces: tuple[str, ...]
    """Raw text of each visible token."""
    actual: tuple[float, ...]
    """Displayed activation of each, 0..10."""
    turn: int
    """Place in the order in which the latent's windows are asked about."""


class Question(NamedTuple):
    """One window under one explanation."""

    task: ScoringTask
    shown: SimulatedWindow
    request: Request


def verdicts(
    jobs: Iterable[Job],
    config: SimulationConfig,
    detokenizer: Detokenizer,
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Verdict]:
    """One verdict per chosen test window and explanation, in the order of the answers.

    Jobs are drawn lazily and kept only until they are answered.

    Args:
        jobs: Latents with the explanations to be tested.
        config: Mode and number of windows.
        detokenizer: Of the subject model.
        llm: A chat model for mode ``json``, a base model for ``all_at_once``.
        block_of: Where the calls of a latent are kept.

    Raises:
        LLMError: If no model answers at all, or log-probabilities of a prompt cannot be had.
    """
    asked: dict[int, Question] = {}
    nothing_to_ask: list[Verdict] = []

    def requests() -> Iterator[Request]:
        for job in jobs:
            windows = simulated_windows(job.record, config, detokenizer)
            for task in job.tasks:
                ensure_own_windows(job.record, task)
                for shown in windows:
                    if not shown.pieces:
                        nothing_to_ask.append(_verdict(task, shown, (), None, None))
                        continue
                    request = request_of(task, shown, config.mode, block_of(task.latent))
                    asked[id(request)] = Question(task, shown, request)
                    yield request

    for request, completion in llm.answer(requests()):
        yield verdict_of(asked.pop(id(request)), completion)
        while nothing_to_ask:
            yield nothing_to_ask.pop()
    yield from nothing_to_ask


def simulated_windows(
    record: LatentRecord, config: SimulationConfig, detokenizer: Detokenizer
) -> list[SimulatedWindow]:
    """The chosen test windows of both classes in an order drawn under the latent's address.

    The order mixes the classes, so that a budget that ends midway leaves some of each; it names no
    explanation.
    """
    activating, silent = judged_windows(record, config.n_examples)
    windows = [*activating, *silent]
    ids = np.array([window.window_id for window in windows], dtype=np.uint64)
    key = draw_key(record.latent, config.seed, "simulation-order")
    order = np.lexsort((ids, hash_priority(key, ids)))
    return [
        _simulated(windows[place], record, detokenizer, turn) for turn, place in enumerate(order)
    ]


def request_of(
    task: ScoringTask,
    shown: SimulatedWindow,
    mode: Literal["all_at_once", "json"],
    block: JournalBlock,
) -> Request:
    """The question about one window; all of a latent's under one explanation form a unit."""
    explanation = highlight.shown_explanation(task.text)
    tokens = [highlight.escape(piece) for piece in shown.pieces]
    unit = f"{task.latent}/{task.explainer}/{task.subject}/simulation"
    if mode == "all_at_once":
        plain = simulation_text(explanation, tokens)
        return Request(
            messages=(),
            answer=PromptScores(plain.start, DIGITS),
            unit=unit,
            block=block,
            prompt=plain.text,
            max_tokens=1,  # what servers write at least
            top_logprobs=TOP_LOGPROBS,
        )
    chat = simulation_chat(explanation, tokens)
    return Request(
        messages=chat.messages,
        answer=IntegerList(len(shown.pieces), LOWEST, HIGHEST),
        unit=unit,
        block=block,
        n_shared=chat.n_shared,
        max_tokens=_max_tokens(len(shown.pieces)),
    )


def verdict_of(question: Question, completion: Completion) -> Verdict:
    """The verdict on one window; a failed one carries the reason and no prediction."""
    answer, n_tokens = question.request.answer, len(question.shown.pieces)
    predicted: Sequence[float] | None = None
    reason: VerdictReason | None = completion.reason
    if reason is None and isinstance(answer, IntegerList):
        numbers = None if completion.text is None else answer.read(completion.text)
        predicted = None if numbers is None else [float(number) for number in numbers]
        if predicted is None:
            reason = "call_failed" if completion.text is None else "unparsable"
    elif reason is None:
        predicted = expected_activations(completion.tokens or (), n_tokens)
        reason = "no_logprobs" if predicted is None else None
    return _verdict(question.task, question.shown, predicted, reason, completion.call_id)


def expected_activations(tokens: Sequence[Token], n: int) -> list[float] | None:
    """The expected integer at each of ``n`` places of a prompt of ``simulation_text``.

    A place is the token after one that ends in a tab, which no token of the corpus does. At each,
    the returned candidates that read as an integer from 0 to 10 are renormalised among themselves;
    those without a finite log-probability do not count.

    Returns:
        0..10 each; null if there are not ``n`` places, or one has no candidate that counts.

    Source:
        Bills et al. 2023, "Simulating": the expected value over the number tokens.
    """
    tabs = (token.text.endswith(_TAB) for token in tokens)
    places = [token for is_after_tab, token in zip([False, *tabs], tokens, strict=False)
              if is_after_tab]  # fmt: skip
    expected = [_expected(place.top) for place in places]
    known = [value for value in expected if value is not None]
    return known if len(known) == len(expected) == n else None


def _expected(candidates: Sequence[tuple[str, float]]) -> float | None:
    found = [
        (int(integer[1]), logprob)
        for text, logprob in candidates
        if (integer := _INTEGER.fullmatch(text)) is not None and logprob != -math.inf
    ]
    if not found or not all(math.isfinite(logprob) for _, logprob in found):
        return None
    known = [min(logprob, 0.0) for _, logprob in found]
    weights = [math.exp(logprob - max(known)) for logprob in known]
    total = sum(weight * value for weight, (value, _) in zip(weights, found, strict=True))
    return total / sum(weights)


def _simulated(
    window: Window, record: LatentRecord, detokenizer: Detokenizer, turn: int
) -> SimulatedWindow:
    visible = highlight.visible_tokens(detokenizer.pieces(window.tokens), window.activations)
    if record.max_activation is None:
        raise ValueError(
            f"{record.latent}: has windows and no largest activation. Read its record."
        )
    shown = highlight.display_activations(visible.activations, record.max_activation)
    return SimulatedWindow(window, visible.pieces, tuple(map(float, shown)), turn)


def _verdict(
    task: ScoringTask,
    shown: SimulatedWindow,
    predicted: Sequence[float] | None,
    reason: VerdictReason | None,
    call_id: str | None,
) -> Verdict:
    return Verdict.of_window(
        task,
        shown.window,
        reason=reason,
        call_id=call_id,
        turn=None if call_id is None else shown.turn,
        predicted=None if predicted is None else tuple(predicted),
        actual=shown.actual,
    )


def _max_tokens(n_integers: int) -> int:
    return 32 + 4 * n_integers  # digits, comma and space per integer, brackets, a code fence
