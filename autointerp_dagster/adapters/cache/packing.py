"""A non-zero as one number of 64 bits, which sorts as its row does.

From the top: the latent within its range, the context, the position, and the bits of a bfloat16.
How many bits each takes follows from the dataset and the size of the range.
"""

from typing import NamedTuple, Self

import numpy as np
import polars as pl
from jaxtyping import UInt64

from autointerp_dagster.core.activations import Nonzeros
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LatentRange

KEY_BYTES = 8
_VALUE_BITS = 16
_ADDRESS_BITS = 64 - _VALUE_BITS

Keys = UInt64[np.ndarray, " nnz"]
"""Packed non-zeros."""


def addresses_of(keys: Keys) -> Keys:
    """Which latent and token each key is about: the key without its value."""
    return keys >> np.uint64(_VALUE_BITS)


class KeyLayout(NamedTuple):
    """Where in a key each number lies."""

    first_latent: int
    context_bits: int
    position_bits: int

    @classmethod
    def of(cls, dataset: TokenDataset, latents: LatentRange) -> Self:
        """The layout for one range of latents.

        Raises:
            StudyError: If latent, context and position need more than 48 bits.
        """
        n_contexts, longest = dataset.contexts.height, int(np.diff(dataset.offsets).max(initial=1))
        counts = (latents.stop - latents.start, n_contexts, longest)
        widths = [(count - 1).bit_length() for count in counts]
        if sum(widths) > _ADDRESS_BITS:
            raise StudyError(
                f"range {latents}: {counts[0]} latents x {n_contexts} contexts x {longest} "
                f"positions need {sum(widths)} bits, wanted at most {_ADDRESS_BITS}. Lower "
                "grid.range_size, tokens.n_tokens or tokens.context_len."
            )
        return cls(latents.start, *widths[1:])

    def pack(self, nonzeros: Nonzeros) -> Keys:
        """A key for each non-zero of the range, in the order given."""
        latent = nonzeros.latent.astype(np.uint64) - np.uint64(self.first_latent)
        keys = latent << np.uint64(self.context_bits)
        keys |= nonzeros.context
        keys <<= np.uint64(self.position_bits)
        keys |= nonzeros.position
        keys <<= np.uint64(_VALUE_BITS)
        keys |= nonzeros.activation.view(np.uint32) >> np.uint32(16)  # the rest is 0, rounded
        return keys

    def unpack(self, keys: Keys) -> pl.DataFrame:
        """``schemas.ACTIVATIONS``, a row for each key, in the order given."""
        address = addresses_of(keys)
        in_context = np.uint64((1 << self.position_bits) - 1)
        in_dataset = np.uint64((1 << self.context_bits) - 1)
        context = (address >> np.uint64(self.position_bits)) & in_dataset
        latent = address >> np.uint64(self.position_bits + self.context_bits)
        bits = keys.astype(np.uint32) << np.uint32(16)
        return pl.DataFrame(
            {
                "latent": latent.astype(np.uint32) + np.uint32(self.first_latent),
                "context": context.astype(np.uint32),
                "position": (address & in_context).astype(np.uint16),
                "activation": bits.view(np.float32),
            }
        )
