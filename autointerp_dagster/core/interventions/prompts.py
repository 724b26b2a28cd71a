"""Which beginnings of contexts a latent is tested on.

A prompt is a context cut after the first token on which the latent fires. What a causal model does
on the first 64 tokens of a longer context is what it does on a context of these 64 tokens, so the
activations of the cache serve, and contexts begin with BOS where there is one.

A prompt lies in one context, and a context in one split. The explainer's prompts are of the train
split and the scoring ones of the test split, so that no explainer sees text that is judged.
"""

import numpy as np
import polars as pl
from jaxtyping import Int8, Int64, UInt64

from autointerp_dagster.core.config import InterventionsConfig
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.sampling import (
    draw_ranks,
    latent_keys,
    quantile_bands,
    strength_ranks,
)
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS

N_QUINTILES = 5
POSITION_BITS = 16
"""Of ``window_id``: ``context << 16 | position``."""

_TRAIN, _TEST = SPLITS.index("train"), SPLITS.index("test")

_COLUMNS = {
    "latent": pl.UInt32,
    "window_id": pl.UInt64,
    "context": pl.UInt32,
    "position": pl.UInt16,
    "activation": pl.Float32,
    "quintile": pl.UInt8,
    "is_for_explainer": pl.Boolean,
}


def prompts_of(
    activations: pl.DataFrame,
    layer: LayerKey,
    latents: Int64[np.ndarray, " latent"],
    config: InterventionsConfig,
    splits: Int8[np.ndarray, " context"],
) -> pl.DataFrame:
    """The prompts of some latents of one layer, drawn evenly from quintiles of the activation.

    Args:
        activations: ``schemas.ACTIVATIONS``, at least all rows of ``latents``.
        layer: Part of the address of a draw.
        latents: Whose prompts are wanted.
        config: A prompt has ``min_len`` to ``prompt_len`` tokens, so a context in which the latent
            fires earlier gives none. Position 0 is ignored. ``n_for_explainer`` are drawn from
            train contexts, the rest of ``n_prompts`` from test contexts; neither makes up for the
            other where there are fewer.
        splits: Of each context: :func:`windows.context_splits`.

    Returns:
        A row per prompt, by (latent, window_id): ``latent``, ``window_id``, ``context``,
        ``position`` (of the last token), ``activation`` (on it), ``quintile`` (0 strongest, over
        all that could be drawn of both kinds) and ``is_for_explainer``.
    """
    found = _candidates(activations, latents, config, splits)
    latent = found["latent"].to_numpy().astype(np.int64)
    activation = found["activation"].to_numpy().astype(np.float32)
    window_id = found["window_id"].to_numpy().astype(np.uint64)
    group = np.unique(latent, return_inverse=True)[1].astype(np.int64)
    priority = _priorities(layer, latent, window_id, config.seed, "intervention-prompts")
    strength = strength_ranks(group, activation, priority)
    quintile = quantile_bands(group, activation, lambda rows: priority[rows], N_QUINTILES)
    shown = splits[found["context"].to_numpy()] == _TRAIN
    n_scoring = config.n_prompts - config.n_for_explainer
    n_wanted = np.where(shown, config.n_for_explainer, n_scoring).astype(np.int64)
    of_one_kind = 2 * group + shown
    drawn = draw_ranks("quantiles", of_one_kind, quintile, strength, priority, n_wanted) >= 0
    found = found.with_columns(
        quintile=pl.Series(quintile), is_for_explainer=pl.Series(shown, dtype=pl.Boolean)
    )
    return _conformed(found.filter(pl.Series(drawn, dtype=pl.Boolean)))


def _candidates(
    activations: pl.DataFrame,
    latents: Int64[np.ndarray, " latent"],
    config: InterventionsConfig,
    splits: Int8[np.ndarray, " context"],
) -> pl.DataFrame:
    """The first firing of each latent in each context of train and test, if not early or late."""
    wanted = pl.Series(latents, dtype=pl.UInt32).implode()
    usable = pl.Series(np.flatnonzero((splits == _TRAIN) | (splits == _TEST)), dtype=pl.UInt32)
    return (
        activations.lazy()
        .filter(
            pl.col("latent").is_in(wanted),
            pl.col("context").is_in(usable.implode()),
            pl.col("position") > 0,
        )
        .sort("latent", "context", "position")
        .unique(["latent", "context"], keep="first", maintain_order=True)
        .filter(pl.col("position").is_between(config.min_len - 1, config.prompt_len - 1))
        .with_columns(
            window_id=pl.col("context").cast(pl.UInt64) * (1 << POSITION_BITS)
            + pl.col("position").cast(pl.UInt64)
        )
        .collect()
    )


def _priorities(
    layer: LayerKey,
    latent: Int64[np.ndarray, " prompt"],
    window_id: UInt64[np.ndarray, " prompt"],
    seed: int,
    purpose: str,
) -> UInt64[np.ndarray, " prompt"]:
    if not len(latent):
        return np.zeros(0, dtype=np.uint64)
    first, stop = int(latent.min()), int(latent.max()) + 1
    keys = latent_keys(seed, layer, range(first, stop), purpose)
    return hash_priority(keys[latent - first], window_id)


def _conformed(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(pl.col(name).cast(kind) for name, kind in _COLUMNS.items()).sort(
        "latent", "window_id"
    )
