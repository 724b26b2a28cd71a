"""Every table that a stage writes: columns, key and order, declared once.

``coder`` and ``hookpoint`` are part of the key of every table about latents except
``activations``, the bulk table, whose manifest names its cell.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import polars as pl

from autointerp_dagster.core.types import LayerKey

Split = Literal["train", "select", "test"]
"""``train``: the explainer may see; ``select``: chooses between explanations; ``test``: judges."""

NegativeKind = Literal["random", "neighbour", "similar", "same_token"]
"""How a non-activating window was chosen."""

LatentStatus = Literal["ok", "dead", "rare", "dense"]
"""``rare``: too few firing tokens or test windows; ``dense``: fires nearly everywhere."""

ExplanationStatus = Literal["ok", "failed", "skipped"]
ExplanationReason = Literal[
    "dead",
    "rare",
    "dense",
    "unparsable",
    "refused",
    "too_long",
    "call_failed",
    "budget",
    "deadline",
    "not_recorded",
    "no_train_windows",
    "no_intervention",
]
"""Why there is no text. The first three come from the latent's record; ``no_intervention``: the
model could not be steered along the latent as wanted."""

InterventionStatus = Literal["ok", "dead", "rare", "dense", "too_few", "off_target"]
"""``too_few``: prompts on whose last token the latent fires; ``off_target``: no strength was found
whose divergence is within the tolerance of the target."""

VerdictStatus = Literal["ok", "failed"]
VerdictReason = Literal[
    "unparsable", "refused", "too_long", "no_vector", "no_logprobs", "off_target",
    "call_failed", "budget", "deadline", "not_recorded",
]  # fmt: skip
"""The first six are answers. ``too_long``: the prompt does not fit the model; ``no_vector``: an
embedding of length zero or not finite; ``no_logprobs``: log-probabilities that are missing or no
numbers; ``off_target``: an intervention whose strength is not the one wanted. The others lie with
the run and are tried again by the next; ``not_recorded``: a replay found no such call in the
journal."""

UNASKED: tuple[VerdictReason, ...] = ("budget", "deadline", "not_recorded")
"""Reasons of a row whose question was never sent."""

UNDONE: tuple[VerdictReason, ...] = (*UNASKED, "call_failed")
"""Reasons that lie with the run, not with the answer: such a cell is never taken as done."""

Subject = Literal["own", "other", "random"]
"""Whose explanation was scored: the latent's own, another latent's (a floor), a random coder's."""

MAIN_VARIANT = "all"
"""The variant of a scorer's ordinary verdicts, and of the metrics over all of them."""

MetricStatus = Literal[
    "ok", "not_run", "no_explanation", "too_few", "no_donor", "missing_class", "failed", "unasked",
    "no_score", "undefined",
]  # fmt: skip
"""Why a metric has no value, or ``ok``. ``unasked``: a budget or deadline came first; ``no_score``:
the scorer did not rank the windows (a judge without log-probabilities); ``undefined``: 0 / 0, e.g.
precision if nothing is called activating."""


@dataclass(frozen=True)
class Table:
    """A declared table: every frame that is stored passes :meth:`conform`."""

    name: str
    columns: Mapping[str, Any]
    """Polars type of each column (a union of polars types has no repr that beartype accepts)."""
    key: tuple[str, ...]
    """Columns that identify a row; rows are sorted by them. A key column may be null."""

    def empty(self) -> pl.DataFrame:
        """The table without rows."""
        return pl.DataFrame(schema=dict(self.columns))

    def conform(self, frame: pl.DataFrame, layer: LayerKey | None = None) -> pl.DataFrame:
        """``frame`` with exactly the declared columns, sorted by key.

        Args:
            frame: At least the declared columns (``coder`` and ``hookpoint`` excepted when
                ``layer`` is given), of types that cast without loss; others are an error.
            layer: Fills ``coder`` and ``hookpoint``.

        Raises:
            ValueError: If a column is missing, unknown or of another type, or a key repeats.
        """
        if layer is not None:
            frame = frame.with_columns(coder=pl.lit(layer.coder), hookpoint=pl.lit(layer.hookpoint))
        missing = [name for name in self.columns if name not in frame.columns]
        unknown = [name for name in frame.columns if name not in self.columns]
        if missing or unknown:
            raise ValueError(
                f"table {self.name}: missing columns {missing}, unknown columns {unknown}."
            )
        try:
            frame = frame.select(pl.col(n).cast(t) for n, t in self.columns.items())
        except pl.exceptions.InvalidOperationError as error:
            raise ValueError(f"table {self.name}: {error}") from error
        constant = () if layer is None else ("coder", "hookpoint")
        frame = frame.sort([name for name in self.key if name not in constant], nulls_last=True)
        as_before = [pl.col(name).eq_missing(pl.col(name).shift(1)) for name in self.key]
        repeated = frame.select(pl.all_horizontal(as_before).slice(1).sum()).item()
        if repeated:
            raise ValueError(f"table {self.name}: {repeated} rows repeat a key {self.key}.")
        return frame


