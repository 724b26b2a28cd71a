"""Latents of two layers that are one latent found twice, and whether their explanations agree.

1. Two latents match if each has its largest decoder cosine in the other layer with the other, and
   that cosine reaches a cut.
2. How often they fire on the same tokens is counted, for the matched ones only.
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
    percentile_interval,
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
    activations_a: pl.DataFrame | None = None,
    activations_b: pl.DataFrame | None = None,
    *,
    min_cosine: float = 0.7,
    block: int = _BLOCK,
) -> pl.DataFrame:
    """Pairs of latents that are each other's nearest by decoder cosine.

    Args:
        directions_a: Row i is the decoder direction of latent i; of any length, a row of zeros
            matches nothing.
        directions_b: The same of the other layer, in the same space.
        activations_a: ``ACTIVATIONS`` rows, any order; those of latents without a match are not
            needed. None: co-firing is not counted.
        activations_b: On the same tokens.
        min_cosine: Pairs below are dropped, in (0, 1].
        block: Latents compared at a time; bounds memory, changes no value.

    Returns:
        ``latent_a`` (ascending), ``latent_b``, ``cosine``, and ``n_both``, ``n_either``,
        ``jaccard`` over the tokens on which they fire (null if not counted; ``jaccard`` null where
        neither fires). Ties go to the lower latent.

    Raises:
        ValueError: If a direction is not finite, the spaces or an argument do not fit, or only one
            layer's activations are given.
    """
    if not 0 < min_cosine <= 1:
        raise ValueError(f"matched_latents: min_cosine {min_cosine}, wanted in (0, 1].")
    if directions_a.shape[1] != directions_b.shape[1]:
        raise ValueError(
            f"matched_latents: directions of {directions_a.shape[1]} and {directions_b.shape[1]} "
            "dimensions, wanted equally many. Match latents that write to the same stream."
        )
    if (activations_a is None) != (activations_b is None):
        raise ValueError("matched_latents: activations of one layer, wanted of both or none.")
    nearest = _nearest(_unit(directions_a, "a"), _unit(directions_b, "b"), block)
    a = np.flatnonzero(nearest.cosine >= min_cosine)
    a = a[nearest.a_of_b[nearest.b_of_a[a]] == a]
    matches = pl.DataFrame(
        {"latent_a": a, "latent_b": nearest.b_of_a[a], "cosine": nearest.cosine[a]},
        schema={"latent_a": pl.UInt32, "latent_b": pl.UInt32, "cosine": pl.Float64},
    )
    if activations_a is None or activations_b is None:
        return matches.with_columns(
            n_both=pl.lit(None, pl.UInt32),
            n_either=pl.lit(None, pl.UInt32),
            jaccard=pl.lit(None, pl.Float64),
        )
    return with_cofiring(matches, activations_a, activations_b)


class _Nearest(NamedTuple):
    b_of_a: Int64[np.ndarray, " latent_a"]
    cosine: Float64[np.ndarray, " latent_a"]
    a_of_b: Int64[np.ndarray, " latent_b"]


def _unit(rows: Float32[np.ndarray, "latent d_model"], name: str) -> Float32[np.ndarray, "..."]:
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"matched_latents: direction of latent {bad} of {name} is not finite.")
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, np.float32(1))


def _nearest(
    a: Float32[np.ndarray, "latent_a d_model"],
    b: Float32[np.ndarray, "latent_b d_model"],
    block: int,
) -> _Nearest:
    """The nearest latent of the other layer, for each of both; one block of cosines at a time."""
    b_of_a, best_a = np.zeros(len(a), np.int64), np.full(len(a), -np.inf)
    a_of_b, best_b = np.zeros(len(b), np.int64), np.full(len(b), -np.inf)
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            cosine = a[i : i + block] @ b[j : j + block].T
            _keep_larger(b_of_a[i : i + block], best_a[i : i + block], cosine, j)
            _keep_larger(a_of_b[j : j + block], best_b[j : j + block], cosine.T, i)
    return _Nearest(b_of_a, np.clip(best_a, -1, 1), a_of_b)


def _keep_larger(
    found: Int64[np.ndarray, " row"],
    best: Float64[np.ndarray, " row"],
    cosine: Float32[np.ndarray, "row column"],
    start: int,
) -> None:
    """Puts into ``found`` and ``best`` the columns (from ``start``) that beat what they hold."""
    column = cosine.argmax(axis=1)
    largest = cosine[np.arange(len(cosine)), column]
    is_better = largest > best
    found[is_better] = column[is_better] + start
    best[is_better] = largest[is_better]


def with_cofiring(
    matches: pl.DataFrame, activations_a: pl.DataFrame, activations_b: pl.DataFrame
) -> pl.DataFrame:
    """``matches`` with ``n_both``, ``n_either`` and ``jaccard``, as :func:`matched_latents` has them.

    Args:
        matches: ``latent_a``, ``latent_b``, ``cosine``; each latent once.
        activations_a: ``ACTIVATIONS`` rows of these latents, and perhaps of others.
        activations_b: On the same tokens.
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
    return pairs.select(*matches.columns, "n_both", "n_either", jaccard=share)


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
    whose p-value is Wilcoxon's signed-rank test. Intervals are percentiles of a bootstrap over
    pairs; with fewer than two pairs there is none, and no floor.

    Args:
        matches: Of :func:`matched_latents`.
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
        rows.append(_Row(statistic, median, *_limits(medians, values, config), None, len(values)))
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
        rows.append(_Row(statistic, value, *_limits(means, values, config), p, len(values)))
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
    values: Shaped[np.ndarray, " pair"],
    config: MetricsConfig,
) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    return percentile_interval(replicates, config.confidence)


def _generator(
    config: MetricsConfig, names: tuple[str, str, str | None], statistic: str
) -> np.random.Generator:
    purpose = "\0".join(["matched", *map(str, names), statistic])
    return latent_rng(config.seed, None, None, purpose)
