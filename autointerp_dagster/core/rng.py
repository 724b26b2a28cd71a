"""Randomness with an address: the same latent draws the same, whatever ran before it.

Nothing in the package uses a global generator. A draw is named by (seed, layer, latent, purpose);
large vectorised draws use :func:`hash_priority`, a hash of (address, item) that does not depend on
which other items are hashed with it.
"""

import hashlib

import numpy as np
from jaxtyping import Shaped, UInt64

from autointerp_dagster.core.types import LayerKey


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
    mixed = np.asarray(key, dtype=np.uint64) ^ _finalise(items.astype(np.uint64))
    return _finalise(mixed)


def _finalise(value: UInt64[np.ndarray, " item"]) -> UInt64[np.ndarray, " item"]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    shifted = value >> np.uint64(30)
    value ^= shifted
    value *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(value, np.uint64(27), out=shifted)
    value ^= shifted
    value *= np.uint64(0x94D049BB133111EB)
    np.right_shift(value, np.uint64(31), out=shifted)
    value ^= shifted
    return value