_LATENT = {"coder": pl.String, "hookpoint": pl.String, "latent": pl.UInt32}
_LATENT_KEY = ("coder", "hookpoint", "latent")

DOCUMENTS = Table(
    "documents",
    {
        "document": pl.UInt32,
        "doc_id": pl.String,
        "title": pl.String,
        "source": pl.String,
        "content_hash": pl.String,  # of the text; decides the split
        "n_tokens": pl.UInt32,
    },
    ("document",),
)

CONTEXTS = Table(
    "contexts",
    {
        "context": pl.UInt32,
        "document": pl.UInt32,
        "offset": pl.UInt32,  # of the first token after BOS, in tokens of the document
        "n_tokens": pl.UInt32,  # with BOS
    },
    ("context",),
)

ACTIVATIONS = Table(
    "activations",
    {
        "latent": pl.UInt32,
        "context": pl.UInt32,
        "position": pl.UInt16,  # in the context; 0 is BOS where there is one
        "activation": pl.Float32,  # raw coder units, > 0, rounded to bfloat16
    },
    ("latent", "context", "position"),
)

FIRING_COUNTS = Table(
    "firing_counts",
    {
        "latent": pl.UInt32,
        "n_tokens": pl.UInt64,
        "n_contexts": pl.UInt64,
        "max_activation": pl.Float32,  # null for a dead latent
    },
    ("latent",),
)
"""One row per latent of the whole layer, also for those that never fired."""

LATENTS = Table(
    "latents",
    {
        **_LATENT,
        "status": pl.String,
        "n_tokens": pl.UInt64,
        "n_contexts": pl.UInt64,
        "n_windows": pl.UInt32,  # windows of the grid in which it fires
        "token_firing_rate": pl.Float64,
        "window_firing_rate": pl.Float64,
        "max_activation": pl.Float32,
        "n_train": pl.UInt32,  # activating windows there are in the split, before sampling
        "n_select": pl.UInt32,
        "n_test": pl.UInt32,
        "n_near_duplicates": pl.UInt32,  # dropped from select and test
        "n_negative_train": pl.UInt32,  # non-activating windows sampled
        "n_negative_select": pl.UInt32,
        "n_negative_test": pl.UInt32,
        "top_tokens": pl.List(pl.UInt32),  # by summed activation over train, at most 8, descending
        "top_token_shares": pl.List(pl.Float64),  # of the summed activation
        "activation_quantiles": pl.List(pl.Float32),  # at 0, .25, .5, .75, 1 of firing tokens
    },
    _LATENT_KEY,
)

WINDOWS = Table(
    "windows",
    {
        **_LATENT,
        "split": pl.String,
        "is_activating": pl.Boolean,
        "negative_kind": pl.String,  # null for activating windows
        "window_id": pl.UInt64,  # context << 16 | start
        "context": pl.UInt32,
        "start": pl.UInt16,  # first position, in the context
        "quantile": pl.UInt8,  # 0 strongest; null for non-activating windows
        "rank": pl.UInt16,  # order in which the windows of a (split, is_activating) are used
        "max_activation": pl.Float32,  # null for non-activating windows
        "activations": pl.List(pl.Float32),  # one per position; null for non-activating windows
    },
    (*_LATENT_KEY, "split", "is_activating", "negative_kind", "window_id"),
)

SELECTION = Table(
    "selection",
    {
        **_LATENT,
        "is_floor": pl.Boolean,  # its floors are measured too
        "rank": pl.UInt32,  # among the layer's, floor latents first; null: dead or rare
    },
    _LATENT_KEY,
)
"""The latents that are to be explained. A scorer with a sample of its own takes the first ranks."""

DONORS = Table(
    "donors",
    {**_LATENT, "rank": pl.UInt16, "donor": pl.UInt32, "decoder_cosine": pl.Float32},
    (*_LATENT_KEY, "rank"),
)
"""For each floor latent of the cell, in order, whose explanation may stand in for its own."""

EXPLANATIONS = Table(
    "explanations",
    {
        **_LATENT,
        "explainer": pl.String,
        "candidate": pl.UInt16,
        "text": pl.String,  # null unless status is ok
        "selected": pl.Boolean,
        "status": pl.String,
        "reason": pl.String,
        "call_id": pl.String,  # null where no model was asked
    },
    (*_LATENT_KEY, "explainer", "candidate"),
)

