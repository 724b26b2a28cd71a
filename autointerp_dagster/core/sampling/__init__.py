"""Which windows and which latents are drawn; every draw is a hash under an address."""

from autointerp_dagster.core.sampling.bands import quantile_bands
from autointerp_dagster.core.sampling.draws import (
    BY_STRENGTH,
    Strategy,
    draw_ranks,
    latent_keys,
    may_be_drawn,
    order_within,
    ranks_within,
    sorted_keys,
    strength_ranks,
)
from autointerp_dagster.core.sampling.latents import (
    N_DONORS,
    donors_of,
    floor_order,
    processing_order,
    scored_latents,
    select_latents,
)

__all__ = [
    "BY_STRENGTH",
    "N_DONORS",
    "Strategy",
    "donors_of",
    "draw_ranks",
    "floor_order",
    "latent_keys",
    "may_be_drawn",
    "order_within",
    "processing_order",
    "quantile_bands",
    "ranks_within",
    "scored_latents",
    "select_latents",
    "sorted_keys",
    "strength_ranks",
]
