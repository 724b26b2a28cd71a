"""The embedded windows of a corpus in the store, and exact search among them.

Vectors have length 1 and are kept as float16: half the memory, and the same windows are found but
for near-ties. The search is exact: every text of a split is compared with every other one, in
blocks whose shape and members are fixed by the corpus, so what is found for a window does not
depend on who else is asked for. A text is searched for once; of windows with the same text the
first of a split stands for all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int8, Int32, Int64, UInt64

from autointerp_dagster.adapters.manifests import Blob, Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.windows import WindowGrid

N_NEAREST = 64
"""Windows found for each window; those in which a latent is active are passed over later."""

SEGMENT = 4096
"""Windows that are embedded and stored together."""

WINDOWS = "embedded_windows"
"""Blob with the id of every embedded window, ascending, and a hash of its text."""

VECTORS = "vectors"
"""Blobs ``vectors/00000``, ... with the vectors of so many windows each, in that order."""

NEAREST = "nearest_windows"
"""What is found for so many texts at a time, where it is remembered."""

Remembered = Callable[
    [Mapping[str, Any], Callable[[], Int32[np.ndarray, "asked found"]]],
    Int32[np.ndarray, "asked found"],
]
"""Gives what was found earlier under these parameters, else searches and keeps it."""

_TEXTS = "texts"
_SEARCH_VERSION = "1"
"""Another one where another search would find something else."""
_ASKED = 256
_COMPARED = 8192
_PIECE = 16 * _ASKED
"""Texts that are searched for together: in a large corpus nearly all are asked for anyway."""


def unit_vectors(vectors: Float32[np.ndarray, "row dim"]) -> Float16[np.ndarray, "row dim"]:
    """The vectors at length 1; one that is zero or not finite has no direction and becomes zero."""
    wide = vectors.astype(np.float64)
    with np.errstate(all="ignore"):
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        has_direction = np.isfinite(length) & (length > 0)
        return np.where(has_direction, wide / length, 0).astype(np.float16)


class EmbeddedWindows(NamedTuple):
    """Which windows are embedded."""

    window_id: UInt64[np.ndarray, " window"]
    """Ascending."""
    text: UInt64[np.ndarray, "window half"]
    """128-bit hash of each window's text."""

    @property
    def text_number(self) -> Int64[np.ndarray, " window"]:
        """The same number for the same text."""
        return np.unique(self.text, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def put_windows(store: Store, windows: EmbeddedWindows) -> Blob:
    """Stores which windows are embedded."""
    return store.put_tensors(WINDOWS, {WINDOWS: windows.window_id, _TEXTS: windows.text})


def get_windows(store: Store, manifest: Manifest) -> EmbeddedWindows:
    """Reads which windows are embedded.

    Raises:
        StoreError: If the blob is missing or damaged.
    """
    tensors = store.tensors(manifest.blob(WINDOWS))
    return EmbeddedWindows(tensors[WINDOWS], tensors[_TEXTS])


def put_vectors(store: Store, vectors: Float16[np.ndarray, "window dim"]) -> Blob:
    """Stores one segment of vectors."""
    return store.put_tensors(VECTORS, {VECTORS: vectors})


def get_vectors(store: Store, blob: Blob) -> Float16[np.ndarray, "window dim"]:
    """Reads one segment of vectors.

    Raises:
        StoreError: If it is missing or damaged.
    """
    return store.tensors(blob)[VECTORS]


def segments_of(manifest: Manifest) -> list[Blob]:
    """The segments that a manifest names, in the order of the windows."""
    return [blob for blob in manifest.blobs if blob.name.startswith(f"{VECTORS}/")]


def numbered(blobs: Sequence[Blob]) -> list[Blob]:
    """Segments under the names that they have in a manifest."""
    return [
        blob.model_copy(update={"name": f"{VECTORS}/{number:05d}"})
        for number, blob in enumerate(blobs)
    ]


def _searched(
    _parameters: Mapping[str, Any], search: Callable[[], Int32[np.ndarray, "asked found"]]
) -> Int32[np.ndarray, "asked found"]:
    """Remembers nothing."""
    return search()


class _Members(NamedTuple):
    """The texts of a split."""

    row: Int64[np.ndarray, " member"]
    """The first row of ``vectors`` with each text, ascending."""
    place: Int32[np.ndarray, " text"]
    """Index into ``row`` by number of the text; -1: no window of the split says it."""


class _Found(NamedTuple):
    """What was found for the texts of a split."""

    row: Int32[np.ndarray, "member found"]
    is_searched: Bool[np.ndarray, " piece"]

    @classmethod
    def none(cls, n_members: int) -> "_Found":
        n_pieces = -(-n_members // _PIECE)
        return cls(np.empty((n_members, N_NEAREST), np.int32), np.zeros(n_pieces, dtype=bool))


class NearestWindows:
    """Finds the windows of a split whose vectors have the largest cosine with a window's."""

    def __init__(
        self,
        window: Int64[np.ndarray, " embedded"],
        vectors: Float16[np.ndarray, "embedded dim"],
        split: Int8[np.ndarray, " window"],
        text: Int64[np.ndarray, " embedded"] | None = None,
        device: str = "cpu",
        remembered: Remembered = _searched,
    ) -> None:
        """Nothing is searched yet.

        Args:
            window: Index into the grid of each embedded window, ascending.
            vectors: Their vectors, of length 1; one of zeros has no direction: it finds nothing
                and is not found.
            split: Of every window of the grid.
            text: The same number, from 0, for windows that say the same; null: no two do.
            device: Where cosines are computed.
            remembered: Keeps what was found; asked once for each piece of the texts of a split.
        """
        self._window, self._vectors, self._device = window, vectors, device
        self._text = np.arange(len(window)) if text is None else text
        self._remembered = remembered
        splits = split[window]
        self._splits = blake2b(splits.tobytes(), digest_size=16).hexdigest()
        self._members: list[_Members] = []
        """By split."""
        self._split_of = np.full(len(split), -1, dtype=np.int64)
        self._at = np.zeros(len(split), dtype=np.int64)
        has_direction = vectors.any(axis=1)
        for code in range(int(split.max(initial=-1)) + 1):
            rows = np.flatnonzero(has_direction & (splits == code))
            members = self._members_of(rows)
            self._members.append(members)
            self._split_of[window[rows]] = code
            self._at[window[rows]] = members.place[self._text[rows]]
        self._found: dict[tuple[int, int], _Found] = {}
        """By the split of those asked for and the split compared."""

    @classmethod
    def read(
        cls,
        store: Store,
        manifest: Manifest,
        grid: WindowGrid,
        device: str = "cpu",
        remembered: Remembered = _searched,
    ) -> "NearestWindows":
        """Loads all vectors that a manifest of ``window_embeddings`` names.

        Memory: 2 bytes per dimension and window, and for each text searched for 4 per window
        found.

        Raises:
            StoreError: If a blob is missing or damaged, or the windows are not those of the grid.
        """
        embedded = get_windows(store, manifest)
        ids = np.append(grid.window_id, np.uint64(2**64 - 1))
        window = np.searchsorted(ids, embedded.window_id)
        if (ids[window] != embedded.window_id).any():
            raise StoreError(
                f"{manifest.path}: embedded windows are not those of the corpus cut to "
                f"{grid.window_len} tokens. Materialize window_embeddings again."
            )
        vectors, start = np.zeros((0, 1), dtype=np.float16), 0
        for blob in segments_of(manifest):
            part = get_vectors(store, blob)
            if not start:
                vectors = np.zeros((len(window), part.shape[1]), dtype=np.float16)
            vectors[start : start + len(part)] = part
            start += len(part)
        text = embedded.text_number
        return cls(window.astype(np.int64), vectors, grid.split, text, device, remembered)

    def nearest(
        self, window: Int64[np.ndarray, " row"], split: int
    ) -> Int64[np.ndarray, "row found"]:
        """The ``N_NEAREST`` nearest windows of a split, the nearest first, ties by window id.

        All have different texts, and none that of the window itself: of windows of the split with
        the same text the one with the smallest id is found. Padded with -1; a window that is not
        embedded, or whose vector has no direction, has nothing else.

        Args:
            window: Index into the grid, in any order.
            split: Whose windows are compared.
        """
        nearest = np.full((len(window), N_NEAREST), -1, dtype=np.int64)
        if split < len(self._members):
            for own in range(len(self._members)):
                rows = np.flatnonzero(self._split_of[window] == own)
                if len(rows):
                    found = self._nearest(self._at[window[rows]], own, split)
                    nearest[rows] = np.where(found < 0, -1, self._window[found])
        return nearest

    def _members_of(self, rows: Int64[np.ndarray, " row"]) -> _Members:
        first = np.sort(np.unique(self._text[rows], return_index=True)[1])
        place = np.full(int(self._text.max(initial=-1)) + 1, -1, dtype=np.int32)
        place[self._text[rows[first]]] = np.arange(len(first), dtype=np.int32)
        return _Members(rows[first], place)

    def _nearest(
        self, at: Int64[np.ndarray, " row"], own: int, split: int
    ) -> Int32[np.ndarray, "row found"]:
        """Rows of ``vectors`` for members of one split."""
        if (own, split) not in self._found:
            self._found[own, split] = _Found.none(len(self._members[own].row))
        found = self._found[own, split]
        for piece in np.unique(at // _PIECE).tolist():
            if not found.is_searched[piece]:
                members = slice(piece * _PIECE, (piece + 1) * _PIECE)
                found.row[members] = self._remembered(
                    {
                        "version": _SEARCH_VERSION,
                        "splits": self._splits,
                        "own": own,
                        "compared": split,
                        "piece": piece,
                    },
                    lambda members=members: self._search_piece(
                        self._members[own].row[members], split
                    ),
                )
                found.is_searched[piece] = True
        return found.row[at]

    def _search_piece(
        self, rows: Int64[np.ndarray, " row"], split: int
    ) -> Int32[np.ndarray, "asked found"]:
        """What is nearest to the texts of one piece, whether they are asked for or not."""
        blocks = [rows[start : start + _ASKED] for start in range(0, len(rows), _ASKED)]
        return np.concatenate([self._search(block, split) for block in blocks])

    def _search(
        self, rows: Int64[np.ndarray, " row"], split: int
    ) -> Int32[np.ndarray, "asked found"]:
        asked = self._padded(rows, _ASKED)
        own = self._members[split].place[self._text[rows]]
        best = torch.full((_ASKED, 1), -torch.inf, device=self._device)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start, members in _pieces(self._members[split].row):
            cosines = asked @ self._padded(members, _COMPARED).T
            cosines[:, len(members) :] = -torch.inf
            same = np.flatnonzero((own >= start) & (own < start + len(members)))
            cosines[torch.from_numpy(same), torch.from_numpy(own[same] - start)] = -torch.inf
            best = torch.maximum(best, cosines.topk(N_NEAREST, dim=1).values[:, -1:])
            kept = ((cosines >= best) & (cosines > -torch.inf)).nonzero(as_tuple=True)
            row, column, cosine = (x.cpu().numpy() for x in (*kept, cosines[kept]))
            found.append((row, members[column], cosine))
        return _ordered(found, len(rows))

    def _padded(self, rows: Int64[np.ndarray, " row"], n: int) -> torch.Tensor:
        """Their vectors as a matrix of ``n`` rows, so that every product has one shape."""
        padded = torch.zeros((n, self._vectors.shape[1]), device=self._device)
        padded[: len(rows)] = torch.from_numpy(self._vectors[rows]).to(self._device)
        return padded


def _ordered(
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], n_rows: int
) -> Int32[np.ndarray, "asked found"]:
    """The best of (asked, member, cosine), ties by member; padded with -1."""
    nearest = np.full((n_rows, N_NEAREST), -1, dtype=np.int32)
    if not found:
        return nearest
    row, member, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((member, -cosine, row))
    row, member = row[order], member[order]
    rank = number_in_group(row)
    kept = (rank < N_NEAREST) & (row < n_rows)
    nearest[row[kept], rank[kept]] = member[kept]
    return nearest


def _pieces(
    members: Int64[np.ndarray, " row"],
) -> Iterator[tuple[int, Int64[np.ndarray, " row"]]]:
    """Members to compare at once, with the index of the first."""
    for start in range(0, len(members), _COMPARED):
        yield start, members[start : start + _COMPARED]
