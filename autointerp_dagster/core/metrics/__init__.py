"""Verdicts to metrics: per latent, per layer, and between things compared in a study."""

from autointerp_dagster.core.metrics.costs import StageCost, cost_rows
from autointerp_dagster.core.metrics.latent import HEADLINE, P_AGAINST_OTHER, latent_metrics_of
from autointerp_dagster.core.metrics.layer import layer_metrics_of
from autointerp_dagster.core.metrics.study import judge_is_too_weak, study_metrics_of

__all__ = [
    "HEADLINE",
    "P_AGAINST_OTHER",
    "StageCost",
    "cost_rows",
    "judge_is_too_weak",
    "latent_metrics_of",
    "layer_metrics_of",
    "study_metrics_of",
]
