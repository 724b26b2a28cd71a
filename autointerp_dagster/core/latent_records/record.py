"""One latent's record as objects, for prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float32, Int32

from autointerp_dagster.core.latent_records.tables import RecordTables
from autointerp_dagster.core.schemas import LatentStatus, NegativeKind, Split
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LatentId, LayerKey
from autointerp_dagster.core.windows import SPLITS


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a latent, as it may be shown."""

    window_id: int
    """``context << 16 | start``."""
    context: int
    start: int
    """First position of the window in its context (BOS may be hidden, see ``tokens``)."""
    split: Split
    is_activating: bool
    negative_kind: NegativeKind | None
    """Null for an activating window."""
    quantile: int | None
    """0 strongest; null for a non-activating window."""
    rank: int
    """Order in which windows of this split and class are used."""
    tokens: Int32[np.ndarray, " position"]
    """The visible tokens: BOS is left out, so one fewer than the window length at times."""
    activations: Float32[np.ndarray, " position"]
    """One per visible token, >= 0; all 0 for a non-activating window."""
    other_activations: Float32[np.ndarray, " position"] | None = None
    """Of the neighbour that fires in a negative of kind ``neighbour``, one per visible token."""


@dataclass(frozen=True, slots=True)
class LatentRecord:
    """Everything known of one latent before it is explained."""

    latent: LatentId
    status: LatentStatus
    max_activation: float | None
    """Largest activation in the cache; null for a dead latent."""
    top_tokens: tuple[int, ...]
    """Token ids by summed activation over train windows, descending; at most 8."""
    top_token_shares: tuple[float, ...]
    """Their shares of the summed activation, in (0, 1]."""
    windows: tuple[Window, ...]
    """By (split, class, rank); empty unless ``status`` is ``ok``."""
    n_train: int | None = None
    """Activating train windows there are, before sampling: what the shares are of. Null: not
    known."""
    promoted_tokens: tuple[str, ...] = ()
    """Text of the tokens that the decoder row promotes most, descending; empty if not looked up."""

    def activating(self, split: Split) -> tuple[Window, ...]:
        """The activating windows of a split, by rank."""
        return tuple(w for w in self.windows if w.split == split and w.is_activating)

    def non_activating(self, split: Split) -> tuple[Window, ...]:
        """The non-activating windows of a split, by rank."""
        return tuple(w for w in self.windows if w.split == split and not w.is_activating)


def records_in_order(
    tables: RecordTables, dataset: TokenDataset, layer: LayerKey, latents: Sequence[int]
) -> Iterator[LatentRecord]:
    """The records of ``latents``, in that order, built one at a time.

    Raises:
        ValueError: If a latent is not in the tables.
    """
    row_of = {latent: row for row, latent in enumerate(tables.latents["latent"].to_list())}
    windows = tables.windows.sort("latent", maintain_order=True)
    ids = windows["latent"].to_numpy()
    for latent in latents:
        identity = LatentId(layer.coder, layer.hookpoint, latent)
        if latent not in row_of:
            raise ValueError(f"{identity}: is not in the record tables. Read the cell it is in.")
        first, stop = int(np.searchsorted(ids, latent)), int(np.searchsorted(ids, latent, "right"))
        row = tables.latents.row(row_of[latent], named=True)
        yield LatentRecord(
            latent=identity,
            status=row["status"],
            max_activation=row["max_activation"],
            top_tokens=tuple(row["top_tokens"]),
            top_token_shares=tuple(row["top_token_shares"]),
            windows=_windows(windows[first:stop], dataset),
            n_train=row["n_train"],
        )


def _windows(rows: pl.DataFrame, dataset: TokenDataset) -> tuple[Window, ...]:
    """The windows of one latent, by (split, class, rank)."""
    rows = rows.sort(
        pl.col("split").replace_strict({name: code for code, name in enumerate(SPLITS)}),
        ~pl.col("is_activating"),
        "rank",
    )
    window_len = int(rows["activations"].list.len().drop_nulls().to_numpy().max(initial=0))
    return tuple(_window(row, window_len, dataset) for row in rows.iter_rows(named=True))


def _window(row: dict[str, Any], window_len: int, dataset: TokenDataset) -> Window:
    hidden = max(0, dataset.first_visible - row["start"])
    tokens = dataset.context_tokens(row["context"])
    return Window(
        window_id=row["window_id"],
        context=row["context"],
        start=row["start"],
        split=row["split"],
        is_activating=row["is_activating"],
        negative_kind=row["negative_kind"],
        quantile=row["quantile"],
        rank=row["rank"],
        tokens=tokens[row["start"] + hidden : row["start"] + window_len],
        activations=(
            np.array(row["activations"][hidden:], dtype=np.float32)
            if row["is_activating"]
            else np.zeros(window_len - hidden, dtype=np.float32)
        ),
        other_activations=(
            None
            if row["neighbour_activations"] is None
            else np.array(row["neighbour_activations"][hidden:], dtype=np.float32)
        ),
    )
