"""Non-activating windows of every kind that a study asks for."""

from collections.abc import Sequence

import numpy as np

from autointerp_dagster.core.negatives.request import NegativeRequest, Negatives, NegativeSources
from autointerp_dagster.core.negatives.silent import matching_demand, silent_windows
from autointerp_dagster.core.schemas import NegativeKind
from autointerp_dagster.core.windows import SPLITS


def draw_negatives(
    kinds: Sequence[NegativeKind], request: NegativeRequest, sources: NegativeSources
) -> Negatives:
    """The negatives of one split, distinct within a latent and kind."""
    del kinds, sources
    n_latents = len(request.key)
    wanted = np.zeros(len(SPLITS), dtype=np.int64)
    wanted[request.split] = request.n_wanted
    demand = matching_demand(
        request.latent,
        np.full(len(request.latent), request.split, dtype=np.int64),
        request.rank,
        request.grid.place[request.window],
        wanted,
        request.key,
    )
    drawn = silent_windows(request.grid, demand, n_latents, request.active, request.repeats)
    n = len(drawn.latent)
    return Negatives(
        drawn.latent,
        drawn.window,
        np.zeros(n, np.int64),
        np.full(n, -1, np.int64),
        drawn.n_near_duplicates,
    )
