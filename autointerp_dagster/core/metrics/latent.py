"""Verdicts of one cell to metrics of its latents.

1. Every verdict is copied into the slices it belongs to (:mod:`.slices`).
2. Each (latent, explainer, subject, slice) is a group; metrics are taken within groups, never over
   latents (:mod:`.estimates`).
3. Every latent that was to be measured and was not gets a row with the reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int64

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.estimates import (
    Estimate,
    Verdicts,
    auroc_estimate,
    prediction_estimates,
)
from autointerp_dagster.core.metrics.intervals import mcnemar_p
from autointerp_dagster.core.metrics.slices import OWNER, sliced
from autointerp_dagster.core.schemas import LATENT_METRICS, MAIN_VARIANT, UNASKED, VERDICTS
from autointerp_dagster.core.types import LayerKey

HEADLINE: Mapping[str, str] = {
    "detection": "balanced_accuracy",
    "fuzzing": "balanced_accuracy",
    "embedding": "auroc",
}
"""The one metric of each scorer that stands for it. A scorer whose headline is ``auroc`` only ranks
windows and has no other metric."""

P_AGAINST_OTHER = "p_against_other"
"""Metric whose value is the exact McNemar p-value of a floor latent's own explanation against
another's, on the same windows."""

_BLOCK = 256
"""Latents whose verdicts are sliced at a time: bounds memory, changes no value."""


def latent_metrics_of(
    layer: LayerKey,
    selection: pl.DataFrame,
    explanations: pl.DataFrame,
    verdicts: Mapping[str, pl.DataFrame | None],
    scorers: Sequence[str],
    config: MetricsConfig,
) -> pl.DataFrame:
    """Metrics of every selected latent of a cell, or why there is none.

    Args:
        layer: The cell's layer.
        selection: ``SELECTION`` rows of the cell's latents (not of the whole layer).
        explanations: ``EXPLANATIONS`` rows of the cell; its explainers are those asked for.
        verdicts: ``VERDICTS`` rows of the cell by scorer; None or absent: the scorer was not run.
        scorers: The scorers that the study asks for, each in :data:`HEADLINE`.
        config: How verdicts become numbers.

    Returns:
        ``LATENT_METRICS``. ``n`` counts answered verdicts (for precision: those called activating),
        ``n_failed`` failed ones; a verdict without a score is not in ``auroc``'s ``n`` and not
        failed. A latent without verdicts has one row per explainer and scorer, of the headline
        metric: ``no_explanation``, else ``not_run``, else ``too_few``. A floor latent
        with verdicts of its own and none of another's has a row ``no_donor``.

    Raises:
        ValueError: If a scorer is unknown, a table is of another layer or has latents outside the
            selection, or a score is not finite.
    """
    _check(layer, selection, {"explanations": explanations, **verdicts}, scorers)
    wanted = _wanted(selection, explanations)
    parts = [LATENT_METRICS.empty().drop("coder", "hookpoint")]
    for scorer in scorers:
        frame = verdicts.get(scorer)
        if frame is not None:
            parts.extend(_measured(frame, scorer, config.confidence))
        parts.append(_missing(wanted, frame, scorer))
    columns = parts[0].columns
    rows = pl.concat([part.select(columns) for part in parts], how="vertical_relaxed")
    return LATENT_METRICS.conform(rows, layer)


def _check(
    layer: LayerKey,
    selection: pl.DataFrame,
    tables: Mapping[str, pl.DataFrame | None],
    scorers: Sequence[str],
) -> None:
    unknown = [scorer for scorer in scorers if scorer not in HEADLINE]
    if unknown:
        raise ValueError(f"latent_metrics: scorers {unknown}, wanted some of {sorted(HEADLINE)}.")
    is_here = (pl.col("coder") == layer.coder) & (pl.col("hookpoint") == layer.hookpoint)
    for name, frame in {"selection": selection, **tables}.items():
        if frame is None:
            continue
        if not frame.select(is_here.all()).item():
            raise ValueError(f"latent_metrics of {layer}: {name} has rows of another layer.")
        outside = frame.join(selection, on="latent", how="anti")
        if outside.height:
            raise ValueError(
                f"latent_metrics of {layer}: {name} has latents that are not in the selection, "
                f"e.g. {outside['latent'][0]}. Pass the selection of the same cell."
            )
        if "score" in frame.columns and not frame["score"].is_finite().all():
            raise ValueError(
                f"latent_metrics of {layer}: {name} has a score that is not finite. "
                "A verdict without one has null."
            )


