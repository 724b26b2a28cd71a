"""The slices of a latent's windows that metrics are read on, as copies of the verdicts' rows.

``all``: every window. ``quantile=3``: the activating windows of that quantile against all the
non-activating ones (those judged for that quantile, where a scorer judges them for one).
``negatives=random``: all the activating windows against that kind. A further variant of the scorer
(e.g. ``active``) stays apart, under its own name.
"""

import polars as pl

from autointerp_dagster.core.schemas import MAIN_VARIANT

OWNER = ["latent", "explainer", "subject"]
"""Columns that say whose verdicts belong together."""


def sliced(verdicts: pl.DataFrame) -> pl.DataFrame:
    """The verdicts once for each slice that they belong to, ``variant`` naming the slice.

    Args:
        verdicts: At least :data:`OWNER`, ``variant``, ``is_activating``, ``quantile`` and
            ``negative_kind``; any order.

    Returns:
        The same columns, any order; about a dozen times the non-activating rows.
    """
    is_main = pl.col("variant") == MAIN_VARIANT
    main, further = verdicts.filter(is_main), verdicts.filter(~is_main)
    activating = main.filter("is_activating").with_columns(
        variant="quantile=" + pl.col("quantile").cast(pl.String)
    )
    silent = main.filter(~pl.col("is_activating")).with_columns(
        variant="negatives=" + pl.col("negative_kind")
    )
    is_for_another = (
        (~pl.col("is_activating"))
        & (pl.col("variant") != "quantile=" + pl.col("quantile").cast(pl.String))
    ).fill_null(value=False)
    return pl.concat(
        [
            main,
            further,
            _with_other_class(activating.drop_nulls("variant"), main).filter(~is_for_another),
            _with_other_class(silent.drop_nulls("variant"), main),
        ]
    )


def _with_other_class(part: pl.DataFrame, main: pl.DataFrame) -> pl.DataFrame:
    """Slices of one class, each with all the main variant's rows of the other."""
    absent = part.select(*OWNER, "variant", is_activating=~pl.col("is_activating")).unique()
    added = main.drop("variant").join(absent, on=[*OWNER, "is_activating"], nulls_equal=True)
    return pl.concat([part, added.select(part.columns)])
