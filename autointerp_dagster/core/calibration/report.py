"""What a judge made of the pack: ceiling, floor, lift and failures per kind of rule.

All figures are those that a study reports of its own latents, by the same functions; a kind of rule
is measured as a layer is, with its latents as the sample.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import polars as pl

from autointerp_dagster.core.calibration.pack import CODER, Pack
from autointerp_dagster.core.calibration.rules import RULE_KINDS
from autointerp_dagster.core.config import LabelScorerConfig, MetricsConfig
from autointerp_dagster.core.metrics import latent_metrics_of, layer_metrics_of
from autointerp_dagster.core.schemas import MAIN_VARIANT, UNDONE, VERDICTS
from autointerp_dagster.core.types import LayerKey

ALL_KINDS = "all"
"""Stands for the kind of rule where all latents are taken together."""

MAX_FAILED = 0.1
"""Larger shares of verdicts that failed for their format make a judge weak at best."""

MAX_UNDONE = 0.05
"""With a larger share of questions without any answer nothing is said of the judge."""

ONE_SIDED = 0.9
"""From this share of both classes on a judge is said to answer always the same."""

Usability = Literal["usable", "weak", "unusable", "undecided"]
"""``usable``: tells descriptions apart, and well enough for the study's cut; ``weak``: tells them
apart, but not that well, or often fails to answer in the format; ``unusable``: cannot be shown to
tell a true description from another's; ``undecided``: too many questions went unanswered."""


class Figure(NamedTuple):
    """A mean over latents; null where no latent has a value."""

    value: float | None
    lo: float | None
    """Of the interval by bootstrap over latents; null for fewer than two latents."""
    hi: float | None
    n: int
    """Latents behind it."""


@dataclass(frozen=True, slots=True)
class KindReport:
    """How well a judge does on the latents of one kind."""

    kind: str
    """A ``RuleKind``, or :data:`ALL_KINDS`."""
    ceiling: Figure
    """Balanced accuracy under the true description."""
    floor: Figure
    """Balanced accuracy under another rule's description; 0.5 for an ideal judge."""
    lift: Figure
    """Ceiling minus floor, paired."""
    auroc: Figure
    """Under the true description; null if the judge gives no log-probabilities."""
    sensitivity: Figure
    """Share of the activating windows that are called so, under the true description."""
    specificity: Figure
    """Share of the silent windows that are called so: a judge that says yes to all has 0."""
    floor_yes: Figure
    """Share of silent windows called activating under another's description: 0 is right."""


@dataclass(frozen=True, slots=True)
class ScorerReport:
    """How well a judge does at one scorer's task."""

    scorer: str
    kinds: tuple[KindReport, ...]
    """:data:`ALL_KINDS` first."""
    n_verdicts: int
    """Windows asked about, under both descriptions."""
    failures: dict[str, int]
    """Of these, the failed ones by ``VerdictReason``, the commonest first."""
    usability: Usability
    why: str
    """A sentence."""

    @property
    def overall(self) -> KindReport:
        """Over all latents."""
        return self.kinds[0]


def scorer_report(
    scorer: str,
    pack: Pack,
    verdicts: pl.DataFrame,
    config: LabelScorerConfig,
    metrics: MetricsConfig,
) -> ScorerReport:
    """What the verdicts of one scorer on all jobs of a pack say of the judge.

    Args:
        scorer: One of ``LABEL_SCORERS``.
        pack: What was asked.
        verdicts: ``schemas.VERDICTS`` of all its jobs.
        config: The scorer's parameters, for all latents and explainers.
        metrics: Confidence, resamples, and the cut that a ceiling is compared with.
    """
    main = verdicts.filter(pl.col("variant") == MAIN_VARIANT)
    there = {planted.rule.kind for planted in pack.latents}
    names = [ALL_KINDS, *(kind for kind in RULE_KINDS if kind in there)]
    kinds = [_kind_report(name, scorer, pack, main, config, metrics) for name in names]
    failed = Counter(verdicts["reason"].drop_nulls().sort().to_list())
    failures = dict(failed.most_common())
    usability, why = _usability(kinds[0], failures, verdicts.height, metrics)
    return ScorerReport(scorer, tuple(kinds), verdicts.height, failures, usability, why)


