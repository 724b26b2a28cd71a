"""A latent on trial: its candidate explanations, what the judge made of each, which one stands."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from autointerp_dagster.core import highlight
from autointerp_dagster.core.explainers.explanation import Explanation
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.schemas import UNASKED, UNDONE, VerdictReason
from autointerp_dagster.core.scorers.tasks import Verdict


class Judgement(NamedTuple):
    """What the judge made of one text on the ``select`` windows of its latent."""

    score: float | None
    """Mean of the scorers' balanced accuracies, in [0, 1]; null unless every scorer has one."""
    wrong: Mapping[int, int]
    """By how many scorers a window was judged wrongly, by ``window_id``; others are absent."""
    undone: VerdictReason | None
    """Why some question has no answer yet, one of ``UNDONE``; null if all have what they will."""

    @classmethod
    def of(cls, verdicts_by_scorer: Iterable[list[Verdict]]) -> "Judgement":
        """The judgement that verdicts of the main variant make, one list per scorer."""
        lists = list(verdicts_by_scorer)
        scores = [balanced_accuracy(verdicts) for verdicts in lists]
        known = [score for score in scores if score is not None]
        every = [verdict for verdicts in lists for verdict in verdicts]
        wrong = Counter(v.window_id for v in every if v.prediction not in (None, v.is_activating))
        return cls(
            score=sum(known) / len(known) if known and len(known) == len(scores) else None,
            wrong=wrong,
            undone=next((v.reason for v in every if v.reason in UNDONE), None),
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One latent with its candidates so far."""

    record: LatentRecord
    """Without test windows."""
    candidates: list[Explanation] = field(default_factory=list)
    """In the order in which they were asked for."""
    judgements: dict[str, Judgement] = field(default_factory=dict)
    """By text as the judge sees it, so that a text that comes twice is judged once."""

    def judgement(self, candidate: Explanation) -> Judgement | None:
        """Null for a candidate without a text, or one that is not judged yet."""
        if candidate.text is None:
            return None
        return self.judgements.get(highlight.shown_explanation(candidate.text))

    def unjudged(self) -> list[str]:
        """Texts that the judge has not seen yet, each once, in the order of the candidates."""
        texts: dict[str, str] = {}
        for candidate in self.candidates:
            if candidate.text is not None:
                texts.setdefault(highlight.shown_explanation(candidate.text), candidate.text)
        return [text for shown, text in texts.items() if shown not in self.judgements]

    def is_cut_short(self) -> bool:
        """Whether the run ended (budget, deadline) before all was asked, or the judge failed."""
        is_judged = all(judgement.undone is None for judgement in self.judgements.values())
        return not is_judged or any(row.reason in UNASKED for row in self.candidates)

    def best(self) -> Explanation | None:
        """The candidate that stands for the explainer; null if none has a text.

        That of the best score; ties, and candidates without any score, go to the earlier, and a
        score, however low, comes before none.
        """
        usable = [c for c in self._settled() if c.text is not None]
        return max(usable, key=self._score, default=None)

    def rows(self) -> list[Explanation]:
        """All candidates, exactly one selected: the best, or the first if all failed.

        A candidate whose judge was not asked about every window (budget, deadline, a failed call)
        is a failed row: the choice is made again by the next run, which finds in the journal what
        was answered.
        """
        settled = self._settled()
        best = self.best()
        chosen = 0 if best is None else best.candidate
        return [replace(row, selected=row.candidate == chosen) for row in settled]

    def _settled(self) -> list[Explanation]:
        return [
            self._settle(replace(candidate, candidate=i))
            for i, candidate in enumerate(self.candidates)
        ]

    def _settle(self, candidate: Explanation) -> Explanation:
        match self.judgement(candidate):
            case Judgement(undone="budget" | "deadline" | "not_recorded" | "call_failed" as reason):
                return replace(candidate, text=None, status="failed", reason=reason)
            case _:
                return candidate

    def _score(self, candidate: Explanation) -> float:
        judgement = self.judgement(candidate)
        return -1.0 if judgement is None or judgement.score is None else judgement.score


def balanced_accuracy(verdicts: Iterable[Verdict]) -> float | None:
    """Mean of sensitivity and specificity over the answered verdicts; null if a class has none."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for verdict in verdicts:
        if verdict.prediction is not None:
            hits[verdict.is_activating].append(verdict.prediction == verdict.is_activating)
    if not hits[True] or not hits[False]:
        return None
    return sum(sum(said) / len(said) for said in hits.values()) / 2
