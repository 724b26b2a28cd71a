"""Which latents and explainers a scorer was asked about, and why some have no verdicts."""

import polars as pl

from autointerp_dagster.core.config import ScorerConfig
from autointerp_dagster.core.metrics.families import FAMILIES
from autointerp_dagster.core.sampling import scored_latents
from autointerp_dagster.core.schemas import MAIN_VARIANT

_PAIR = ["latent", "explainer"]


def asked_pairs(
    selection: pl.DataFrame, explanations: pl.DataFrame, scorer: str, config: ScorerConfig
) -> pl.DataFrame:
    """Every latent and explainer that a scorer was asked about, once.

    Args:
        selection: ``SELECTION`` rows of the cell's latents.
        explanations: ``EXPLANATIONS`` rows of the cell; its explainers are all there are.
        scorer: A name in :data:`.families.FAMILIES`.
        config: Its parameters: the latents and explainers that it is for.

    Returns:
        ``latent``, ``explainer`` (null for a scorer that needs no explanation), ``is_floor``,
        ``is_explained`` (there is a text, or none is needed).
    """
    latents = scored_latents(selection, config.latents).select("latent", "is_floor")
    if not FAMILIES[scorer].needs_explanation:
        return latents.select(
            "latent", explainer=pl.lit(None, pl.String), is_floor=False, is_explained=True
        )
    explainers = explanations.select("explainer").unique()
    if config.explainers is not None:
        explainers = pl.DataFrame({"explainer": config.explainers}, {"explainer": pl.String})
    texts = explanations.filter(pl.col("selected") & (pl.col("status") == "ok"))
    explained = texts.select("latent", "explainer", is_explained=True).unique()
    pairs = latents.join(explainers.unique(), how="cross").join(explained, on=_PAIR, how="left")
    return pairs.select(*_PAIR, "is_floor", pl.col("is_explained").fill_null(value=False))


def missing_rows(asked: pl.DataFrame, frame: pl.DataFrame | None, scorer: str) -> pl.DataFrame:
    """A row with the reason for each pair without main verdicts, and each floor without a donor.

    Args:
        asked: :func:`asked_pairs`.
        frame: ``VERDICTS`` of the scorer; None: it was not run.
        scorer: Its name.

    Returns:
        ``LATENT_METRICS`` without coder and hookpoint, of the headline metric.
    """
    reason = pl.when(~pl.col("is_explained")).then(pl.lit("no_explanation"))
    if frame is None:
        own = asked.with_columns(status=reason.otherwise(pl.lit("not_run")))
        floors = own.clear()
    else:
        main = frame.filter(pl.col("variant") == MAIN_VARIANT)
        judged = {
            subject: main.filter(pl.col("subject") == subject).select(_PAIR).unique()
            for subject in ("own", "other")
        }
        own = asked.join(judged["own"], on=_PAIR, how="anti", nulls_equal=True)
        own = own.with_columns(status=reason.otherwise(pl.lit("too_few")))
        floors = asked.filter(pl.col("is_floor") & pl.col("is_explained"))
        floors = floors.join(judged["own"], on=_PAIR, how="semi", nulls_equal=True)
        floors = floors.join(judged["other"], on=_PAIR, how="anti", nulls_equal=True)
        floors = floors.with_columns(status=pl.lit("no_donor"))
    rows = [part.with_columns(subject=pl.lit(name)) for name, part in
            (("own", own), ("other", floors))]  # fmt: skip
    return pl.concat(rows).with_columns(
        scorer=pl.lit(scorer),
        variant=pl.lit(MAIN_VARIANT),
        metric=pl.lit(FAMILIES[scorer].headline),
        value=pl.lit(None, pl.Float64),
        lo=pl.lit(None, pl.Float64),
        hi=pl.lit(None, pl.Float64),
        n=pl.lit(0),
        n_failed=pl.lit(0),
    )
