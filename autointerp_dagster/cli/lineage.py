"""What a walk from a score to its origins tells: the shape of ``autointerp why --json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autointerp_dagster.adapters.lineage import Made
from autointerp_dagster.cli.latent_statistics import LatentStatistics
from autointerp_dagster.core.llm import Message


@dataclass(frozen=True, slots=True)
class Call:
    """A question to a language model, and its answer."""

    call_id: str
    is_known: bool
    """False if the journal does not have it any more; then the rest is null."""
    model: str | None = None
    time: str | None = None
    messages: tuple[Message, ...] = ()
    """All of them; none if a plain text was asked about."""
    prompt: str | None = None
    """The plain text."""
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class JudgedWindow:
    """One verdict, and the text that it is about."""

    window_id: int
    context: int
    position: int
    """Of its first token in the context."""
    document: str
    text_hash: str
    """Of the document."""
    variant: str
    is_activating: bool
    negative_kind: str | None
    neighbour: int | None
    """The latent that fires here, of a negative of that kind."""
    prediction: bool | None
    probability: float | None
    score: float | None
    predicted: tuple[float, ...] | None
    status: str
    reason: str | None
    judged_by: Call | None


@dataclass(frozen=True, slots=True)
class Explained:
    """The verdicts on one explanation."""

    explainer: str | None
    """Null for a scorer that needs no explanation; then so are the next three."""
    subject: str
    explanation_of: int | None
    """The latent that it was written for."""
    explanation: str | None
    written_by: Call | None
    n_windows: int
    windows: tuple[JudgedWindow, ...]
    """The first of them."""


@dataclass(frozen=True, slots=True)
class ScoreWalk:
    """One score of a latent, and all that it rests on."""

    made: Made
    why_unscored: str | None
    """Why there is no verdict; null if there is one."""
    explained: tuple[Explained, ...]
    made_from: tuple[Made, ...]
    """The nearest first."""
    external: Mapping[str, str]
    """``asset place`` to weights' or corpus hash."""
    text: Mapping[str, Any]
    """Where the text is, and which version of it was read."""
    activations: LatentStatistics | None
    """Null where a score before it rests on the same activations, or nothing is known of them."""


@dataclass(frozen=True, slots=True)
class LatentWalk:
    """Every score of a latent."""

    study: str
    layer: str
    latent: int
    scores: tuple[ScoreWalk, ...]
