"""What an explainer is, and the row that it makes of each latent: a text, or why there is none."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import polars as pl

from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import Completion, JournalBlock, Request
from autointerp_dagster.core.schemas import (
    EXPLANATIONS,
    ExplanationReason,
    ExplanationStatus,
    VerdictReason,
)
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

_REASON_OF_COMPLETION: dict[VerdictReason, ExplanationReason] = {
    "unparsable": "unparsable",
    "refused": "refused",
    "call_failed": "call_failed",
    "budget": "budget",
    "deadline": "deadline",
    "not_recorded": "not_recorded",
    "too_long": "too_long",
    "no_vector": "call_failed",
    "no_logprobs": "unparsable",
    "off_target": "unparsable",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """One row of ``schemas.EXPLANATIONS``."""

    latent: LatentId
    explainer: str
    """The explainer's name in the study."""
    text: str | None
    """One line; null unless ``status`` is ``ok``."""
    status: ExplanationStatus
    """``skipped``: nothing was tried, because of the latent; ``failed``: no usable answer came."""
    reason: ExplanationReason | None
    """Null if ``status`` is ``ok``."""
    call_id: str | None = None
    """Null where no model was asked."""
    candidate: int = 0
    """Which of several answers of one explainer."""
    selected: bool = True
    """Whether this row stands for the explainer; one row per latent and explainer does."""

    def __post_init__(self) -> None:
        has_text = self.text is not None and self.text.strip() != ""
        if has_text != (self.status == "ok") or (self.reason is None) != (self.status == "ok"):
            raise ValueError(
                f"explanation of {self.latent} by {self.explainer!r}: got status {self.status!r}, "
                f"reason {self.reason!r}, text {self.text!r}. Give a text or a reason, not both."
            )


@runtime_checkable
class Explainer(Protocol):
    """A way to explain a latent: a record becomes a request, its completion an explanation."""

    @property
    def name(self) -> str:
        """The explainer's name in the study; a key of its tables."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same record could get another prompt or another text."""
        ...

    @property
    def asks_a_model(self) -> bool:
        """Whether a language model has a part in it; if not, changing the model changes nothing."""
        ...

    def request(
        self, record: LatentRecord, detokenizer: Detokenizer, block: JournalBlock
    ) -> Request | None:
        """What to ask a chat model; null where no model is needed or nothing can be asked."""
        ...

    def explanation(
        self, record: LatentRecord, detokenizer: Detokenizer, completion: Completion | None
    ) -> Explanation:
        """The row of a latent, whatever its status.

        Args:
            record: Any record, also of a dead, rare or dense latent.
            detokenizer: Of the subject model.
            completion: Of :meth:`request`; null exactly where that was null.
        """
        ...


def skipped_explanation(latent: LatentId, explainer: str, reason: ExplanationReason) -> Explanation:
    """The row of a latent that cannot be explained: dead, rare, dense, or no train windows."""
    return Explanation(latent, explainer, None, "skipped", reason)


def failed_explanation(latent: LatentId, explainer: str, completion: Completion) -> Explanation:
    """The row of a latent whose model gave no usable answer.

    Args:
        latent: The latent that was to be explained.
        explainer: The explainer's name in the study.
        completion: Without a reason where it has the right format but says nothing.
    """
    reason = "unparsable" if completion.reason is None else completion.reason
    return Explanation(
        latent, explainer, None, "failed", _REASON_OF_COMPLETION[reason], completion.call_id
    )


def explanations_frame(explanations: Iterable[Explanation]) -> pl.DataFrame:
    """The rows as ``schemas.EXPLANATIONS``, sorted by key.

    Raises:
        ValueError: If two share (latent, explainer, candidate).
    """
    rows = [
        {
            "coder": row.latent.coder,
            "hookpoint": row.latent.hookpoint,
            "latent": row.latent.index,
            "explainer": row.explainer,
            "candidate": row.candidate,
            "text": row.text,
            "selected": row.selected,
            "status": row.status,
            "reason": row.reason,
            "call_id": row.call_id,
        }
        for row in explanations
    ]
    return EXPLANATIONS.conform(pl.DataFrame(rows, schema=dict(EXPLANATIONS.columns)))
