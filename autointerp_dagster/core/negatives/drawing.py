"""Non-activating windows of every kind that a study asks for."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autointerp_dagster.core.negatives.hard import neighbour_lanes, similar_lanes, token_lanes
from autointerp_dagster.core.negatives.lanes import Lanes, Taken, draw_from_lanes
from autointerp_dagster.core.negatives.request import NegativeRequest, Negatives, NegativeSources
from autointerp_dagster.core.negatives.silent import matching_demand, silent_windows
from autointerp_dagster.core.schemas import NegativeKind
from autointerp_dagster.core.windows import SPLITS

_LANES: Mapping[NegativeKind, Callable[[NegativeRequest, NegativeSources], Lanes]] = {
    "neighbour": neighbour_lanes,
    "similar": similar_lanes,
    "same_token": token_lanes,
}


def draw_negatives(
    kinds: Sequence[NegativeKind], request: NegativeRequest, sources: NegativeSources
) -> Negatives:
    """The negatives of one split, distinct within a latent and kind.

    * ``random``: any silent window, at the places of the activating ones;
    * ``neighbour``: by turns over the latent's neighbours, of the windows in which they fire;
    * ``similar``: by turns over the activating windows, of the windows nearest to each;
    * ``same_token``: of the windows that show the token on which the latent fires most.

    All are silent, of the split, and none nearly repeats an earlier split or an activating window
    of its own (as far as ``request.repeats`` asks). ``n_wanted`` is divided evenly, the remainder
    to the kinds named first. Where too few of a kind are found there are fewer: no other kind makes
    them up. A row depends on its own latent and the sources alone.

    Args:
        kinds: Which, each once.
        request: What is wanted.
        sources: What the hard kinds are drawn from.

    Raises:
        ValueError: If the sources lack what a kind is drawn from.
    """
    drawn = []
    for i, kind in enumerate(kinds):
        quota = request.n_wanted // len(kinds) + (i < request.n_wanted % len(kinds))
        if kind == "random":
            taken = _at_random(request, quota)
        else:
            taken = draw_from_lanes(request, quota, _LANES[kind](request, sources))
        drawn.append(taken)
    return Negatives(
        np.concatenate([taken.latent for taken in drawn]),
        np.concatenate([taken.window for taken in drawn]),
        np.repeat(np.arange(len(drawn)), [len(taken.latent) for taken in drawn]),
        np.concatenate([taken.source for taken in drawn]),
        np.sum([taken.n_near_duplicates for taken in drawn], axis=0),
    )


def _at_random(request: NegativeRequest, quota: int) -> Taken:
    wanted = np.zeros(len(SPLITS), dtype=np.int64)
    wanted[request.split] = quota
    demand = matching_demand(
        request.latent,
        np.full(len(request.latent), request.split, dtype=np.int64),
        request.rank,
        request.grid.place[request.window],
        wanted,
        request.key,
    )
    n_latents = len(request.key)
    drawn = silent_windows(request.grid, demand, n_latents, request.active, request.repeats)
    none = np.full(len(drawn.latent), -1, dtype=np.int64)
    return Taken(drawn.latent, drawn.window, none, drawn.n_near_duplicates)
