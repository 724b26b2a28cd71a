"""Answers that never came, latents that were not scored, and judges that see what is not there."""

from collections.abc import Mapping

import numpy as np
import polars as pl

from autointerp_dagster.core.checks.outcome import Outcome
from autointerp_dagster.core.checks.shares import Counts, held
from autointerp_dagster.core.metrics import HEADLINE
from autointerp_dagster.core.schemas import MAIN_VARIANT, UNASKED

_NEVER_ASKED = (*UNASKED, "off_target")
"""Reasons of rows that no answer was wanted for: a budget came first, or steering missed its mark.
"""


_IS_UNASKED = pl.col("reason").is_in(_NEVER_ASKED).fill_null(value=False)


def failed_counts(rows: pl.DataFrame) -> Counts:
    """Rows without a usable answer among those that were asked, by latent.

    Args:
        rows: ``schemas.VERDICTS`` or ``schemas.EXPLANATIONS`` of a cell, or the columns ``latent``,
            ``status``, ``reason`` of them.
    """
    asked = rows.filter((pl.col("status") != "skipped") & ~_IS_UNASKED)
    return _counts(asked.with_columns(is_hit=pl.col("status") == "failed"))


def failed_rate(places: Mapping[str, Counts], reasons: Mapping[str, int], most: float) -> Outcome:
    """Whether too much of what was asked has no usable answer.

    Args:
        places: :func:`failed_counts` of each.
        reasons: How many rows failed for which reason.
        most: Of the true share.
    """
    found = held(places, 0.0, most)
    by_reason = sorted(reasons.items(), key=lambda item: -item[1])
    why = ", ".join(f"{reason} {n}" for reason, n in by_reason)
    return Outcome(
        "failed_rate",
        found.passed,
        f"{found.whole.text} answers failed" + (f" ({why})" if why else ""),
        f"a share of at most {most:g}",
        "Read some with `autointerp why`, and try another model or prompt; or raise "
        "checks.failed_rate.",
        {"failed_rate": found.whole.value, "n_asked": found.whole.n},
        found.offenders,
    )


def scored_counts(
    metrics: pl.DataFrame, explanations: pl.DataFrame, latents: pl.DataFrame
) -> dict[str, Counts]:
    """By scorer: latents that have its score, among those that it was to score.

    A latent with several explainers counts once for each. What a budget left unasked does not
    count, nor do latents that are dead, rare or dense, nor explanations that were never tried.

    Args:
        metrics: ``schemas.LATENT_METRICS`` of a cell.
        explanations: ``schemas.EXPLANATIONS`` of it, of all explainers.
        latents: ``schemas.LATENTS`` of it, or the columns ``latent`` and ``status``.
    """
    headline = pl.DataFrame({"scorer": [*HEADLINE], "metric": [*HEADLINE.values()]})
    own = metrics.filter((pl.col("subject") == "own") & (pl.col("variant") == MAIN_VARIANT))
    own = own.filter(pl.col("status") != "unasked").join(headline, on=["scorer", "metric"])
    untried = explanations.filter("selected").filter((pl.col("status") == "skipped") | _IS_UNASKED)
    wanted = own.join(latents.filter(status="ok"), on="latent", how="semi")
    wanted = wanted.join(untried, on=["latent", "explainer"], how="anti")
    return {
        str(scorer): _counts(rows.with_columns(is_hit=pl.col("value").is_not_null()))
        for (scorer,), rows in sorted(wanted.group_by("scorer"))
    }


def share_scored(places: Mapping[str, Mapping[str, Counts]], least: float) -> Outcome:
    """Whether a scorer scored too few latents.

    Args:
        places: By scorer, :func:`scored_counts` of each cell.
        least: Of the true share, of each scorer.
    """
    found = {scorer: held(counts, least, 1.0) for scorer, counts in places.items()}
    shares = [f"{scorer} {one.whole.text}" for scorer, one in found.items()]
    return Outcome(
        "share_scored",
        all(one.passed for one in found.values()),
        f"scored by {', '.join(shares) or 'nobody'}",
        f"a share of at least {least:g} by each scorer",
        "The column status of latent_metrics says why scores are missing; or lower "
        "checks.share_scored.",
        {f"share_scored {scorer}": one.whole.value for scorer, one in found.items()},
        {
            f"{place} {scorer}": share
            for scorer, one in found.items()
            for place, share in one.offenders.items()
        },
    )


def floor_counts(verdicts: pl.DataFrame) -> Counts:
    """Windows that a judge gets right under explanations of other latents, by latent.

    ``hits`` over ``n`` is the mean of sensitivity and specificity, so that a judge that goes by
    nothing is at .5 whatever the classes' sizes. Latents without an answer of both classes are
    left out.

    Args:
        verdicts: ``schemas.VERDICTS`` of a scorer whose judge labels windows.
    """
    floor = verdicts.filter(
        (pl.col("subject") != "own")
        & (pl.col("variant") == MAIN_VARIANT)
        & pl.col("prediction").is_not_null()
    )
    is_right = pl.col("prediction") == pl.col("is_activating")
    of_class = floor.group_by("latent", "is_activating").agg(n=pl.len(), right=is_right.mean())
    by_latent = of_class.group_by("latent").agg(
        n_classes=pl.len(), n=pl.col("n").sum(), accuracy=pl.col("right").mean()
    )
    both = by_latent.filter(n_classes=2).sort("latent")
    n = both["n"].to_numpy().astype(np.float64)
    return Counts(both["accuracy"].to_numpy() * n, n)


def judge_floor(places: Mapping[str, Counts], most: float) -> Outcome:
    """Whether a judge tells windows apart by an explanation that has nothing to do with them.

    Args:
        places: :func:`floor_counts` of each.
        most: Distance from .5.
    """
    found = held(places, 0.5 - most, 0.5 + most)
    return Outcome(
        "judge_floor",
        found.passed,
        f"a balanced accuracy of {found.whole.text} windows under other latents' explanations",
        f"{0.5 - most:.2f} to {0.5 + most:.2f}",
        "A judge that is right there does not go by the explanation, or the explanations are "
        "alike: read prompts with `autointerp why`, run `autointerp judge`; or raise "
        "checks.judge_floor.",
        {"floor": found.whole.value, "n_windows": found.whole.n},
        found.offenders,
    )


def _counts(rows: pl.DataFrame) -> Counts:
    by_latent = rows.group_by("latent").agg(n=pl.len(), hits=pl.col("is_hit").sum()).sort("latent")
    hits, n = (by_latent[name].to_numpy().astype(np.float64) for name in ("hits", "n"))
    return Counts(hits, n)
