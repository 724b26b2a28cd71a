"""Every table that a stage writes: columns, key and order, declared once.

``coder`` and ``hookpoint`` are part of the key of every table about latents except
``activations``, the bulk table, whose manifest names its cell.
"""

import polars as pl

from autointerp_dagster.core.schemas.table import Table

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

LATENT_STATISTICS = Table(
    "latent_statistics",
    {
        **_LATENT,
        "n_tokens": pl.UInt64,
        "n_contexts": pl.UInt64,
        "max_activation": pl.Float32,  # null for a dead latent, like all below but the lists
        "mean_activation": pl.Float64,  # over firing tokens
        "activation_histogram": pl.List(pl.UInt64),  # firing tokens between HISTOGRAM_EDGES
        "top_tokens": pl.List(pl.UInt32),  # by summed activation over the whole corpus, descending
        "top_token_shares": pl.List(pl.Float64),  # of the summed activation
        "single_token_share": pl.Float64,  # of firing tokens, the most frequent token's
        "position_information": pl.Float64,  # nats, between firing and the position in the context
        "promoted_tokens": pl.List(pl.UInt32),  # by the decoder through the unembedding
        "suppressed_tokens": pl.List(pl.UInt32),
    },
    _LATENT_KEY,
)
"""For people. What an explainer may see of tokens is in ``latents``, from train windows alone."""

NEIGHBOURS = Table(
    "neighbours",
    {
        **_LATENT,
        "measure": pl.String,  # cofiring (Jaccard over tokens), decoder, encoder (cosines)
        "rank": pl.UInt16,  # 0 is the nearest
        "neighbour": pl.UInt32,
        "value": pl.Float64,
    },
    (*_LATENT_KEY, "measure", "rank"),
)

NEIGHBOUR_WINDOWS = Table(
    "neighbour_windows",
    {
        **_LATENT,  # the neighbour: a latent that some latent of the cell has as a neighbour
        "window_id": pl.UInt64,  # context << 16 | start, on the grid of fixed windows
        "activations": pl.List(pl.Float32),  # the neighbour's, one per position
    },
    (*_LATENT_KEY, "window_id"),
)
"""A sample of the windows in which each neighbour fires, drawn by hashed priority."""

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
        "n_near_duplicates": pl.UInt32,  # activating and non-activating windows dropped
        "n_negative_train": pl.UInt32,  # non-activating windows sampled; of two kinds: twice
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
        "neighbour": pl.UInt32,  # who fires here, for negatives of kind neighbour; else null
        "neighbour_activations": pl.List(pl.Float32),  # the neighbour's, one per position
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
        "comparison": pl.String,  # subject, explainer, scorer, layer, coder, matched, cost
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
    DOCUMENTS, CONTEXTS, ACTIVATIONS, FIRING_COUNTS, LATENT_STATISTICS, NEIGHBOURS,
    NEIGHBOUR_WINDOWS, LATENTS, WINDOWS, SELECTION, DONORS,
    INTERVENTIONS, INTERVENTION_PROMPTS, EXPLANATIONS, VERDICTS, LATENT_METRICS, LAYER_METRICS,
    STUDY_METRICS,
)  # fmt: skip


def window_id(context: pl.Expr, start: pl.Expr) -> pl.Expr:
    """The address of a window as one number: ``context << 16 | start``."""
    return context.cast(pl.UInt64) * 65_536 + start.cast(pl.UInt64)
