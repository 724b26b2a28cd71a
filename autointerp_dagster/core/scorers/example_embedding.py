"""Example embedding: do a sentence embedder's vectors of shown examples tell new windows apart?

No explanation is needed. Each round takes

1. p: an activating test window of a quantile; u: a silent test window;
2. P: activating train windows of the same quantile; N: silent train windows.

All are marked as in fuzzing: p and P truly; u with the marks of a test window drawn from p's
quantile; a window of N with those of a drawn activating train window. Then p and u are each scored
by delta(x) = mean cos(x, P) - mean cos(x, N), and the latent by the AUROC of delta over p and u.

Rounds go through the quantiles in turn, in a drawn order; no two share p or u. A quantile without
train windows is left out, and without silent train windows there is no round at all: a latent may
have fewer rounds than asked for, or none.

Source:
    The task is that of arXiv 2410.13928; the draws and the copied marks are ours.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import ExampleEmbeddingConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.schemas import MAIN_VARIANT
from autointerp_dagster.core.scorers.judging import draw_key
from autointerp_dagster.core.scorers.marks import mark_truly
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.rounds import balanced, by_quantile, drawn_one, drawn_order
from autointerp_dagster.core.scorers.tasks import Verdict, silent_windows
from autointerp_dagster.core.scorers.vectors import Embedder, cosines, in_calls, vectors_of
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"2.{highlight.VERSION}"
"""Of this module and the way windows are shown."""

Vector = Float32[np.ndarray, " dim"]


class Round(NamedTuple):
    """A pair of test windows and what they are compared with; texts are escaped and marked."""

    quantile: int
    activating: Window
    silent: Window
    activating_text: str
    silent_text: str
    near: tuple[str, ...]
    """Of P: activating train windows."""
    far: tuple[str, ...]
    """Of N: silent train windows."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is embedded."""
        return (self.activating_text, self.silent_text, *self.near, *self.far)


def rounds_of(
    record: LatentRecord, config: ExampleEmbeddingConfig, detokenizer: Detokenizer
) -> list[Round]:
    """The rounds of one latent, at most ``config.n_rounds``."""
    draw = _Draw(record.latent, config, detokenizer)
    examples = by_quantile(record.activating("train"))
    tested = by_quantile(record.activating("test"))
    far, usable = silent_windows(record, "train"), [q for q in tested if q in examples]
    if not usable or not far:
        return []
    far_texts = {w.window_id: draw.false_text(w, record.activating("train")) for w in far}
    order = balanced(usable, draw.key("quantiles"))
    pools = {q: drawn_order(tested[q], draw.key(f"activating-{q}")) for q in usable}
    silent = drawn_order(silent_windows(record, "test"), draw.key("silent"))
    rounds: list[Round] = []
    for number in range(config.n_rounds):
        quantile = order[number % len(order)]
        if not pools[quantile] or not silent:
            continue
        activating, other = pools[quantile].pop(0), silent.pop(0)
        near = drawn_order(examples[quantile], draw.key(f"near-{number}"))[: config.n_shown]
        compared = drawn_order(far, draw.key(f"far-{number}"))[: config.n_shown]
        rounds.append(
            Round(
                quantile=quantile,
                activating=activating,
                silent=other,
                activating_text=draw.true_text(activating),
                silent_text=draw.false_text(other, tested[quantile]),
                near=tuple(draw.true_text(window) for window in near),
                far=tuple(far_texts[window.window_id] for window in compared),
            )
        )
    return rounds


def verdicts(
    jobs: Iterable[Job],
    config: ExampleEmbeddingConfig,
    detokenizer: Detokenizer,
    embedder: Embedder,
) -> Iterator[Verdict]:
    """Two verdicts per round, on p and on u, in the order of the jobs.

    ``score`` is delta, in [-2, 2]; there is no prediction and no probability. Of the jobs only the
    records are used, and these are drawn lazily; each distinct text of a few latents is embedded
    once, by one call, without the embedder's ``query_prefix``.
    """
    for group in in_calls(jobs):
        asked = [
            (job.record.latent, asked_round)
            for job in group
            for asked_round in rounds_of(job.record, config, detokenizer)
        ]
        vector_of = vectors_of(embedder, (text for _, found in asked for text in found.texts))
        for latent, found in asked:
            yield from verdicts_of(latent, found, vector_of)


def verdicts_of(latent: LatentId, asked: Round, vector_of: Mapping[str, Vector]) -> list[Verdict]:
    """The verdicts on p and u, in this order, both with the round's quantile.

    A window whose own vector, or any that it is compared with, has no direction (zero or not
    finite) is failed with ``no_vector``.

    Args:
        latent: Whose round it is.
        asked: The round.
        vector_of: At least its texts' vectors.
    """
    near = np.stack([vector_of[text] for text in asked.near])
    far = np.stack([vector_of[text] for text in asked.far])
    shown = ((asked.activating, asked.activating_text), (asked.silent, asked.silent_text))
    return [
        _verdict(latent, asked.quantile, window, _delta(vector_of[text], near, far))
        for window, text in shown
    ]


def _delta(
    vector: Vector,
    near: Float32[np.ndarray, "near dim"],
    far: Float32[np.ndarray, "far dim"],
) -> float | None:
    """Null where a vector has no direction."""
    delta = float(cosines(vector, near).mean() - cosines(vector, far).mean())
    return None if np.isnan(delta) else delta


def _verdict(latent: LatentId, quantile: int, window: Window, delta: float | None) -> Verdict:
    return Verdict(
        latent=latent,
        explainer=None,
        subject="own",
        variant=MAIN_VARIANT,
        window_id=window.window_id,
        explanation_of=None,
        is_activating=window.is_activating,
        quantile=quantile,
        negative_kind=window.negative_kind,
        prediction=None,
        probability=None,
        score=delta,
        status="failed" if delta is None else "ok",
        reason="no_vector" if delta is None else None,
        call_id=None,
    )


@dataclass(frozen=True, slots=True)
class _Draw:
    """The draws of one latent, and windows as text."""

    latent: LatentId
    config: ExampleEmbeddingConfig
    detokenizer: Detokenizer

    def key(self, purpose: str) -> int:
        return draw_key(self.latent, self.config.seed, f"example-embedding-{purpose}")

    def true_text(self, window: Window) -> str:
        return mark_truly(window, self.detokenizer).text

    def false_text(self, window: Window, donors: Sequence[Window]) -> str:
        """With the marks of one of the donors, drawn for the window."""
        donor = drawn_one(donors, self.key(f"marks-{window.window_id}"))
        marks = mark_truly(donor, self.detokenizer).marks
        return mark_truly(window, self.detokenizer).text_marked_as(marks)
