"""Latents of two layers that are one latent found twice, and whether their explanations agree.

1. Two latents match if each has its largest decoder cosine in the other layer with the other, and
   that cosine reaches a cut.
2. How often they fire on the same tokens is counted, for these only; those that hardly do are no
   match. Directions of different layers may be alike by what lies between them.
3. The cosine of their explanations' embeddings is compared with that of explanations of latents
   that do not match.
"""

from typing import Any, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float32, Float64, Int64, Shaped
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.resampling import (
    bootstrap_means,
    bootstrap_medians,
    small_sample_interval,
)
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.schemas import STUDY_METRICS

_BLOCK = 2048
"""Latents of each layer compared at a time: 16 MB of cosines."""

_TOKEN = ["context", "position"]


class Explained(NamedTuple):
    """Explanations of one layer's latents as vectors."""

    latents: Int64[np.ndarray, " explained"]
    """Distinct, any order; matched latents without an explanation are absent."""
    vectors: Float32[np.ndarray, "explained dim"]
    """Of the same embedder for both layers; any length but zero."""


def matched_latents(
    directions_a: Float32[np.ndarray, "latent_a d_a"],
    directions_b: Float32[np.ndarray, "latent_b d_b"],
    among: tuple[Int64[np.ndarray, " some_a"], Int64[np.ndarray, " some_b"]] | None = None,
    *,
    min_cosine: float = 0.7,
    block: int = _BLOCK,
) -> pl.DataFrame:
    """Pairs of latents that are each other's nearest by decoder cosine.

    Args:
        directions_a: Row i is the decoder direction of latent i; of any length, a row of zeros
            matches nothing.
        directions_b: The same of the other layer, in the same space.
        among: Only pairs of these latents, distinct ones of each layer. They are still each other's
            nearest among all; with few of them it is much cheaper. None: all.
        min_cosine: Pairs below are dropped, in (0, 1].
        block: Latents compared at a time; bounds memory, changes no value.

    Returns:
        ``latent_a`` (ascending), ``latent_b``, ``cosine``. Ties go to the lower latent.

    Raises:
        ValueError: If a direction is not finite, or the spaces or an argument do not fit.
    """
    if not 0 < min_cosine <= 1:
        raise ValueError(f"matched_latents: min_cosine {min_cosine}, wanted in (0, 1].")
    if directions_a.shape[1] != directions_b.shape[1]:
        raise ValueError(
            f"matched_latents: directions of {directions_a.shape[1]} and {directions_b.shape[1]} "
            "dimensions, wanted equally many. Match latents that write to the same stream."
        )
    unit_a, unit_b = _unit(directions_a, "a"), _unit(directions_b, "b")
    everything = (np.arange(len(unit_a)), np.arange(len(unit_b)))
    some_a, some_b = everything if among is None else among
    a = np.sort(some_a)
    there = _nearest(unit_a[a], unit_b, block)
    is_near = (there.cosine >= min_cosine) & np.isin(there.place, some_b)
    a, b, cosine = a[is_near], there.place[is_near], there.cosine[is_near]
    is_mutual = _nearest(unit_b[b], unit_a, block).place == a
    return pl.DataFrame(
        {"latent_a": a[is_mutual], "latent_b": b[is_mutual], "cosine": cosine[is_mutual]},
        schema={"latent_a": pl.UInt32, "latent_b": pl.UInt32, "cosine": pl.Float64},
    )


class _Nearest(NamedTuple):
    place: Int64[np.ndarray, " row"]
    """The lowest of the nearest."""
    cosine: Float64[np.ndarray, " row"]


def _unit(rows: Float32[np.ndarray, "latent d_model"], name: str) -> Float32[np.ndarray, "..."]:
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"matched_latents: direction of latent {bad} of {name} is not finite.")
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, np.float32(1))


