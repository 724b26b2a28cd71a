"""Explainers: from a latent's record to an explanation of it."""

from autointerp_dagster.core.config import (
    DefaultExplainerConfig,
    ExplainerConfig,
    TopTokensExplainerConfig,
)
from autointerp_dagster.core.explainers.asking import explain
from autointerp_dagster.core.explainers.default import DefaultExplainer
from autointerp_dagster.core.explainers.explanation import (
    Explainer,
    Explanation,
    explanations_frame,
    failed_explanation,
    skipped_explanation,
)
from autointerp_dagster.core.explainers.top_tokens import TopTokensExplainer

__all__ = [
    "DefaultExplainer",
    "Explainer",
    "Explanation",
    "TopTokensExplainer",
    "explain",
    "explanations_frame",
    "failed_explanation",
    "make_explainer",
    "skipped_explanation",
]


def make_explainer(name: str, config: ExplainerConfig) -> Explainer:
    """The explainer that a study declares.

    Args:
        name: Its key in the study, e.g. ``default``.
        config: Its parameters; ``config.kind`` says which one it is.
    """
    match config:
        case DefaultExplainerConfig():
            return DefaultExplainer(name, config)
        case TopTokensExplainerConfig():
            return TopTokensExplainer(name, config)
