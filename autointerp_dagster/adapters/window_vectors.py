"""The embedded windows of a corpus in the store, and exact search among them.

Vectors have length 1 and are kept as float16: half the memory, and the same windows are found but
for near-ties. The search is exact: every window of a split is compared with every other one, in
blocks whose shape and members are fixed by the corpus, so what is found for a window does not
depend on who else is asked for. A window is searched for once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int8, Int32, Int64, UInt64

from autointerp_dagster.adapters.manifests import Blob, Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.windows import WindowGrid

N_NEAREST = 64
"""Windows found for each window; those in which a latent is active are passed over later."""

SEGMENT = 4096
"""Windows that are embedded and stored together."""

WINDOWS = "embedded_windows"
"""Blob with the id of every embedded window, ascending."""

VECTORS = "vectors"
"""Blobs ``vectors/00000``, ... with the vectors of so many windows each, in that order."""

_ASKED = 256
_COMPARED = 8192


def unit_vectors(vectors: Float32[np.ndarray, "row dim"]) -> Float16[np.ndarray, "row dim"]:
    """The vectors at length 1; one that is zero or not finite has no direction and becomes zero."""
    wide = vectors.astype(np.float64)
    with np.errstate(all="ignore"):
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        has_direction = np.isfinite(length) & (length > 0)
        return np.where(has_direction, wide / length, 0).astype(np.float16)


def put_windows(store: Store, window_id: UInt64[np.ndarray, " window"]) -> Blob:
    """Stores which windows are embedded, ascending by id."""
    return store.put_tensors(WINDOWS, {WINDOWS: window_id})


def put_vectors(store: Store, vectors: Float16[np.ndarray, "window dim"]) -> Blob:
    """Stores one segment of vectors."""
    return store.put_tensors(VECTORS, {VECTORS: vectors})


def get_vectors(store: Store, blob: Blob) -> Float16[np.ndarray, "window dim"]:
    """Reads one segment of vectors.

    Raises:
        StoreError: If it is missing or damaged.
    """
    return store.tensors(blob)[VECTORS]


def numbered(blobs: Sequence[Blob]) -> list[Blob]:
    """Segments under the names that they have in a manifest."""
    return [
        blob.model_copy(update={"name": f"{VECTORS}/{number:05d}"})
        for number, blob in enumerate(blobs)
    ]


class _Found(NamedTuple):
    """What was found for the windows of a split."""

    window: Int32[np.ndarray, "member found"]
    is_searched: Bool[np.ndarray, " block"]

    @classmethod
    def none(cls, n_members: int) -> "_Found":
        n_blocks = -(-n_members // _ASKED)
        return cls(np.empty((n_members, N_NEAREST), np.int32), np.zeros(n_blocks, dtype=bool))


class NearestWindows:
    """Finds the windows of a split whose vectors have the largest cosine with a window's."""

    def __init__(
        self,
        window: Int64[np.ndarray, " embedded"],
        vectors: Float16[np.ndarray, "embedded dim"],
        split: Int8[np.ndarray, " window"],
        device: str = "cpu",
    ) -> None:
        """Nothing is searched yet.

        Args:
            window: Index into the grid of each embedded window, ascending.
            vectors: Their vectors, of length 1; one of zeros has no direction: it finds nothing
                and is not found.
            split: Of every window of the grid.
            device: Where cosines are computed.
        """
        has_direction = vectors.any(axis=1)
        self._vectors, self._device = vectors, device
        self._members: list[Int64[np.ndarray, " row"]] = []
        """Rows of ``vectors`` by split."""
        self._window = window
        self._split_of = np.full(len(split), -1, dtype=np.int64)
        self._at = np.zeros(len(split), dtype=np.int64)
        for code in range(int(split.max(initial=-1)) + 1):
            rows = np.flatnonzero(has_direction & (split[window] == code))
            self._members.append(rows)
            self._split_of[window[rows]] = code
            self._at[window[rows]] = np.arange(len(rows))
        self._found: dict[tuple[int, int], _Found] = {}
        """By the split of those asked for and the split compared."""

    @classmethod
    def read(
        cls, store: Store, manifest: Manifest, grid: WindowGrid, device: str = "cpu"
    ) -> "NearestWindows":
        """Loads all vectors that a manifest of ``window_embeddings`` names.

        Memory: 2 bytes per dimension and window, and for each window searched for 4 per window
        found.

        Raises:
            StoreError: If a blob is missing or damaged, or the windows are not those of the grid.
        """
        window_id = store.tensors(manifest.blob(WINDOWS))[WINDOWS]
        ids = np.append(grid.window_id, np.uint64(2**64 - 1))
        window = np.searchsorted(ids, window_id)
        if (ids[window] != window_id).any():
            raise StoreError(
                f"{manifest.path}: embedded windows are not those of the corpus cut to "
                f"{grid.window_len} tokens. Materialize window_embeddings again."
            )
        vectors, start = np.zeros((0, 1), dtype=np.float16), 0
        for blob in manifest.blobs:
            if not blob.name.startswith(f"{VECTORS}/"):
                continue
            part = get_vectors(store, blob)
            if not start:
                vectors = np.zeros((len(window), part.shape[1]), dtype=np.float16)
            vectors[start : start + len(part)] = part
            start += len(part)
        return cls(window.astype(np.int64), vectors, grid.split, device)

    def nearest(
        self, window: Int64[np.ndarray, " row"], split: int
    ) -> Int64[np.ndarray, "row found"]:
        """The ``N_NEAREST`` nearest windows of a split, the nearest first, ties by window id.

        The window itself is not among them. Padded with -1; a window that is not embedded, or
        whose vector has no direction, has nothing else.

        Args:
            window: Index into the grid, in any order.
            split: Whose windows are compared.
        """
        nearest = np.full((len(window), N_NEAREST), -1, dtype=np.int64)
        if split < len(self._members):
            for own in range(len(self._members)):
                rows = np.flatnonzero(self._split_of[window] == own)
                nearest[rows] = self._nearest(self._at[window[rows]], own, split)
        return nearest

    def _nearest(
        self, at: Int64[np.ndarray, " row"], own: int, split: int
    ) -> Int32[np.ndarray, "row found"]:
        """The same for members of one split."""
        if (own, split) not in self._found:
            self._found[own, split] = _Found.none(len(self._members[own]))
        found = self._found[own, split]
        for block in np.unique(at // _ASKED).tolist():
            if not found.is_searched[block]:
                rows = slice(block * _ASKED, (block + 1) * _ASKED)
                found.window[rows] = self._search(own, block, split)
                found.is_searched[block] = True
        return found.window[at]

    def _search(self, own: int, block: int, split: int) -> Int64[np.ndarray, "asked found"]:
        """What is nearest to the windows of one block, whether they are asked for or not."""
        rows = self._members[own][block * _ASKED : (block + 1) * _ASKED]
        asked = self._padded(rows, _ASKED)
        best = torch.full((_ASKED, 1), -torch.inf, device=self._device)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for members in _pieces(self._members[split]):
            cosines = asked @ self._padded(members, _COMPARED).T
            cosines[:, len(members) :] = -torch.inf
            row, column = _same(rows, members)
            cosines[row, column] = -torch.inf
            best = torch.maximum(best, cosines.topk(N_NEAREST, dim=1).values[:, -1:])
            kept = ((cosines >= best) & (cosines > -torch.inf)).nonzero(as_tuple=True)
            row, column, cosine = (x.cpu().numpy() for x in (*kept, cosines[kept]))
            found.append((row, members[column], cosine))
        return self._ordered(found, len(rows))

    def _ordered(
        self, found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], n_rows: int
    ) -> Int64[np.ndarray, "asked found"]:
        nearest = np.full((n_rows, N_NEAREST), -1, dtype=np.int64)
        if not found:
            return nearest
        row, member, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((member, -cosine, row))
        row, member = row[order], member[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = (rank < N_NEAREST) & (row < n_rows)
        nearest[row[kept], rank[kept]] = self._window[member[kept]]
        return nearest

    def _padded(self, rows: Int64[np.ndarray, " row"], n: int) -> torch.Tensor:
        """Their vectors as a matrix of ``n`` rows, so that every product has one shape."""
        padded = torch.zeros((n, self._vectors.shape[1]), device=self._device)
        padded[: len(rows)] = torch.from_numpy(self._vectors[rows]).to(self._device)
        return padded


def _pieces(members: Int64[np.ndarray, " row"]) -> Iterator[Int64[np.ndarray, " row"]]:
    for start in range(0, len(members), _COMPARED):
        yield members[start : start + _COMPARED]


def _same(
    rows: Int64[np.ndarray, " row"], members: Int64[np.ndarray, " member"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a row stands among the members (ascending), as pairs of indices."""
    at = np.minimum(np.searchsorted(members, rows), len(members) - 1)
    same = np.flatnonzero(members[at] == rows)
    return torch.from_numpy(same), torch.from_numpy(at[same])