VERDICTS = Table(
    "verdicts",
    {
        **_LATENT,
        "explainer": pl.String,  # null for a scorer that needs no explanation
        "subject": pl.String,
        "variant": pl.String,
        "window_id": pl.UInt64,
        "explanation_of": pl.UInt32,  # the latent whose explanation was used
        "is_activating": pl.Boolean,
        "quantile": pl.UInt8,
        "negative_kind": pl.String,
        "prediction": pl.Boolean,  # null if failed, or if the scorer only ranks
        "probability": pl.Float64,  # of "activating"; null where unknown
        "score": pl.Float64,  # what the scorer ranks windows by; null where it does not
        "turn": pl.UInt32,  # of the prompt in its latent's order; null where none was asked
        "predicted": pl.List(pl.Float32),  # by simulation, 0..10 per visible token; else null
        "actual": pl.List(pl.Float32),  # displayed activation of the same tokens
        "status": pl.String,
        "reason": pl.String,
        "call_id": pl.String,
    },
    (*_LATENT_KEY, "explainer", "subject", "variant", "window_id", "is_activating"),
)

INTERVENTIONS = Table(
    "interventions",
    {
        **_LATENT,
        "kl_target": pl.Float64,  # nats
        "strength": pl.Float64,  # added along the decoder row; null: none was found
        "kl": pl.Float64,  # mean KL(clean || steered) over the scoring prompts at that strength
        "reverse_kl": pl.Float64,
        "n_steps": pl.UInt16,  # strengths tried
        "n_prompts": pl.UInt16,  # prompts kept, of both kinds
        "n_dropped": pl.UInt16,  # the latent no longer fired on the last token
        "status": pl.String,
    },
    (*_LATENT_KEY, "kl_target"),
)

INTERVENTION_PROMPTS = Table(
    "intervention_prompts",
    {
        **_LATENT,
        "kl_target": pl.Float64,
        "window_id": pl.UInt64,  # context << 16 | position of the last token
        "is_for_explainer": pl.Boolean,  # else for scoring
        "quintile": pl.UInt8,  # of the activation on the last token; 0 strongest
        "activation": pl.Float32,
        "prompt": pl.String,
        "clean": pl.String,  # continuation; null for the explainer's prompts
        "steered": pl.String,
        "promoted": pl.List(pl.String),  # tokens whose probability rose most; explainer's only
        "rises": pl.List(pl.Float64),  # by how much, descending
    },
    (*_LATENT_KEY, "kl_target", "window_id"),
)

_METRIC = {
    "value": pl.Float64,
    "lo": pl.Float64,  # 95 % interval
    "hi": pl.Float64,
    "n": pl.UInt32,  # verdicts, latents or pairs behind the value
    "n_failed": pl.UInt32,
    "status": pl.String,
}

LATENT_METRICS = Table(
    "latent_metrics",
    {
        **_LATENT,
        "explainer": pl.String,
        "scorer": pl.String,
        "subject": pl.String,
        "variant": pl.String,  # of the scorer; "all", "quantile=3", "negatives=random" slice it
        "metric": pl.String,
        **_METRIC,
    },
    (*_LATENT_KEY, "explainer", "scorer", "subject", "variant", "metric"),
)

LAYER_METRICS = Table(
    "layer_metrics",
    {
        "coder": pl.String,
        "hookpoint": pl.String,
        "explainer": pl.String,
        "scorer": pl.String,
        "subject": pl.String,
        "variant": pl.String,
        "metric": pl.String,
        "statistic": pl.String,  # median, q25, q75, mean, lift_over_other, count, ...
        **_METRIC,
    },
    ("coder", "hookpoint", "explainer", "scorer", "subject", "variant", "metric", "statistic"),
)

STUDY_METRICS = Table(
    "study_metrics",
    {
        "comparison": pl.String,  # subject, explainer, scorer, layer, matched, cost
        "a": pl.String,
        "b": pl.String,
        "explainer": pl.String,
        "scorer": pl.String,
        "statistic": pl.String,
        "value": pl.Float64,
        "lo": pl.Float64,
        "hi": pl.Float64,
        "p": pl.Float64,
        "n": pl.UInt32,
    },
    ("comparison", "a", "b", "explainer", "scorer", "statistic"),
)

TABLES = (
    DOCUMENTS, CONTEXTS, ACTIVATIONS, FIRING_COUNTS, LATENTS, WINDOWS, SELECTION, DONORS,
    INTERVENTIONS, INTERVENTION_PROMPTS, EXPLANATIONS, VERDICTS, LATENT_METRICS, LAYER_METRICS,
    STUDY_METRICS,
)  # fmt: skip

LATENT_STATUSES: tuple[str, ...] = get_args(LatentStatus)
EXPLANATION_REASONS: tuple[str, ...] = get_args(ExplanationReason)
VERDICT_REASONS: tuple[str, ...] = get_args(VerdictReason)
METRIC_STATUSES: tuple[str, ...] = get_args(MetricStatus)


def window_id(context: pl.Expr, start: pl.Expr) -> pl.Expr:
    """The address of a window as one number: ``context << 16 | start``."""
    return context.cast(pl.UInt64) * 65_536 + start.cast(pl.UInt64)
