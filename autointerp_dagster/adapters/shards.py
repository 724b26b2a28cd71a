"""One cell's activation cache in the store, readable by latents."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.types import LatentRange


class ActivationShard:
    """The non-zeros of a range of latents. Nothing but what is asked for is in memory."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        """Reads how many rows each latent has.

        Args:
            store: Where the blobs are.
            manifest: Of a cell of ``activation_cache`` whose status is ``ok``.

        Raises:
            StoreError: If a blob is missing or damaged; says how to make it again.
        """
        self._store, self._manifest = store, manifest
        cell = LatentRange.parse(manifest.cell.rsplit("/", maxsplit=1)[1])
        counts = store.table(manifest.blob(FIRING_COUNTS.name))
        self.firing_counts = counts
        """``schemas.FIRING_COUNTS`` of the whole layer."""
        self.latents = range(cell.start, min(cell.stop, counts.height))
        """The latents of the cell that the coder has."""
        self.n_rows = counts["n_tokens"].to_numpy()[cell.start : cell.stop].astype(np.int64)
        """Non-zeros of each of ``latents``."""

    def read(self, latents: range) -> pl.DataFrame:
        """``schemas.ACTIVATIONS`` of consecutive latents of the cell; empty for an empty range.

        Raises:
            StoreError: If what is read is damaged; names the file and how to make it again.
        """
        frame = self._store.table(self._manifest.blob(ACTIVATIONS.name))
        inside = pl.col("latent").is_between(latents.start, latents.stop, closed="left")
        return frame.filter(inside)

    def blocks(self, max_rows: int) -> Iterator[range]:
        """All latents in order, in blocks of at most ``max_rows`` non-zeros.

        A latent is never divided, so one with more stands alone.
        """
        start, n = self.latents.start, 0
        for latent, rows in zip(self.latents, self.n_rows.tolist(), strict=True):
            if n + rows > max_rows and latent > start:
                yield range(start, latent)
                start, n = latent, 0
            n += rows
        if start < self.latents.stop:
            yield range(start, self.latents.stop)

    def frames(self) -> Iterator[pl.DataFrame]:
        """All rows in order, in frames of bounded size that may divide a latent."""
        yield self._store.table(self._manifest.blob(ACTIVATIONS.name))
