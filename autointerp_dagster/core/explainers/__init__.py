"""Explainers: from a latent's record to an explanation of it.

Those of :func:`make_explainer` ask one question per latent at most. ``output`` explains from
interventions; ``best_of_n`` and ``refine`` ask several questions (``core.selection``).
"""

from autointerp_dagster.core.config import (
    ContrastiveExplainerConfig,
    DefaultExplainerConfig,
    ExplainerConfig,
    SingleTokenExplainerConfig,
    TopTokensExplainerConfig,
)
from autointerp_dagster.core.explainers.asking import explain
from autointerp_dagster.core.explainers.contrastive import ContrastiveExplainer
from autointerp_dagster.core.explainers.default import DefaultExplainer
from autointerp_dagster.core.explainers.explanation import (
    Explainer,
    Explanation,
    explanations_frame,
    failed_explanation,
    skipped_explanation,
)
from autointerp_dagster.core.explainers.single_token import SingleTokenExplainer
from autointerp_dagster.core.explainers.top_tokens import TopTokensExplainer

__all__ = [
    "ContrastiveExplainer",
    "DefaultExplainer",
    "Explainer",
    "Explanation",
    "SingleTokenExplainer",
    "TopTokensExplainer",
    "explain",
    "explainer_version",
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

    Raises:
        ValueError: If explainers of that kind ask more than one question per latent.
    """
    match config:
        case DefaultExplainerConfig():
            return DefaultExplainer(name, config)
        case ContrastiveExplainerConfig():
            return ContrastiveExplainer(name, config)
        case SingleTokenExplainerConfig():
            return SingleTokenExplainer(name, config)
        case TopTokensExplainerConfig():
            return TopTokensExplainer(name, config)
        case _:
            raise ValueError(
                f"explainer {name!r}: got kind {config.kind!r}, wanted one that asks one question "
                "per latent. Use core.selection.choose, or core.explainers.output."
            )


def explainer_version(config: ExplainerConfig) -> str:
    """Changes whenever the same record could get another prompt or another text.

    Raises:
        ValueError: As :func:`make_explainer`; the other kinds' modules have their own ``VERSION``.
    """
    return make_explainer(config.kind, config).version
