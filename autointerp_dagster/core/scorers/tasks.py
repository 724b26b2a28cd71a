"""What every scorer works on and returns: an explanation to test, and verdicts on windows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import polars as pl

from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.schemas import (
    MAIN_VARIANT,
    VERDICTS,
    NegativeKind,
    Split,
    Subject,
    VerdictReason,
    VerdictStatus,
)
from autointerp_dagster.core.types import LatentId, LayerKey


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """One explanation to be tested on one latent's windows.

    There is no task without a text: what failed to be explained cannot be scored.
    """

    latent: LatentId
    """Whose windows are shown."""
    explainer: str
    subject: Subject
    """``own``: the latent's own explanation; ``other``: another latent's, as a floor."""
    explanation_of: int
    """The latent that the text was written for."""
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(
                f"{self.latent}, explainer {self.explainer!r}: got an empty explanation, wanted a "
                "text. Score only explanations whose status is 'ok'."
            )
        is_own = self.explanation_of == self.latent.index
        if (self.subject == "own" and not is_own) or (self.subject == "other" and is_own):
            raise ValueError(
                f"{self.latent}: subject {self.subject!r} with the explanation of latent "
                f"{self.explanation_of}. A floor uses another latent's explanation, never its own."
            )

    @classmethod
    def of_row(cls, row: Mapping[str, Any], latent: LatentId, subject: Subject) -> "ScoringTask":
        """The task that tests one row of ``schemas.EXPLANATIONS`` on a latent's windows.

        Raises:
            ValueError: If the row's status is not ``ok``.
        """
        if row["status"] != "ok" or row["text"] is None:
            raise ValueError(
                f"{latent}: got an explanation with status {row['status']!r} ({row['reason']!r}), "
                "wanted 'ok'. Leave it out; the metrics report it as no_explanation."
            )
        return cls(latent, row["explainer"], subject, row["latent"], row["text"])


@dataclass(frozen=True, slots=True)
class Verdict:
    """One row of ``schemas.VERDICTS``: what was said of one window."""

    latent: LatentId
    explainer: str | None
    """Null for a scorer that needs no explanation."""
    subject: Subject
    variant: str
    """``all`` for a scorer's ordinary verdicts."""
    window_id: int
    explanation_of: int | None
    is_activating: bool
    """The right answer; in fuzzing: whether the marks are true."""
    quantile: int | None
    """Of the window, also where its marks are false; null for a non-activating window, but where it
    was judged for one quantile (example embedding, intruder) that one."""
    negative_kind: NegativeKind | None
    """Null for an activating window, also where its marks are false."""
    prediction: bool | None
    """Null if failed, or if the scorer only ranks."""
    probability: float | None
    """Of ``is_activating``, in [0, 1]; null where unknown."""
    score: float | None
    """What windows are ranked by; null where unknown."""
    status: VerdictStatus
    reason: VerdictReason | None
    """Null if ``status`` is ``ok``."""
    call_id: str | None
    """Null where no language model was asked."""
    turn: int | None = None
    """Place of the prompt in the order in which its latent's are asked; null without one."""
    predicted: tuple[float, ...] | None = None
    """Simulation alone: displayed activation, 0..10, of each visible token."""
    actual: tuple[float, ...] | None = None
    """Simulation alone: what it is."""

    @classmethod
    def of_window(
        cls,
        task: ScoringTask,
        window: Window,
        *,
        variant: str = MAIN_VARIANT,
        reason: VerdictReason | None = None,
        call_id: str | None = None,
        **said: Any,
    ) -> "Verdict":
        """What was said of a window under the explanation that a task tests.

        Args:
            task: Latent, explainer, subject and explanation.
            window: Shown; its class, quantile and kind are the verdict's.
            variant: Of the scorer.
            reason: Why nothing was said; null: something was.
            call_id: Of the answer; null where no language model was asked.
            said: Further fields; ``prediction``, ``probability`` and ``score`` are null by default.
        """
        fields: dict[str, Any] = {
            "is_activating": window.is_activating,
            "prediction": None,
            "probability": None,
            "score": None,
            **said,
        }
        return cls(
            latent=task.latent,
            explainer=task.explainer,
            subject=task.subject,
            variant=variant,
            window_id=window.window_id,
            explanation_of=task.explanation_of,
            quantile=window.quantile,
            negative_kind=window.negative_kind,
            status="ok" if reason is None else "failed",
            reason=reason,
            call_id=call_id,
            **fields,
        )

    def __post_init__(self) -> None:
        if (self.reason is None) != (self.status == "ok"):
            raise ValueError(
                f"verdict on {self.latent}, window {self.window_id}: got status {self.status!r} "
                f"with reason {self.reason!r}. A failure has a reason, a success has none."
            )


def verdicts_frame(verdicts: Iterable[Verdict]) -> pl.DataFrame:
    """The rows as ``schemas.VERDICTS``, sorted by key.

    Raises:
        ValueError: If two share a key.
    """
    names = [name for name in VERDICTS.columns if name not in ("coder", "hookpoint", "latent")]
    columns: dict[str, list[Any]] = {name: [] for name in VERDICTS.columns}
    for verdict in verdicts:
        columns["coder"].append(verdict.latent.coder)
        columns["hookpoint"].append(verdict.latent.hookpoint)
        columns["latent"].append(verdict.latent.index)
        for name in names:
            columns[name].append(getattr(verdict, name))
    return VERDICTS.conform(pl.DataFrame(columns, schema=dict(VERDICTS.columns)))


def judged_windows(
    record: LatentRecord, n_examples: int | None, split: Split = "test"
) -> tuple[tuple[Window, ...], tuple[Window, ...]]:
    """The activating and the non-activating windows that a judge sees, each by rank.

    Args:
        record: The latent.
        n_examples: At most so many of each class; null: all.
        split: Whose windows; ``select`` to choose between explanations.
    """
    activating = sorted(record.activating(split), key=lambda w: (w.rank, w.window_id))
    return tuple(activating[:n_examples]), silent_windows(record, split)[:n_examples]


def silent_windows(record: LatentRecord, split: Split) -> tuple[Window, ...]:
    """The non-activating windows of a split, each once, by rank.

    A window that was drawn as two kinds of negative is seen once, as the kind that stands first in
    ``NegativeKind``: a verdict's key does not name the kind, and so ``random`` stays a random draw.
    """
    kinds = get_args(NegativeKind)
    silent: dict[int, Window] = {}
    for window in sorted(record.non_activating(split), key=lambda w: kinds.index(w.negative_kind)):
        silent.setdefault(window.window_id, window)
    return tuple(sorted(silent.values(), key=lambda w: (w.rank, w.window_id)))


def layer_of(latent: LatentId) -> LayerKey:
    """The layer a latent belongs to, for the address of a draw."""
    return LayerKey(latent.coder, latent.hookpoint)
