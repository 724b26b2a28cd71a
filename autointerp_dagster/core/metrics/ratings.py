"""Scores against what people say of the same explanations.

1. Raters use a scale each in their own way, so each rater's ratings become ranks among them.
2. An item (an explanation of a latent) has the mean rank that its raters gave it.
3. Spearman's correlation of that with each scorer's headline metric; the interval resamples
   latents, each with all its items, as explanations of one latent share its windows.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.compare import headline_values
from autointerp_dagster.core.metrics.families import HEADLINE
from autointerp_dagster.core.metrics.resampling import (
    LEAST_FOR_CORRELATION,
    correlation_interval,
    pearson,
)
from autointerp_dagster.core.rng import latent_rng

RATED_ITEM = ("coder", "hookpoint", "latent", "explainer")
"""What identifies an item in a table of ratings, which also has ``rater`` and ``rating``."""

_LATENT = ["coder", "hookpoint", "latent"]
_FEWEST = 3
"""Items below which there is no correlation."""


class Agreement(NamedTuple):
    """How a scorer orders the rated explanations, against how people do."""

    scorer: str
    metric: str
    """The scorer's headline metric."""
    explainer: str | None
    """Null: of all explainers together."""
    spearman: float | None
    """Null with fewer than three items, or if the scores or the ratings are all the same."""
    lo: float | None
    """Null with fewer than five latents."""
    hi: float | None
    n: int
    """Items with a rating and a score."""
    n_unscored: int
    """Rated items without a score."""


class RaterAgreement(NamedTuple):
    """How the raters agree among themselves."""

    n_raters: int
    n_items: int
    spearman: float | None
    """Mean over pairs of raters, of the items that both rated; null if no pair shares three items
    that each of them rates differently."""
    n_pairs: int
    """Pairs of raters behind the mean."""


def rated_items(ratings: pl.DataFrame) -> pl.DataFrame:
    """Each item with the mean of its raters' ranks.

    A rater's rank is the mid-rank among the rater's own ratings over their number plus one, so it
    lies in (0, 1); it does not depend on the rater's scale. Raters of different items are
    comparable only if who rates what was drawn by lot.

    Args:
        ratings: ``RATED_ITEM``, ``rater``, ``rating``; any order, at most one row of an item by a
            rater.

    Returns:
        ``RATED_ITEM``, ``rating``, sorted.
    """
    rank = pl.col("rating").rank("average").over("rater") / (pl.len().over("rater") + 1)
    ranked = ratings.with_columns(rating=rank).sort(*RATED_ITEM, "rater")
    items = ranked.group_by(RATED_ITEM, maintain_order=True).agg(pl.col("rating").mean())
    return items.sort(RATED_ITEM)


def rater_agreement(ratings: pl.DataFrame) -> RaterAgreement:
    """How far raters agree, as a ceiling of what any scorer can reach.

    Args:
        ratings: As for :func:`rated_items`.
    """
    raters = ratings["rater"].unique().sort().to_list()
    found = []
    for a, b in combinations(raters, 2):
        first, second = (ratings.filter(pl.col("rater") == rater) for rater in (a, b))
        both = first.join(second, on=RATED_ITEM, suffix="_b").sort(RATED_ITEM)
        found.append(_spearman(both["rating"].to_numpy(), both["rating_b"].to_numpy()))
    known = [value for value in found if value is not None]
    mean = float(np.mean(known)) if known else None
    n_items = ratings.select(RATED_ITEM).n_unique()
    return RaterAgreement(len(raters), n_items, mean, len(known))


def ratings_agreement(
    ratings: pl.DataFrame, latent_metrics: pl.DataFrame, config: MetricsConfig
) -> list[Agreement]:
    """Spearman's correlation of people's ratings with every scorer of explanations.

    Args:
        ratings: As for :func:`rated_items`, of explanations that were scored as they are.
        latent_metrics: ``LATENT_METRICS`` rows, any order.
        config: Confidence, resamples, seed.

    Returns:
        By scorer: all explainers together, then each that was rated.
    """
    items = rated_items(ratings)
    scores = headline_values(latent_metrics, "score").drop_nulls("explainer")
    explainers = items["explainer"].unique().sort().to_list()
    found = []
    for scorer in scores["scorer"].unique().sort():
        here = items.join(scores.filter(pl.col("scorer") == scorer), on=RATED_ITEM, how="left")
        here = here.sort(RATED_ITEM)
        for explainer in [None, *explainers]:
            mine = here
            if explainer is not None:
                mine = here.filter(pl.col("explainer") == explainer)
            found.append(_agreement(mine, scorer, explainer, config))
    return found


def _agreement(
    items: pl.DataFrame, scorer: str, explainer: str | None, config: MetricsConfig
) -> Agreement:
    scored = items.drop_nulls("value")
    rating, value = scored["rating"].to_numpy(), scored["value"].to_numpy()
    spearman, lo, hi = _spearman(rating, value), None, None
    if spearman is not None:
        latent = scored.select(pl.struct(_LATENT).rank("dense")).to_series().to_numpy()
        purpose = "\0".join(("ratings", scorer, str(explainer)))
        rng = latent_rng(config.seed, None, None, purpose)
        draws = _resampled(rating, value, latent.astype(np.int64), config.n_bootstrap, rng)
        n_latents = len(np.unique(latent))
        if n_latents >= LEAST_FOR_CORRELATION:
            lo, hi = correlation_interval(
                draws, spearman, n_latents, config.confidence, is_of_ranks=True
            )
    n_unscored = items.height - scored.height
    return Agreement(
        scorer, HEADLINE[scorer], explainer, spearman, lo, hi, scored.height, n_unscored
    )


def _spearman(
    first: Float64[np.ndarray, " item"], second: Float64[np.ndarray, " item"]
) -> float | None:
    if len(first) < _FEWEST or not np.ptp(first) or not np.ptp(second):
        return None
    return _correlation(first, second)


def _correlation(
    first: Float64[np.ndarray, " item"], second: Float64[np.ndarray, " item"]
) -> float:
    ranks = stats.rankdata(first), stats.rankdata(second)
    return float(pearson(ranks[0][None], ranks[1][None])[0])


def _resampled(
    first: Float64[np.ndarray, " item"],
    second: Float64[np.ndarray, " item"],
    latent: Int64[np.ndarray, " item"],
    n_bootstrap: int,
    rng: np.random.Generator,
) -> Float64[np.ndarray, " replicate"]:
    """Spearman's correlation over resampled latents; NaN where a resample is constant."""
    items = [np.flatnonzero(latent == one) for one in np.unique(latent)]

    def replicates() -> Iterator[float]:
        for _ in range(n_bootstrap):
            drawn = rng.integers(0, len(items), len(items))
            rows = np.concatenate([items[one] for one in drawn])
            yield _correlation(first[rows], second[rows])

    return np.fromiter(replicates(), dtype=np.float64, count=n_bootstrap)
