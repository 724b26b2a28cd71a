"""Which latents are explained, whose floors are measured, and with whose explanations."""

import numpy as np
import polars as pl
from jaxtyping import Float32, Float64, Int64, UInt64

from autointerp_dagster.core.config import (
    FloorsConfig,
    LatentSample,
    LatentSelection,
    ScoredLatents,
)
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.sampling.draws import ranks_within
from autointerp_dagster.core.schemas import DONORS
from autointerp_dagster.core.types import LayerKey

N_DONORS = 16
"""Donors kept per floor latent; later ones serve where earlier ones have no explanation."""


def select_latents(
    layer: LayerKey, counts: pl.DataFrame, selection: LatentSelection
) -> Int64[np.ndarray, " chosen"]:
    """The latents of a layer that are to be explained, ascending.

    Args:
        layer: Part of the address, and for messages.
        counts: ``schemas.FIRING_COUNTS`` of the whole layer, in any order.
        selection: A sample larger than what there is to sample from takes all of it;
            ``firing_rate`` samples latents that fire only.

    Raises:
        ValueError: If a listed index is not a latent of the layer, or ``counts`` is not whole.
    """
    counts = counts.sort("latent")
    width = counts.height
    every = np.arange(width, dtype=np.int64)
    if not np.array_equal(counts["latent"].to_numpy(), every):
        raise ValueError(
            f"{layer}: firing counts of {width} latents are not those of 0 to {width - 1}. "
            "Read the counts of the whole layer."
        )
    if selection == "all":
        return every
    if isinstance(selection, tuple):
        outside = [index for index in selection if not 0 <= index < width]
        if outside:
            raise ValueError(
                f"{layer}: latent {outside[0]} is listed, but the coder has {width} latents. "
                f"List indices below {width}."
            )
        return np.unique(np.array(selection, dtype=np.int64))
    return _sampled(layer, counts["n_tokens"].to_numpy(), selection)


def _sampled(
    layer: LayerKey, n_tokens: UInt64[np.ndarray, " latent"], selection: LatentSample
) -> Int64[np.ndarray, " chosen"]:
    key = address_key(selection.seed, layer, None, "select-latents")
    if selection.by == "random":
        return _smallest(key, np.arange(len(n_tokens), dtype=np.int64), selection.sample)
    alive = np.flatnonzero(n_tokens > 0)
    priority = hash_priority(key, alive)
    one_group = np.zeros(len(alive), dtype=np.int64)
    by_rate = ranks_within(one_group, priority, n_tokens[alive].astype(np.int64))
    quarter = by_rate * 4 // max(1, len(alive))
    turn = ranks_within(one_group, priority, ranks_within(quarter, priority))
    return alive[turn < selection.sample]


def floor_order(
    layer: LayerKey, selected: Int64[np.ndarray, " latent"], config: FloorsConfig
) -> Int64[np.ndarray, " latent"]:
    """``selected`` in the order in which latents are taken for floors: the first ``sample`` are.

    The order of those that stay does not change when others leave.
    """
    selected = np.sort(selected)
    priority = hash_priority(address_key(config.seed, layer, None, "floor-latents"), selected)
    return selected[np.argsort(priority, kind="stable")]


def scored_latents(selection: pl.DataFrame, latents: ScoredLatents) -> pl.DataFrame:
    """The rows of those explained latents that a scorer is asked about.

    Args:
        selection: ``schemas.SELECTION``.
        latents: ``all``; a sample: the first of the layer by ``rank``, so none that is known to be
            dead or rare; or a list, of which latents that are not explained are left out.
    """
    if latents == "all":
        return selection
    if isinstance(latents, tuple):
        return selection.filter(pl.col("latent").is_in(latents))
    return selection.filter(pl.col("rank") < latents.sample)