def _nearest(
    rows: Float32[np.ndarray, "row d_model"],
    others: Float32[np.ndarray, "other d_model"],
    block: int,
) -> _Nearest:
    """The nearest of the others for each row, both of length one; a block of cosines at a time."""
    found, best = np.zeros(len(rows), np.int64), np.full(len(rows), -np.inf)
    for i in range(0, len(rows), block):
        here = slice(i, i + block)
        for j in range(0, len(others), block):
            cosine = rows[here] @ others[j : j + block].T
            column = cosine.argmax(axis=1)
            largest = cosine[np.arange(len(cosine)), column]
            is_better = largest > best[here]
            found[here][is_better] = column[is_better] + j
            best[here][is_better] = largest[is_better]
    return _Nearest(found, np.clip(best, -1, 1))


def with_cofiring(
    matches: pl.DataFrame,
    activations_a: pl.DataFrame,
    activations_b: pl.DataFrame,
    min_jaccard: float = 0.0,
) -> pl.DataFrame:
    """The matches that fire together, and how often they do.

    Args:
        matches: ``latent_a``, ``latent_b``, ``cosine``; each latent once.
        activations_a: ``ACTIVATIONS`` rows of these latents, and perhaps of others, any order.
        activations_b: On the same tokens.
        min_jaccard: Pairs below are dropped, in [0, 1]; if above 0, also pairs of which neither
            fires.

    Returns:
        ``matches`` with ``n_both``, ``n_either`` and ``jaccard`` over the tokens on which they fire
        (``jaccard`` null where neither does).
    """
    pairs = matches.with_row_index("pair")
    fires = [
        activations.join(pairs.select("pair", latent=column), on="latent").select("pair", *_TOKEN)
        for activations, column in ((activations_a, "latent_a"), (activations_b, "latent_b"))
    ]
    counts = [frame.group_by("pair").agg(n=pl.len()) for frame in fires]
    counts.append(fires[0].join(fires[1], on=["pair", *_TOKEN]).group_by("pair").agg(n=pl.len()))
    for name, count in zip(("n_a", "n_b", "n_both"), counts, strict=True):
        count = count.rename({"n": name})
        pairs = pairs.join(count, on="pair", how="left", maintain_order="left")
    pairs = pairs.with_columns(pl.col("n_a", "n_b", "n_both").fill_null(0))
    pairs = pairs.with_columns(n_either=pl.col("n_a") + pl.col("n_b") - pl.col("n_both"))
    share = pl.when(pl.col("n_either") > 0).then(pl.col("n_both") / pl.col("n_either"))
    found = pairs.select(*matches.columns, "n_both", "n_either", jaccard=share)
    if min_jaccard > 0:
        found = found.filter(pl.col("jaccard") >= min_jaccard)
    return found


def explanation_similarity(
    matches: pl.DataFrame,
    explained_a: Explained,
    explained_b: Explained,
    names: tuple[str, str, str | None],
    config: MetricsConfig,
) -> pl.DataFrame:
    """Whether matched latents are explained alike.

    Rows of comparison ``matched``: ``n_matched`` (pairs there are); ``median_decoder_cosine`` and
    ``median_jaccard`` over them; over the pairs with both explanations ``mean_similarity`` (cosine
    of their vectors), ``mean_similarity_unmatched`` (of each explanation with those of all other
    pairs' latents: what any two explanations have in common) and ``mean_difference`` of the two,
    whose p-value is Wilcoxon's signed-rank test. Intervals are by bootstrap over
    pairs; with fewer than two pairs there is none, and no floor.

    Args:
        matches: Of :func:`matched_latents`, then :func:`with_cofiring`.
        explained_a: Explanations of the first layer's latents.
        explained_b: Of the second's.
        names: The two layers (``<coder>@<hookpoint>``), and the explainer, null for several.
        config: Confidence, resamples, seed.

    Returns:
        ``STUDY_METRICS`` rows; ``scorer`` is null.

    Raises:
        ValueError: If a vector is of length zero or not finite.
    """
    rows = [_Row("n_matched", float(matches.height), None, None, None, matches.height)]
    for statistic, column in (("median_decoder_cosine", "cosine"), ("median_jaccard", "jaccard")):
        values = matches[column].drop_nulls().cast(pl.Float64).to_numpy()
        medians = bootstrap_medians(values, config.n_bootstrap, _generator(config, names, column))
        median = float(np.median(values)) if len(values) else None
        rows.append(
            _Row(statistic, median, *_limits(medians, median, values, config), None, len(values))
        )
    own, unmatched = _similarities(matches, explained_a, explained_b)
    table = {
        "mean_similarity": own,
        "mean_similarity_unmatched": unmatched,
        "mean_difference": own - unmatched,
    }
    for statistic, values in table.items():
        rng = _generator(config, names, statistic)
        means = bootstrap_means(values[:, None], config.n_bootstrap, rng)[:, 0]
        value = float(values.mean()) if len(values) else None
        p = _signed_rank_p(values) if statistic == "mean_difference" else None
        rows.append(_Row(statistic, value, *_limits(means, value, values, config), p, len(values)))
    fixed = {"comparison": "matched", "a": names[0], "b": names[1], "explainer": names[2]}
    filled = [fixed | {"scorer": None} | row._asdict() for row in rows]
    frame = pl.DataFrame(filled, schema=dict(STUDY_METRICS.columns))
    return STUDY_METRICS.conform(frame.with_columns(pl.col("value", "lo", "hi").fill_nan(None)))


