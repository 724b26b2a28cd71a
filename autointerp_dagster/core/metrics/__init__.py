"""Verdicts to metrics: per latent, per layer, and between things compared in a study."""

from autointerp_dagster.core.metrics.costs import StageCost, cost_rows
from autointerp_dagster.core.metrics.families import CHANCE, FAMILIES, HEADLINE, Family
from autointerp_dagster.core.metrics.latent import P_AGAINST, latent_metrics_of
from autointerp_dagster.core.metrics.layer import layer_metrics_of
from autointerp_dagster.core.metrics.matching import (
    Explained,
    explanation_similarity,
    matched_latents,
    with_cofiring,
)
from autointerp_dagster.core.metrics.sequences import class_sizes
from autointerp_dagster.core.metrics.study import (
    LEAST_FLOORS,
    headline_rows,
    judge_is_too_weak,
    study_metrics_of,
)

__all__ = [
    "CHANCE",
    "FAMILIES",
    "HEADLINE",
    "LEAST_FLOORS",
    "P_AGAINST",
    "Explained",
    "Family",
    "StageCost",
    "class_sizes",
    "cost_rows",
    "explanation_similarity",
    "headline_rows",
    "judge_is_too_weak",
    "latent_metrics_of",
    "layer_metrics_of",
    "matched_latents",
    "study_metrics_of",
    "with_cofiring",
]
