"""Balanced accuracy of latents that were scored until it was sure enough, with valid limits.

An interval for a fixed number of answers is too short where the answers decided when to stop. The
limits here are those of the confidence sequence that stopped the latent, taken again over all its
prompts in turn (:mod:`core.scorers.stopping`). Only the main variant has them. Slices, sensitivity,
AUROC and the like keep their ordinary intervals, which are not made for a stopping time.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from autointerp_dagster.core.schemas import MAIN_VARIANT, UNASKED
from autointerp_dagster.core.scorers.stopping import ClassWeights, balanced_limits, prompt_mean

_OWNER = ("latent", "explainer", "subject")
_COLUMNS = {
    "latent": pl.UInt32, "explainer": pl.String, "subject": pl.String, "variant": pl.String,
    "metric": pl.String, "value": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
    "n": pl.UInt32, "n_failed": pl.UInt32, "status": pl.String,
}  # fmt: skip


def class_sizes(windows: pl.DataFrame, n_examples: int | None) -> pl.DataFrame:
    """``latent``, ``n_activating``, ``n_silent``: what each latent would be shown if none stopped.

    Args:
        windows: ``schemas.WINDOWS`` of the cell.
        n_examples: The scorer's parameter.
    """
    test = windows.filter(pl.col("split") == "test")
    # A window of two kinds is shown once.
    test = test.select("latent", "window_id", "is_activating").unique()
    sizes = test.group_by("latent").agg(
        n_activating=pl.col("is_activating").sum(), n_silent=(~pl.col("is_activating")).sum()
    )
    if n_examples is not None:
        sizes = sizes.with_columns(pl.col("n_activating", "n_silent").clip(upper_bound=n_examples))
    return sizes.sort("latent")


def sequence_estimates(frame: pl.DataFrame, sizes: pl.DataFrame, confidence: float) -> pl.DataFrame:
    """Balanced accuracy of every latent, explainer and subject of one adaptive scorer.

    Args:
        frame: ``schemas.VERDICTS`` of one scorer and one cell, detection's or fuzzing's; any order.
        sizes: From :func:`class_sizes`; a row for each latent of ``frame``.
        confidence: Of the limits, the same as decided the stopping.

    Returns:
        ``latent, explainer, subject, variant, metric, value, lo, hi, n, n_failed, status``, by the
        first three. Latents whose classes are too unequal to stop early have none: they were asked
        everything. ``value`` is the mean of sensitivity and specificity over the answered windows,
        moved into the limits if it lies outside. ``n`` counts answered windows, ``n_failed`` failed
        ones among those asked. A latent without an answer of each class has null and the reason.

    Raises:
        ValueError: If a latent is missing from ``sizes``.
    """
    main = frame.filter(pl.col("variant") == MAIN_VARIANT)
    missing = main.join(sizes, on="latent", how="anti")
    if missing.height:
        raise ValueError(
            f"sequence_estimates: latent {missing['latent'][0]} has verdicts and no class sizes. "
            "Pass the class_sizes of the same cell's windows."
        )
    weights = {
        row["latent"]: ClassWeights.of_counts(row["n_activating"], row["n_silent"])
        for row in sizes.iter_rows(named=True)
    }
    # Sums round by order: one order makes them equal, bit by bit, on every run.
    main = main.sort(*_OWNER, "turn", "window_id", "is_activating", nulls_last=True)
    rows: list[Mapping[str, Any]] = []
    for group in main.partition_by(*_OWNER, maintain_order=True):
        mine = weights[group["latent"][0]]
        if mine is None or mine.may_stop:
            rows.append(_row(group, mine, confidence))
    return pl.DataFrame(rows, schema=_COLUMNS)


def _row(group: pl.DataFrame, weights: ClassWeights | None, confidence: float) -> Mapping[str, Any]:
    is_answered = (pl.col("status") == "ok") & pl.col("prediction").is_not_null()
    answered = group.filter(is_answered).with_columns(
        is_right=pl.col("prediction") == pl.col("is_activating")
    )
    failed = group.filter(pl.col("status") != "ok")
    owner = {name: group[name][0] for name in _OWNER}
    row = {
        **owner,
        "variant": MAIN_VARIANT,
        "metric": "balanced_accuracy",
        "value": None,
        "lo": None,
        "hi": None,
        "n": answered.height,
        "n_failed": failed.height,
    }
    is_right, truth = answered["is_right"].to_numpy(), answered["is_activating"].to_numpy()
    if weights is None or truth.all() or not truth.any():
        return {**row, "status": _reason(answered, failed)}
    turn = answered["turn"].to_numpy()
    starts = np.flatnonzero(turn[1:] != turn[:-1]) + 1
    prompts = list(zip(np.split(is_right, starts), np.split(truth, starts), strict=True))
    means = np.array([prompt_mean(*prompt, weights) for prompt in prompts])
    counts = np.array([float(len(right)) for right, _ in prompts])
    lo, hi = balanced_limits(means, counts, weights, confidence)
    value = (is_right[truth].mean() + is_right[~truth].mean()) / 2
    return {**row, "value": min(max(float(value), lo), hi), "lo": lo, "hi": hi, "status": "ok"}


def _reason(answered: pl.DataFrame, failed: pl.DataFrame) -> str:
    lost = failed.join(answered.select("is_activating").unique(), on="is_activating", how="anti")
    if not lost.height:
        return "missing_class"
    return "unasked" if lost["reason"].is_in(UNASKED).all() else "failed"
