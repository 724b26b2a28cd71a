"""Windows in which a latent is silent, of the kinds that tell an explanation's faults apart."""

from autointerp_dagster.core.negatives.drawing import draw_negatives
from autointerp_dagster.core.negatives.request import (
    NegativeRequest,
    Negatives,
    NegativeSources,
    Question,
    Rows,
    SimilarWindows,
)

__all__ = [
    "NegativeRequest",
    "NegativeSources",
    "Negatives",
    "Question",
    "Rows",
    "SimilarWindows",
    "draw_negatives",
]
