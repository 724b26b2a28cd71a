"""Which latents of a layer are near each other: by the tokens they fire on, by their directions.

1. Tokens are chosen on which firing is counted (:mod:`counted`), and which latents fire on each of
   them is held in memory (:mod:`incidence`).
2. For each latent the others with the largest Jaccard index are found (:mod:`cofiring`), or those
   with the largest cosine of their encoder or decoder rows (:mod:`cosine`).
3. Of each latent that is some latent's neighbour a few windows are drawn (:mod:`drawn`).

Everything goes block by block: nothing of width x width ever exists.
"""

from autointerp_dagster.core.neighbours.cofiring import cofiring_neighbours
from autointerp_dagster.core.neighbours.cosine import cosine_neighbours
from autointerp_dagster.core.neighbours.counted import CountedTokens
from autointerp_dagster.core.neighbours.drawn import (
    DrawnWindows,
    WindowDraw,
    drawn_windows,
    neighbour_windows_table,
)
from autointerp_dagster.core.neighbours.incidence import Incidence
from autointerp_dagster.core.neighbours.ranked import Ranked, neighbours_table

__all__ = [
    "CountedTokens",
    "DrawnWindows",
    "Incidence",
    "Ranked",
    "WindowDraw",
    "cofiring_neighbours",
    "cosine_neighbours",
    "drawn_windows",
    "neighbour_windows_table",
    "neighbours_table",
]
