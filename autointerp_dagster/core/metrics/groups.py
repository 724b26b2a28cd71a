"""Rows of verdicts to the flat arrays that estimates are made of."""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int64

from autointerp_dagster.core.metrics.estimates import Estimate, Verdicts
from autointerp_dagster.core.metrics.slices import OWNER
from autointerp_dagster.core.schemas import UNASKED, VERDICTS


class Groups(NamedTuple):
    """Verdicts of one owner and variant, numbered."""

    names: pl.DataFrame
    """:data:`.slices.OWNER` and ``variant`` of each group, in order."""
    rows: pl.DataFrame
    """The verdicts, in the order of the arrays."""
    verdicts: Verdicts
    """The same as arrays."""


def with_prompts(block: pl.DataFrame) -> pl.DataFrame:
    """Verdicts in their table's order, with ``place`` in it and the number of their ``prompt``.

    A verdict that no model call made stands alone. Sums round by order: the table's own order makes
    them equal, bit by bit, on every run. So a prompt's number is the place of its first verdict:
    what a call is called says where it was asked, too.
    """
    block = block.sort(VERDICTS.key, nulls_last=True).with_row_index("place")
    alone = pl.col("call_id").is_null()
    prompt = pl.when(alone).then("place").otherwise(pl.col("place").first().over("call_id"))
    return block.with_columns(prompt=prompt.cast(pl.Int64))


def groups_of(rows: pl.DataFrame) -> Groups:
    """Verdicts as numbered groups.

    Args:
        rows: Of :func:`with_prompts`, each as often as it belongs to a slice; any order.
    """
    owners = rows.select(OWNER).unique().sort(OWNER, nulls_last=True).with_row_index("owner")
    variants = rows.select("variant").unique().sort("variant").with_row_index("slice")
    rows = rows.join(owners, on=OWNER, nulls_equal=True).join(variants, on="variant")
    rows = rows.sort("owner", "slice", "place")
    numbers = rows.select(pl.col("owner", "slice").cast(pl.Int64))
    keys = (numbers["owner"] * variants.height + numbers["slice"]).to_numpy()
    group, found = _numbered(keys)
    n_prompts = int(rows["prompt"].max() or 0) + 1  # pyright: ignore[reportArgumentType] # integer
    prompt, _ = _numbered(group * n_prompts + rows["prompt"].to_numpy())
    names = pl.DataFrame(
        {"owner": found // variants.height, "slice": found % variants.height}
        if variants.height
        else {"owner": [], "slice": []},
        schema={"owner": pl.UInt32, "slice": pl.UInt32},
    )
    names = names.join(owners, on="owner", maintain_order="left")
    names = names.join(variants, on="slice", maintain_order="left").drop("owner", "slice")
    return Groups(names, rows, _arrays(rows, group, prompt, len(found)))


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


def metric_rows(names: pl.DataFrame, metric: str, estimate: Estimate) -> pl.DataFrame:
    """One row of a metric for each group.

    Args:
        names: What each group is.
        metric: The metric's name.
        estimate: Of the groups, in the same order.

    Returns:
        The columns of ``names``, and those of ``LATENT_METRICS`` from ``metric`` on.
    """
    return names.with_columns(
        metric=pl.lit(metric),
        value=pl.Series(estimate.value),
        lo=pl.Series(estimate.interval.lo),
        hi=pl.Series(estimate.interval.hi),
        n=pl.Series(estimate.n.astype(np.int64)),
        n_failed=pl.Series(estimate.n_failed.astype(np.int64)),
        status=pl.Series(estimate.status.tolist(), dtype=pl.String),
    ).with_columns(pl.col("value", "lo", "hi").fill_nan(None))
