"""Several explanations of a latent, and the one that does best on its ``select`` windows.

1. ``best_of_n`` asks the default explainer's question n times; ``refine`` asks it once, and then, a
   stated number of times, for an explanation that does better than the best so far, showing what
   that one got wrong.
2. Every text is tested by detection and fuzzing on the latent's ``select`` windows.
3. The text with the best mean of the two balanced accuracies stands for the explainer.

``test`` windows are taken out of a record before anything else is done with it. Records are worked
on in chunks, to have many questions under way at once; nothing depends on their size.

Source:
    Ours; the two scorers are those of arXiv 2410.13928, section 3.2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from autointerp_dagster.core.config import (
    BestOfNExplainerConfig,
    DefaultExplainerConfig,
    RefineExplainerConfig,
)
from autointerp_dagster.core.explainers import default
from autointerp_dagster.core.explainers.default import DefaultExplainer, answered_explanation
from autointerp_dagster.core.explainers.explanation import Explanation
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import LLM, JournalBlock, Request
from autointerp_dagster.core.scorers.judging import draw_key
from autointerp_dagster.core.selection import judging
from autointerp_dagster.core.selection.mistakes import MISTAKES_VERSION, better_question
from autointerp_dagster.core.selection.trials import Trial
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"2.{default.VERSION}.{judging.VERSION}.{MISTAKES_VERSION}"
"""Of this package, the explainer's prompts and the scorers."""

_CHUNK = 256
"""Latents worked on together."""

_SEEDS = 1 << 31
"""Seeds that every server takes."""

SelectingConfig = BestOfNExplainerConfig | RefineExplainerConfig


class SelectionModels(NamedTuple):
    """Who is asked; both may be the same model."""

    explainer: LLM
    judge: LLM


def choose(
    name: str,
    config: SelectingConfig,
    records: Iterable[LatentRecord],
    detokenizer: Detokenizer,
    models: SelectionModels,
    block_of: Callable[[LatentId], JournalBlock],
) -> Iterator[Explanation]:
    """Every candidate of every record, in their order; exactly one of a latent's is selected.

    * A candidate that failed is a failed row, selected only if all failed.
    * Where the judge's answers give no candidate a score (none can be read, no ``select`` windows
      of a class), the first that has a text is selected.
    * Where the judge was not asked about all (budget, deadline) or a call failed, the candidate is
      a failed row with that reason, so that the cell is not taken as done.
    * A latent that cannot be explained has one skipped row.
    * ``refine`` stops early where nothing was wrong, and begins again where nothing was said yet.

    Args:
        name: The explainer's key in the study.
        config: Its parameters.
        records: Drawn lazily.
        detokenizer: Of the subject model.
        models: Who explains, and who judges.
        block_of: Where the calls of a latent are kept.

    Raises:
        LLMError: If no model answers at all.
    """
    choosing = _Choosing(name, config, detokenizer, models, block_of)
    remaining = iter(records)
    while chunk := list(islice(remaining, _CHUNK)):
        trials = [Trial(without_test_windows(record)) for record in chunk]
        choosing.try_out(trials)
        for trial in trials:
            yield from trial.rows()


def without_test_windows(record: LatentRecord) -> LatentRecord:
    """The record as a choice may see it."""
    return replace(record, windows=tuple(w for w in record.windows if w.split != "test"))


class _Choosing(NamedTuple):
    name: str
    config: SelectingConfig
    detokenizer: Detokenizer
    models: SelectionModels
    block_of: Callable[[LatentId], JournalBlock]

    @property
    def explainer(self) -> DefaultExplainer:
        fields = ("n_examples", "show_activations", "temperature", "max_tokens")
        shared = {field: getattr(self.config, field) for field in fields}
        return DefaultExplainer(self.name, DefaultExplainerConfig(kind="default", **shared))

    def try_out(self, trials: Sequence[Trial]) -> None:
        """Ask for candidates and have them judged."""
        match self.config:
            case BestOfNExplainerConfig(n=n):
                self._round([(trial, list(self._first(trial, n))) for trial in trials])
            case RefineExplainerConfig(n_loops=n_loops):
                self._round([(trial, list(self._first(trial, 1))) for trial in trials])
                for loop in range(1, n_loops + 1):
                    asked = [(t, self._next(t, loop)) for t in trials if _goes_on(t)]
                    self._round([(trial, [q]) for trial, q in asked if q is not None])

    def _round(self, asked: Sequence[tuple[Trial, Sequence[Request]]]) -> None:
        """Add a candidate per question, in their order, and judge the new texts."""
        places: dict[int, tuple[int, int]] = {}
        answers: list[dict[int, Explanation]] = [{} for _ in asked]
        for i, (_, questions) in enumerate(asked):
            places |= {id(question): (i, place) for place, question in enumerate(questions)}
        requests = (question for _, questions in asked for question in questions)
        for request, completion in self.models.explainer.answer(requests):
            i, place = places[id(request)]
            answers[i][place] = answered_explanation(asked[i][0].record, self.name, completion)
        for (trial, questions), found in zip(asked, answers, strict=True):
            trial.candidates.extend(found[place] for place in range(len(questions)))
            if not trial.candidates:
                trial.candidates.append(answered_explanation(trial.record, self.name, None))
        judging.judge_candidates(
            self.name,
            [trial for trial, _ in asked],
            self.config,
            self.detokenizer,
            self.models.judge,
            self.block_of,
        )

    def _first(self, trial: Trial, n: int) -> Iterator[Request]:
        """The default explainer's question, n times; none where the latent cannot be explained."""
        request = self._question(trial)
        if request is not None:
            yield from (self._sample(request, trial, i) for i in range(n))

    def _next(self, trial: Trial, loop: int) -> Request | None:
        """A question for something better; the first one again while there is no text."""
        request = self._question(trial)
        best = trial.best()
        if request is None or not isinstance(self.config, RefineExplainerConfig):
            return None
        if best is not None:
            request = better_question(request, trial, best, self.config, self.detokenizer)
        return None if request is None else self._sample(request, trial, loop)

    def _question(self, trial: Trial) -> Request | None:
        block = self.block_of(trial.record.latent)
        return self.explainer.request(trial.record, self.detokenizer, block)

    def _sample(self, request: Request, trial: Trial, sample: int) -> Request:
        """One of several answers to a question; at temperature 0 there is one, paid once."""
        if request.temperature == 0:
            return request
        key = draw_key(trial.record.latent, self.config.seed, f"explanation-{sample}")
        return replace(request, sample=sample, seed=key % _SEEDS)


def _goes_on(trial: Trial) -> bool:
    return trial.candidates[0].status != "skipped" and not trial.is_cut_short()
