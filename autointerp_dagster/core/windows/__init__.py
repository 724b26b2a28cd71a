"""The windows that contexts are cut into, their splits, and which of them nearly repeat another."""

from autointerp_dagster.core.windows.grams import GRAM_LEN, tail_hashes
from autointerp_dagster.core.windows.grid import (
    N_TAIL,
    SPLITS,
    Strata,
    WindowGrid,
    check_splits,
    context_splits,
    window_grid,
)
from autointerp_dagster.core.windows.shingles import Shingles, near_duplicates
from autointerp_dagster.core.windows.spans import Spans, repeating_spans

__all__ = [
    "GRAM_LEN",
    "N_TAIL",
    "SPLITS",
    "Shingles",
    "Spans",
    "Strata",
    "WindowGrid",
    "check_splits",
    "context_splits",
    "near_duplicates",
    "repeating_spans",
    "tail_hashes",
    "window_grid",
]