def processing_order(
    layer: LayerKey, latents: Int64[np.ndarray, " latent"]
) -> Int64[np.ndarray, " latent"]:
    """``latents`` in a hashed order, so that a cell cut short is a random sample of itself."""
    latents = np.sort(latents)
    priority = hash_priority(address_key(0, layer, None, "processing-order"), latents)
    return latents[np.argsort(priority, kind="stable")]


def _smallest(key: int, items: Int64[np.ndarray, " item"], n: int) -> Int64[np.ndarray, " chosen"]:
    order = np.argsort(hash_priority(key, items), kind="stable")
    return np.sort(items[order[:n]])


def donors_of(
    layer: LayerKey,
    floors: Int64[np.ndarray, " floor"],
    candidates: Int64[np.ndarray, " candidate"],
    decoder: Float32[np.ndarray, "candidate d_in"],
    config: FloorsConfig,
    preferred: Int64[np.ndarray, " preferred"] | None = None,
) -> pl.DataFrame:
    """Whose explanation may stand in for a floor latent's own, in the order to be tried.

    Donors are the other selected latents of the same aligned block of ``donor_block`` latents,
    with a decoder cosine below ``max_decoder_cosine``, in an order hashed for each floor latent.

    Args:
        layer: Part of the address, and for messages.
        floors: Latents whose floors are measured; each is one of ``candidates``.
        candidates: The selected latents of all blocks that ``floors`` touch, in any order.
        decoder: Row ``i`` is the decoder direction of ``candidates[i]``; a row of zeros has
            cosine 0 with all.
        config: The block, the largest cosine and the seed.
        preferred: Latents that an explainer is restricted to. As many donors again are taken from
            them alone, or a floor latent might have none that this explainer explained.

    Returns:
        ``schemas.DONORS``, at most 16 donors per floor latent, and 16 of ``preferred``; a floor
        latent without any has no row.

    Raises:
        ValueError: If a floor latent is not a candidate.
    """
    lost = np.setdiff1d(floors, candidates)
    if len(lost):
        raise ValueError(f"{layer} latent {lost[0]}: a floor latent that is not selected.")
    parts = []
    for block in np.unique(floors // config.donor_block):
        rows = np.flatnonzero(candidates // config.donor_block == block)
        rows = rows[np.argsort(candidates[rows])]
        unit = _unit(decoder[rows])
        parts.extend(
            _donors(layer, int(floor), candidates[rows], unit, config, preferred)
            for floor in np.unique(floors[floors // config.donor_block == block])
        )
    frame = pl.concat([DONORS.empty().drop("coder", "hookpoint"), *parts])
    return DONORS.conform(frame, layer)


def _donors(
    layer: LayerKey,
    floor: int,
    block: Int64[np.ndarray, " candidate"],
    unit: Float64[np.ndarray, "candidate d_in"],
    config: FloorsConfig,
    preferred: Int64[np.ndarray, " preferred"] | None,
) -> pl.DataFrame:
    cosine = unit @ unit[np.searchsorted(block, floor)]
    fit = np.flatnonzero((cosine < config.max_decoder_cosine) & (block != floor))
    priority = hash_priority(address_key(config.seed, layer, floor, "donors"), block[fit])
    fit = fit[np.argsort(priority, kind="stable")]
    taken = np.arange(len(fit)) < N_DONORS
    if preferred is not None:
        is_preferred = np.isin(block[fit], preferred)
        taken |= is_preferred & (np.cumsum(is_preferred) <= N_DONORS)
    fit = fit[taken]
    return pl.DataFrame(
        {
            "latent": np.full(len(fit), floor, dtype=np.uint32),
            "rank": np.arange(len(fit), dtype=np.uint16),
            "donor": block[fit].astype(np.uint32),
            "decoder_cosine": cosine[fit].astype(np.float32),
        }
    )


def _unit(rows: Float32[np.ndarray, "row d_in"]) -> Float64[np.ndarray, "row d_in"]:
    wide = rows.astype(np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norm > 0, norm, 1.0)