class _Row(NamedTuple):
    statistic: str
    value: float | None
    lo: float | None
    hi: float | None
    p: float | None
    n: int


def _signed_rank_p(difference: Float64[np.ndarray, " pair"]) -> float | None:
    if len(difference) < 2:
        return None
    if not difference.any():
        return 1.0
    tested: Any = stats.wilcoxon(difference, zero_method="zsplit")  # a union of result types
    return float(tested.pvalue)


def _similarities(
    matches: pl.DataFrame, explained_a: Explained, explained_b: Explained
) -> tuple[Float64[np.ndarray, " pair"], Float64[np.ndarray, " pair"]]:
    """Cosine of each pair's explanations, and their mean cosine with the other pairs'."""
    units = [_unit_vectors(explained) for explained in (explained_a, explained_b)]
    pairs = matches.select("latent_a", "latent_b")
    for place, explained in zip(("a", "b"), (explained_a, explained_b), strict=True):
        rows = pl.DataFrame({f"latent_{place}": explained.latents.astype(np.uint32)})
        pairs = pairs.join(rows.with_row_index(f"row_{place}"), on=f"latent_{place}")
    pairs = pairs.sort("latent_a")
    a, b = units[0][pairs["row_a"].to_numpy()], units[1][pairs["row_b"].to_numpy()]
    own = (a * b).sum(axis=1)
    others = max(len(own) - 1, 0)
    if not others:
        return own, np.full(len(own), np.nan)
    # The sum over all pairs less the own one; both directions.
    return own, ((a @ b.sum(axis=0) + b @ a.sum(axis=0)) / 2 - own) / others


def _unit_vectors(explained: Explained) -> Float64[np.ndarray, "explained dim"]:
    vectors = explained.vectors.astype(np.float64)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norm[:, 0]) & (norm[:, 0] > 0)))
    if len(bad):
        raise ValueError(
            f"explanation_similarity: the vector of latent {explained.latents[bad[0]]} is of "
            "length zero or not finite. Leave such explanations out."
        )
    return vectors / norm


def _limits(
    replicates: Float64[np.ndarray, " replicate"],
    value: float | None,
    values: Shaped[np.ndarray, " pair"],
    config: MetricsConfig,
) -> tuple[float | None, float | None]:
    if value is None or len(values) < 2:
        return None, None
    return small_sample_interval(replicates, value, len(values), config.confidence)


def _generator(
    config: MetricsConfig, names: tuple[str, str, str | None], statistic: str
) -> np.random.Generator:
    purpose = "\0".join(["matched", *map(str, names), statistic])
    return latent_rng(config.seed, None, None, purpose)
