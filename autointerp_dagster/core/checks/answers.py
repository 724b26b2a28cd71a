"""Answers that never came, latents that were not scored, and judges that see what is not there."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import polars as pl

from autointerp_dagster.core.checks.findings import Findings, grouped
from autointerp_dagster.core.checks.outcome import Outcome
from autointerp_dagster.core.checks.shares import Bounds, Counts, Held
from autointerp_dagster.core.metrics import HEADLINE
from autointerp_dagster.core.schemas import MAIN_VARIANT, UNASKED
from autointerp_dagster.core.types import Cell

_OFF_TARGET = "off_target"
"""Reason of an intervention that steering found no strength for."""
_IS_UNASKED = pl.col("reason").is_in((*UNASKED, _OFF_TARGET)).fill_null(value=False)
"""Rows that no answer was wanted for: a budget came first, or steering missed its mark."""
_UNSCORABLE = ("unasked", "missing_class")
"""A budget came first; or nothing of one class was asked about, as a study without negatives."""


def failed_counts(rows: pl.DataFrame) -> dict[str, Counts]:
    """By explainer (empty: without one), rows without a usable answer among those asked for.

    Args:
        rows: ``schemas.VERDICTS`` or ``schemas.EXPLANATIONS`` of a cell, or the columns ``latent``,
            ``explainer``, ``status``, ``reason`` of them.
    """
    asked = rows.filter((pl.col("status") != "skipped") & ~_IS_UNASKED)
    return _by_explainer(asked.with_columns(is_hit=pl.col("status") == "failed"))


def failed_reasons(rows: pl.DataFrame) -> dict[str, int]:
    """Of the same rows, how many failed for which reason; what was not asked for is left out."""
    failed = rows.filter((pl.col("status") == "failed") & ~_IS_UNASKED)
    return dict(failed["reason"].value_counts().sort("reason").iter_rows())


def failed_rate(places: Mapping[Cell, Findings], bounds: Bounds) -> Outcome:
    """Whether too much of what was asked, of an explainer or under its explanations, failed."""
    held = bounds.held(grouped({place: one.failed for place, one in places.items()}))
    reasons = sum((Counter(one.reasons) for one in places.values()), Counter[str]())
    why = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
    return Outcome(
        "failed_rate",
        held.passed,
        f"{_texts(held)} answers failed" + (f" ({why})" if why else ""),
        f"a share of at most {bounds.most:g}",
        "Read some with `autointerp why`, and try another model or prompt; or raise "
        "checks.failed_rate.",
        _numbers("failed_rate", held) | {"n_asked": sum(one.n for one in held.whole.values())},
        held.offenders,
    )


def scored_counts(
    metrics: pl.DataFrame,
    explanations: pl.DataFrame,
    latents: pl.DataFrame,
    steered: pl.DataFrame,
) -> dict[str, Counts]:
    """By scorer and explainer: latents that have its score, among those that it was to score.

    Not counted: what a budget left unasked, latents that are dead, rare or dense, explanations that
    were never tried, latents that nobody steered or for which no strength was found.

    Args:
        metrics: ``schemas.LATENT_METRICS`` of a cell.
        explanations: ``schemas.EXPLANATIONS`` of it, of all explainers.
        latents: ``schemas.LATENTS`` of it, or the columns ``latent`` and ``status``.
        steered: ``schemas.VERDICTS`` of its scorer ``intervention``; empty if the study has none.
    """
    headline = pl.DataFrame({"scorer": [*HEADLINE], "metric": [*HEADLINE.values()]})
    own = metrics.filter((pl.col("subject") == "own") & (pl.col("variant") == MAIN_VARIANT))
    own = own.filter(~pl.col("status").is_in(_UNSCORABLE)).join(headline, on=["scorer", "metric"])
    is_steering = pl.col("scorer") == "intervention"
    own = own.filter(~(is_steering & (pl.col("status") == "too_few")))
    untried = explanations.filter("selected").filter((pl.col("status") == "skipped") | _IS_UNASKED)
    missed = steered.filter(subject="own").group_by("latent", "explainer")
    missed = missed.agg(is_missed=(pl.col("reason") == _OFF_TARGET).fill_null(value=False).all())
    missed = missed.filter("is_missed").select("latent", "explainer", scorer=pl.lit("intervention"))
    wanted = own.join(latents.filter(status="ok"), on="latent", how="semi")
    wanted = wanted.join(untried, on=["latent", "explainer"], how="anti")
    wanted = wanted.join(missed, on=["latent", "explainer", "scorer"], how="anti", nulls_equal=True)
    wanted = wanted.with_columns(is_hit=pl.col("value").is_not_null())
    return {
        f"{scorer} {explainer}".strip(): counts
        for (scorer,), rows in sorted(wanted.group_by("scorer"), key=lambda item: item[0])
        for explainer, counts in _by_explainer(rows).items()
    }


def share_scored(places: Mapping[Cell, Findings], bounds: Bounds) -> Outcome:
    """Whether a scorer scored too few latents, or too few explanations of an explainer."""
    held = bounds.held(grouped({place: one.scored for place, one in places.items()}))
    return Outcome(
        "share_scored",
        held.passed,
        f"scored by {_texts(held) if held.whole else 'nobody'}",
        f"a share of at least {bounds.least:g} by each scorer",
        "The column status of latent_metrics says why scores are missing; or lower "
        "checks.share_scored.",
        _numbers("share_scored", held),
        held.offenders,
    )


def floor_counts(verdicts: pl.DataFrame) -> dict[str, Counts]:
    """By explainer, windows that a judge gets right under explanations of other latents.

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
    of_class = floor.group_by("explainer", "latent", "is_activating")
    of_class = of_class.agg(n=pl.len(), right=is_right.mean())
    by_latent = of_class.group_by("explainer", "latent").agg(
        n_classes=pl.len(), n=pl.col("n").sum(), accuracy=pl.col("right").mean()
    )
    both = by_latent.filter(n_classes=2)
    return _of_latents(both.with_columns(hits=pl.col("accuracy") * pl.col("n")))