def _kind_report(
    kind: str,
    scorer: str,
    pack: Pack,
    verdicts: pl.DataFrame,
    config: LabelScorerConfig,
    metrics: MetricsConfig,
) -> KindReport:
    layer = LayerKey(CODER, kind)
    tables = [_of_kind(kind, frame) for frame in (pack.selection(), pack.explanations(), verdicts)]
    selection, explanations, judged = tables
    latents = latent_metrics_of(
        layer,
        selection,
        explanations,
        {scorer: VERDICTS.conform(judged)},
        {scorer: config},
        metrics,
    )
    alive = selection.with_columns(status=pl.lit("ok"))
    table = layer_metrics_of(layer, alive, latents, metrics).filter(
        (pl.col("scorer") == scorer) & (pl.col("variant") == MAIN_VARIANT)
    )
    no = _figure(table, "other", "specificity", "mean")
    return KindReport(
        kind=kind,
        ceiling=_figure(table, "own", "balanced_accuracy", "mean"),
        floor=_figure(table, "other", "balanced_accuracy", "mean"),
        lift=_figure(table, "own", "balanced_accuracy", "lift_over_other"),
        auroc=_figure(table, "own", "auroc", "mean"),
        sensitivity=_figure(table, "own", "sensitivity", "mean"),
        specificity=_figure(table, "own", "specificity", "mean"),
        floor_yes=Figure(_complement(no.value), _complement(no.hi), _complement(no.lo), no.n),
    )


def _of_kind(kind: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of a kind; all of them under one name for :data:`ALL_KINDS`."""
    if kind == ALL_KINDS:
        return frame.with_columns(hookpoint=pl.lit(kind))
    return frame.filter(pl.col("hookpoint") == kind)


def _figure(table: pl.DataFrame, subject: str, metric: str, statistic: str) -> Figure:
    rows = table.filter(
        (pl.col("subject") == subject)
        & (pl.col("metric") == metric)
        & (pl.col("statistic") == statistic)
    )
    if not rows.height:
        return Figure(None, None, None, 0)
    row = rows.row(0, named=True)
    has_interval = row["n"] > 1
    lo, hi = (row["lo"], row["hi"]) if has_interval else (None, None)
    return Figure(row["value"], lo, hi, row["n"])


def _complement(value: float | None) -> float | None:
    return None if value is None else 1 - value


def _usability(
    overall: KindReport, failures: dict[str, int], n_verdicts: int, metrics: MetricsConfig
) -> tuple[Usability, str]:
    n_undone = sum(n for reason, n in failures.items() if reason in UNDONE)
    n_failed = sum(failures.values()) - n_undone
    if n_undone > MAX_UNDONE * n_verdicts:
        worst = ", ".join(f"{reason} {n}" for reason, n in failures.items() if reason in UNDONE)
        return "undecided", f"{n_undone} of {n_verdicts} questions have no answer ({worst})."
    failed = f"{n_failed} of {n_verdicts} windows have no label that can be read"
    ceiling, lift = overall.ceiling.value, overall.lift
    if ceiling is None or lift.value is None:
        return "unusable", f"{failed}."
    level = f"{metrics.confidence:.0%}"
    if lift.lo is None or lift.lo <= 0:
        shown = _shown_interval(lift)
        return "unusable", (
            f"its lift over another rule's description is {lift.value:+.2f}, and the {level} "
            f"interval {shown} is not above 0: it cannot tell a true description from a wrong one."
            f"{_bias(overall)}"
        )
    cut = metrics.interpretable_cut
    if ceiling < cut:
        return "weak", (
            f"with true descriptions it has a balanced accuracy of {ceiling:.2f}, below the "
            f"study's interpretable_cut of {cut:g}: no explanation can be expected to pass."
        )
    if n_failed > MAX_FAILED * n_verdicts:
        return "weak", f"{failed}, and the scores are over the others only."
    return "usable", (
        f"with true descriptions it has a balanced accuracy of {ceiling:.2f} (cut {cut:g}), "
        f"{lift.value:.2f} {_shown_interval(lift)} above another rule's description."
    )


def _bias(overall: KindReport) -> str:
    """A sentence on a judge that says the same of nearly every window; else nothing."""
    said = {"1": overall.sensitivity.value, "0": overall.specificity.value}
    for label, rest in (("1", "0"), ("0", "1")):
        share, other = said[label], said[rest]
        if share is not None and other is not None and min(share, 1 - other) >= ONE_SIDED:
            return f" It answers {label} to nearly every window."
    return ""


def _shown_interval(figure: Figure) -> str:
    if figure.lo is None or figure.hi is None:
        return "(none)"
    return f"[{figure.lo:.2f}, {figure.hi:.2f}]"
