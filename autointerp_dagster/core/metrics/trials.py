"""Questions with one right answer: the share answered right, and how sure that is."""

import numpy as np
import polars as pl

from autointerp_dagster.core.metrics.estimates import Estimate
from autointerp_dagster.core.metrics.groups import metric_rows
from autointerp_dagster.core.metrics.intervals import Interval, wilson
from autointerp_dagster.core.metrics.slices import OWNER
from autointerp_dagster.core.schemas import MAIN_VARIANT, UNASKED


def trial_estimates(frame: pl.DataFrame, confidence: float) -> pl.DataFrame:
    """Accuracy of every latent over its trials, per variant and per quantile of the main one.

    Every trial is a prompt of its own, so trials count as independent and the interval is Wilson's.

    Args:
        frame: ``VERDICTS`` rows, one per trial; ``prediction`` true: answered right.
        confidence: Two-sided.

    Returns:
        :data:`.slices.OWNER`, ``variant`` (``all``, ``quantile=3``, others by name), ``metric``
        (``accuracy``) and the value columns of ``LATENT_METRICS``. A group whose trials all failed
        is null with status ``failed``, or ``unasked`` if none was sent.
    """
    main = frame.filter(pl.col("variant") == MAIN_VARIANT).drop_nulls("quantile")
    of_quantile = main.with_columns(variant="quantile=" + pl.col("quantile").cast(pl.String))
    answered = (pl.col("status") == "ok") & pl.col("prediction").is_not_null()
    counts = (
        pl.concat([frame, of_quantile])
        .group_by(*OWNER, "variant")
        .agg(
            n=answered.sum(),
            right=(answered & pl.col("prediction")).sum(),
            failed=(~answered).sum(),
            unasked=(~answered & pl.col("reason").is_in(UNASKED).fill_null(value=False)).sum(),
        )
        .sort(*OWNER, "variant", nulls_last=True)
    )
    n, right, failed, unasked = (
        counts[name].to_numpy().astype(np.float64) for name in ("n", "right", "failed", "unasked")
    )
    value = np.where(n > 0, right / np.maximum(n, 1), np.nan)
    lo, hi = wilson(value, n, confidence)
    status = np.select([n > 0, unasked == failed], ["ok", "unasked"], "failed")
    estimate = Estimate(value, Interval(lo, hi), n, failed, status)
    return metric_rows(counts.select(*OWNER, "variant"), "accuracy", estimate)
