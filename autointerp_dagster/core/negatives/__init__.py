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
from autointerp_dagster.core.negatives.token_windows import (
    ShownTokens,
    TokenWindows,
    shown_tokens,
    token_windows,
)

__all__ = [
    "NegativeRequest",
    "NegativeSources",
    "Negatives",
    "Question",
    "Rows",
    "ShownTokens",
    "SimilarWindows",
    "TokenWindows",
    "draw_negatives",
    "shown_tokens",
    "token_windows",
]
