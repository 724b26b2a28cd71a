"""Mean score in nats: the metric of a scorer that measures differences of surprisal.

The scoring prompts of a latent are separate texts, each judged in questions of its own, so scores
count as independent.

Source:
    arXiv 2410.13928, section 3.3 (the mean); Student's interval of a mean.
"""

import numpy as np
import polars as pl
from scipy import stats

from autointerp_dagster.core.schemas import UNASKED

GROUP = ["latent", "explainer", "subject", "variant"]
"""Columns that say which verdicts belong together."""

MEAN_NATS, SE_NATS = "mean_nats", "se_nats"

_COLUMNS = ["metric", "value", "lo", "hi", "n", "n_failed", "status"]


def nats_estimates(frame: pl.DataFrame, confidence: float) -> pl.DataFrame:
    """Mean and standard error of the scores of every (latent, explainer, subject, variant).

    Args:
        frame: ``schemas.VERDICTS`` or slices of it, in any order: :data:`GROUP`, ``window_id``,
            ``score`` (nats), ``status`` and ``reason`` count.
        confidence: Two-sided, of the mean's interval.

    Returns:
        :data:`GROUP`, ``metric`` (``mean_nats`` or ``se_nats``), ``value``, ``lo``, ``hi``, ``n``,
        ``n_failed`` and ``status``; two rows per group, sorted. ``n`` counts verdicts with a score.
        The interval is mean -+ t se with n - 1 degrees of freedom; of a single score the mean
        stands without one, and ``se_nats`` is ``too_few``. A standard error has no interval.
        Without scores the value is null: ``unasked``, ``failed`` or ``no_score``.
    """
    groups = _groups(frame)
    reach = _t_quantile(groups["n"], confidence) * groups["se"]
    unknown = pl.lit(None, pl.Float64)
    mean = groups.with_columns(
        metric=pl.lit(MEAN_NATS),
        value=pl.col("mean"),
        lo=pl.col("mean") - reach,
        hi=pl.col("mean") + reach,
        status=_status(least=1),
    )
    error = groups.with_columns(
        metric=pl.lit(SE_NATS), value=pl.col("se"), lo=unknown, hi=unknown, status=_status(least=2)
    )
    rows = pl.concat(part.select(*GROUP, *_COLUMNS) for part in (mean, error))
    return rows.sort(*GROUP, "metric", nulls_last=True)


def _groups(frame: pl.DataFrame) -> pl.DataFrame:
    failed = pl.col("status") != "ok"
    score = pl.col("score").filter(~failed & pl.col("score").is_not_null())
    # Sums round by order: a fixed one makes them equal, bit by bit, on every run.
    groups = (
        frame.sort(*GROUP, "window_id", nulls_last=True)
        .group_by(GROUP, maintain_order=True)
        .agg(
            n=score.len().cast(pl.Int64),
            mean=score.mean(),
            spread=score.std(),
            n_failed=failed.sum().cast(pl.Int64),
            n_unasked=(failed & pl.col("reason").is_in(UNASKED)).sum().cast(pl.Int64),
        )
    )
    return groups.with_columns(se=pl.col("spread") / pl.col("n").sqrt())


def _status(least: int) -> pl.Expr:
    """Whether there are at least so many scores, or why not."""
    return (
        pl.when(pl.col("n") >= least)
        .then(pl.lit("ok"))
        .when(pl.col("n") > 0)
        .then(pl.lit("too_few"))
        .when(pl.col("n_failed") == 0)
        .then(pl.lit("no_score"))
        .when(pl.col("n_failed") == pl.col("n_unasked"))
        .then(pl.lit("unasked"))
        .otherwise(pl.lit("failed"))
    )


def _t_quantile(n: pl.Series, confidence: float) -> pl.Series:
    """Null where fewer than two scores leave no degree of freedom."""
    freedom = n.to_numpy().astype(np.float64) - 1
    quantile = stats.t.ppf((1 + confidence) / 2, np.where(freedom > 0, freedom, np.nan))
    return pl.Series(np.asarray(quantile, dtype=np.float64)).fill_nan(None)
