"""Randomness with an address: the same latent draws the same, whatever ran before it.

Nothing in the package uses a global generator. A draw is named by (seed, layer, latent, purpose);
large vectorised draws use :func:`hash_priority`, a hash of (address, item) that does not depend on
which other items are hashed with it.
"""

import hashlib

import numpy as np
from jaxtyping import Shaped, UInt64

from autointerp_dagster.core.types import LayerKey

_ITEMS_AT_ONCE = 16_384  # stay in the processor's nearer memory: 4 times as fast as all in one go


def address_key(seed: int, layer: LayerKey | None, latent: int | None, purpose: str) -> int:
    """A 64-bit number that names one draw; distinct addresses collide with chance 2**-64."""
    text = "\0".join([str(seed), str(layer), "-" if latent is None else str(latent), purpose])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def latent_rng(
    seed: int, layer: LayerKey | None, latent: int | None, purpose: str
) -> np.random.Generator:
    """The generator for one purpose of one latent."""
    return np.random.default_rng(address_key(seed, layer, latent, purpose))


def hash_priority(
    key: int | UInt64[np.ndarray, " item"], items: Shaped[np.ndarray, " item"]
) -> UInt64[np.ndarray, " item"]:
    """A uniform 64-bit priority of each item under an address.

    Args:
        key: From :func:`address_key`; one for all items, or one for each.
        items: Non-negative integers that identify the items.

    Returns:
        Priorities; sorting by them is a random order that depends on each item alone, so a subset
        keeps its relative order.

    Source:
        The finaliser of splitmix64 (Steele, Lea, Flood 2014), applied twice.
    """
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), items.shape)
    priority = np.empty(items.shape, dtype=np.uint64)
    scratch = np.empty(min(len(items), _ITEMS_AT_ONCE), dtype=np.uint64)
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        part = slice(start, start + _ITEMS_AT_ONCE)
        value = priority[part]
        shifted = scratch[: len(value)]
        np.copyto(value, items[part], casting="unsafe")
        _finalise(value, shifted)
        value ^= keys[part]
        _finalise(value, shifted)
    return priority


def _finalise(value: UInt64[np.ndarray, " item"], shifted: UInt64[np.ndarray, " item"]) -> None:
    """Hash in place; ``shifted`` is room for as many numbers."""
    value += np.uint64(0x9E3779B97F4A7C15)
    np.right_shift(value, np.uint64(30), out=shifted)
    value ^= shifted
    value *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(value, np.uint64(27), out=shifted)
    value ^= shifted
    value *= np.uint64(0x94D049BB133111EB)
    np.right_shift(value, np.uint64(31), out=shifted)
    value ^= shifted