def _wanted(selection: pl.DataFrame, explanations: pl.DataFrame) -> pl.DataFrame:
    """``latent``, ``explainer``, ``is_floor``, ``is_explained``: every pair asked for, once."""
    texts = explanations.filter(pl.col("selected") & (pl.col("status") == "ok"))
    explained = texts.select("latent", "explainer", is_explained=True).unique()
    pairs = selection.select("latent", "is_floor").join(
        explanations.select("explainer").unique(), how="cross"
    )
    return pairs.join(explained, on=["latent", "explainer"], how="left").with_columns(
        pl.col("is_explained").fill_null(value=False)
    )


def _missing(wanted: pl.DataFrame, frame: pl.DataFrame | None, scorer: str) -> pl.DataFrame:
    """A row with the reason for each latent without verdicts, and each floor without a donor."""
    reason = pl.when(~pl.col("is_explained")).then(pl.lit("no_explanation"))
    if frame is None:
        own = wanted.with_columns(status=reason.otherwise(pl.lit("not_run")))
        floors = own.clear()
    else:
        keys = ["latent", "explainer"]
        judged = {
            subject: frame.filter(pl.col("subject") == subject).select(keys).unique()
            for subject in ("own", "other")
        }
        own = wanted.join(judged["own"], on=keys, how="anti")
        own = own.with_columns(status=reason.otherwise(pl.lit("too_few")))
        floors = wanted.filter(pl.col("is_floor") & pl.col("is_explained"))
        floors = floors.join(judged["own"], on=keys, how="semi")
        floors = floors.join(judged["other"], on=keys, how="anti")
        floors = floors.with_columns(status=pl.lit("no_donor"))
    rows = [part.with_columns(subject=pl.lit(name)) for name, part in
            (("own", own), ("other", floors))]  # fmt: skip
    return pl.concat(rows).with_columns(
        scorer=pl.lit(scorer),
        variant=pl.lit(MAIN_VARIANT),
        metric=pl.lit(HEADLINE[scorer]),
        value=pl.lit(None, pl.Float64),
        lo=pl.lit(None, pl.Float64),
        hi=pl.lit(None, pl.Float64),
        n=pl.lit(0),
        n_failed=pl.lit(0),
    )


def _measured(frame: pl.DataFrame, scorer: str, confidence: float) -> Iterator[pl.DataFrame]:
    """Metric rows of all latents with verdicts, block by block."""
    latents = frame["latent"].unique().sort()
    for start in range(0, len(latents), _BLOCK):
        block = frame.filter(pl.col("latent").is_in(latents[start : start + _BLOCK].implode()))
        groups = _groups_of(block)
        estimates: dict[str, Estimate] = {}
        if HEADLINE[scorer] != "auroc":
            estimates = prediction_estimates(groups.verdicts, confidence)
            yield _against_other(block).with_columns(scorer=pl.lit(scorer))
        estimates["auroc"] = auroc_estimate(groups.verdicts, confidence)
        for metric, estimate in estimates.items():
            rows = _rows(groups.names, metric, estimate)
            yield rows.with_columns(scorer=pl.lit(scorer))


class _Groups(NamedTuple):
    names: pl.DataFrame
    """:data:`OWNER` and ``variant`` of each group, in order."""
    verdicts: Verdicts


def _groups_of(block: pl.DataFrame) -> _Groups:
    """The slices of a block's verdicts as numbered groups."""
    called = pl.col("call_id").rank("dense")
    # A verdict that no model call made stands alone.
    alone = pl.col("call_id").n_unique() + pl.int_range(pl.len()) + 1
    # Sums round by order: the table's own order makes them equal, bit by bit, on every run.
    block = block.sort(VERDICTS.key, nulls_last=True).with_row_index("place")
    block = block.with_columns(prompt=pl.coalesce(called, alone).cast(pl.Int64))
    rows = sliced(block)
    owners = rows.select(OWNER).unique().sort(OWNER, nulls_last=True).with_row_index("owner")
    variants = rows.select("variant").unique().sort("variant").with_row_index("slice")
    rows = rows.join(owners, on=OWNER, nulls_equal=True).join(variants, on="variant")
    rows = rows.sort("owner", "slice", "place")
    numbers = rows.select(pl.col("owner", "slice").cast(pl.Int64))
    keys = (numbers["owner"] * variants.height + numbers["slice"]).to_numpy()
    group, found = _numbered(keys)
    prompt, _ = _numbered(group * (block.height * 2 + 2) + rows["prompt"].to_numpy())
    names = pl.DataFrame(
        {"owner": found // variants.height, "slice": found % variants.height},
        schema={"owner": pl.UInt32, "slice": pl.UInt32},
    )
    names = names.join(owners, on="owner", maintain_order="left")
    names = names.join(variants, on="slice", maintain_order="left")
    return _Groups(names.drop("owner", "slice"), _arrays(rows, group, prompt, len(found)))


def _numbered(
    keys: Int64[np.ndarray, " row"],
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " found"]]:
    found, number = np.unique(keys, return_inverse=True)
    return number.astype(np.int64), found