def judge_floor(places: Mapping[Cell, Findings], bounds: Bounds) -> Outcome:
    """Whether a judge tells windows apart by an explanation that has nothing to do with them."""
    held = bounds.held(grouped({place: one.floor for place, one in places.items()}))
    return Outcome(
        "judge_floor",
        held.passed,
        f"a balanced accuracy of {_texts(held)} windows under other latents' explanations",
        f"{bounds.least:.2f} to {bounds.most:.2f}",
        "A judge that is right there does not go by the explanation, or the explanations are "
        "alike: read prompts with `autointerp why`, run `autointerp judge`; or raise "
        "checks.judge_floor.",
        _numbers("floor", held) | {"n_windows": sum(one.n for one in held.whole.values())},
        held.offenders,
    )


def _texts(held: Held) -> str:
    """The shares of all groups, e.g. ``default 0.031 [0.012, 0.077] of 160``."""
    texts = [f"{group} {share.text}".strip() for group, share in held.whole.items()]
    return ", ".join(texts) or "nothing to count"


def _numbers(name: str, held: Held) -> dict[str, int | float]:
    return {f"{name} {group}".strip(): share.value for group, share in held.whole.items()}


def _by_explainer(rows: pl.DataFrame) -> dict[str, Counts]:
    """Hits among rows, by explainer."""
    return _of_latents(
        rows.group_by("explainer", "latent").agg(n=pl.len(), hits=pl.col("is_hit").sum())
    )


def _of_latents(by_latent: pl.DataFrame) -> dict[str, Counts]:
    """From ``n`` and ``hits`` of each explainer and latent."""
    found: dict[str, Counts] = {}
    rows = by_latent.sort("explainer", "latent")
    for (explainer,), of in rows.group_by("explainer", maintain_order=True):
        hits, n = (of[name].to_numpy().astype(np.float64) for name in ("hits", "n"))
        found[str(explainer or "")] = Counts.of(hits, n)
    return found