def _arrays(
    rows: pl.DataFrame,
    group: Int64[np.ndarray, " row"],
    prompt: Int64[np.ndarray, " row"],
    n_groups: int,
) -> Verdicts:
    failed = pl.col("status") != "ok"
    flat = rows.select(
        "is_activating",
        prediction=pl.col("prediction").fill_null(value=False),
        is_predicted=~failed & pl.col("prediction").is_not_null(),
        score=pl.when(~failed).then("score").cast(pl.Float64).fill_null(float("nan")),
        is_failed=failed,
        is_unasked=(failed & pl.col("reason").is_in(UNASKED)).fill_null(value=False),
    )
    arrays = {name: flat[name].to_numpy() for name in flat.columns}
    return Verdicts(group=group, prompt=prompt, n_groups=n_groups, **arrays)


def _rows(names: pl.DataFrame, metric: str, estimate: Estimate) -> pl.DataFrame:
    """Rows of one metric, for the slices that it says something about."""
    rows = names.with_columns(
        metric=pl.lit(metric),
        value=pl.Series(estimate.value),
        lo=pl.Series(estimate.interval.lo),
        hi=pl.Series(estimate.interval.hi),
        n=pl.Series(estimate.n.astype(np.int64)),
        n_failed=pl.Series(estimate.n_failed.astype(np.int64)),
        status=pl.Series(estimate.status.tolist(), dtype=pl.String),
    ).with_columns(pl.col("value", "lo", "hi").fill_nan(None))
    of_quantile = pl.col("variant").str.starts_with("quantile=")
    of_kind = pl.col("variant").str.starts_with("negatives=")
    if metric in ("precision", "f1"):
        return rows.filter(~of_quantile & ~of_kind)
    if metric == "sensitivity":
        return rows.filter(~of_kind)
    if metric == "specificity":
        return rows.filter(~of_quantile)
    return rows


def _against_other(block: pl.DataFrame) -> pl.DataFrame:
    """McNemar's p-value per floor latent and explainer, over windows answered both times."""
    window = ["latent", "explainer", "window_id", "is_activating"]
    answered = block.filter(
        (pl.col("variant") == MAIN_VARIANT)
        & (pl.col("status") == "ok")
        & pl.col("prediction").is_not_null()
    ).with_columns(is_right=pl.col("prediction") == pl.col("is_activating"))
    own, other = (
        answered.filter(pl.col("subject") == subject).select(*window, "is_right")
        for subject in ("own", "other")
    )
    pairs = own.join(other, on=window, suffix="_other", nulls_equal=True)
    counts = (
        pairs.group_by("latent", "explainer")
        .agg(
            n=pl.len(),
            only_own=(pl.col("is_right") & ~pl.col("is_right_other")).sum().cast(pl.Int64),
            only_other=(~pl.col("is_right") & pl.col("is_right_other")).sum().cast(pl.Int64),
        )
        .sort("latent", "explainer", nulls_last=True)
    )
    p = mcnemar_p(counts["only_own"].to_numpy(), counts["only_other"].to_numpy())
    return counts.select(
        "latent",
        "explainer",
        "n",
        subject=pl.lit("own"),
        variant=pl.lit(MAIN_VARIANT),
        metric=pl.lit(P_AGAINST_OTHER),
        value=pl.Series(p, dtype=pl.Float64),
        lo=pl.lit(None, pl.Float64),
        hi=pl.lit(None, pl.Float64),
        n_failed=pl.lit(0),
        status=pl.lit("ok"),
    )
