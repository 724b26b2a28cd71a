"""What the stage ``window_embeddings`` does: every distinct text of the grid, embedded once."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Int64, UInt64

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.embedders import SentenceEmbedder
from autointerp_dagster.adapters.manifests import Manifest, Part
from autointerp_dagster.adapters.window_vectors import (
    SEGMENT,
    VECTORS,
    EmbeddedWindows,
    get_vectors,
    get_windows,
    numbered,
    put_vectors,
    put_windows,
    segments_of,
    unit_vectors,
)
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.negatives import ShownTokens, shown_tokens
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.tokens import Detokenizer, TokenDataset
from autointerp_dagster.core.types import Progress, WholeStudy
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit
from autointerp_dagster.study import Study

_DTYPE = "float16"
_PLACE = WholeStudy()

_logger = logging.getLogger(__name__)


class _Texts(NamedTuple):
    """Which windows say the same."""

    digest: UInt64[np.ndarray, "window half"]
    """128-bit hash of each window's text."""
    first: Int64[np.ndarray, " window"]
    """The first window with the same text."""
    is_repeated: Bool[np.ndarray, " window"]
    """Whether another window has the same text."""


@dataclass(slots=True)
class WindowEmbedding:
    """The work of the stage; commits nothing."""

    stage: StageInputs
    study: Study
    detokenizer: Detokenizer
    embedder: SentenceEmbedder
    progress: Progress
    segment_len: int = SEGMENT
    """Windows that are embedded and stored together."""
    _kept: dict[int, Float16[np.ndarray, " dim"]] = field(default_factory=dict)
    """Vectors of texts that come again or were known before, by their first window."""

    def made(self) -> Commit:
        """Embeds what the store does not hold, segment by segment; each is kept once it is made.

        A segment whose windows are others than before takes the vectors of texts that the study's
        last result holds, so only texts that are new are embedded.

        Raises:
            StoreError: If the token dataset was never materialized, or a segment is damaged.
            ModelError: If the embedder cannot be loaded.
        """
        source = self.stage.input("token_dataset", _PLACE)
        dataset = read_dataset(self.stage.store, source)
        window_id, shown = _chosen(dataset, self.study)
        texts = _texts(self._texts_of(dataset, shown, slice(None)), len(window_id))
        before = self.embedder.n_embedded
        parts = self._parts(dataset, shown, texts)
        summary = {
            "n_windows": len(window_id),
            "n_distinct": int((texts.first == np.arange(len(window_id))).sum()),
            "n_embedded": self.embedder.n_embedded - before,
        }
        windows = put_windows(self.stage.store, EmbeddedWindows(window_id, texts.digest))
        return Commit([windows, *numbered([part.blob for part in parts])], summary)

    def _parts(self, dataset: TokenDataset, shown: ShownTokens, texts: _Texts) -> list[Part]:
        """Every segment; what is needed of one that is stored already is read."""
        segments = [
            slice(start, min(start + self.segment_len, len(shown.first)))
            for start in range(0, len(shown.first), self.segment_len)
        ]
        parameters = [self._parameters(texts, segment) for segment in segments]
        found = [self.stage.found_part(VECTORS, named) for named in parameters]
        last_missing = max((i for i, part in enumerate(found) if part is None), default=-1)
        self._recall(texts, [segments[i] for i, part in enumerate(found) if part is None])
        parts = []
        bar = self.progress(
            range(len(segments)),
            total=len(segments),
            description="window embeddings",
            unit="segments",
        )
        for i in bar:
            part = found[i]
            if part is None:
                part = self._embedded(dataset, shown, texts, segments[i], parameters[i])
            elif i < last_missing:
                self._keep(texts, segments[i], get_vectors(self.stage.store, part.blob))
            parts.append(part)
        return parts

    def _embedded(
        self,
        dataset: TokenDataset,
        shown: ShownTokens,
        texts: _Texts,
        segment: slice,
        parameters: dict[str, Any],
    ) -> Part:
        """A new segment: texts that no window before it has go through the embedder."""

        def make() -> Part:
            first = texts.first[segment].tolist()
            said = self._texts_of(dataset, shown, segment)
            new = {
                number: text
                for number, text in enumerate(said, segment.start)
                if first[number - segment.start] == number and number not in self._kept
            }
            made = unit_vectors(self.embedder.embed(list(new.values()))) if new else ()
            fresh = dict(zip(new, made, strict=True))
            vectors = np.stack([fresh[i] if i in fresh else self._kept[i] for i in first])
            self._keep(texts, segment, vectors)
            return Part(name=VECTORS, fingerprint="", blob=put_vectors(self.stage.store, vectors))

        return self.stage.part(VECTORS, parameters, make)

    def _recall(self, texts: _Texts, missing: Sequence[slice]) -> None:
        """Keep what the study's last result holds of the texts of these segments."""
        if not missing:
            return
        numbers = np.concatenate([np.arange(segment.start, segment.stop) for segment in missing])
        numbers = numbers[texts.first[numbers] == numbers]
        try:
            last = self._last_result()
            if last is not None:
                self._recall_from(last, texts, numbers)
        except StoreError as error:
            _logger.warning("known vectors are not used: %s", error)

    def _last_result(self) -> Manifest | None:
        """Of the same embedder and version; null if there is none."""
        stage = self.stage
        last = stage.store.head(self.study.name, stage.stage.name, str(_PLACE))
        if last is None or last.stage_version != stage.stage.version:
            return None
        is_same = last.parameters.get("embedder") == stage.parameters["embedder"]
        return last if is_same else None

    def _recall_from(
        self, last: Manifest, texts: _Texts, numbers: Int64[np.ndarray, " wanted"]
    ) -> None:
        known = get_windows(self.stage.store, last).text
        at = _rows_with(known, texts.digest[numbers])
        start = 0
        for blob in segments_of(last):
            vectors = get_vectors(self.stage.store, blob)
            is_here = (at >= start) & (at < start + len(vectors))
            for number, row in zip(numbers[is_here].tolist(), at[is_here].tolist(), strict=True):
                self._kept[number] = vectors[row - start].copy()
            start += len(vectors)

    def _keep(
        self, texts: _Texts, segment: slice, vectors: Float16[np.ndarray, "window dim"]
    ) -> None:
        """Keep what later windows need."""
        numbers = np.arange(segment.start, segment.stop)
        for at in np.flatnonzero(texts.is_repeated[segment] & (texts.first[segment] == numbers)):
            self._kept[int(numbers[at])] = vectors[at].copy()

    def _parameters(self, texts: _Texts, segment: slice) -> dict[str, Any]:
        """All that decides the vectors of a segment: the embedder and what is said, in order."""
        said = blake2b(texts.digest[segment].tobytes(), digest_size=16).hexdigest()
        return {"embedder": self.stage.parameters["embedder"], "dtype": _DTYPE, "texts": said}

    def _texts_of(self, dataset: TokenDataset, shown: ShownTokens, part: slice) -> Iterator[str]:
        """What windows say, as a scorer embeds them: plain text without BOS."""
        bounds = zip(shown.first[part].tolist(), shown.stop[part].tolist(), strict=True)
        for first, stop in bounds:
            yield "".join(self.detokenizer.pieces(dataset.tokens[first:stop]))


def _chosen(
    dataset: TokenDataset, study: Study
) -> tuple[UInt64[np.ndarray, " window"], ShownTokens]:
    """The windows to embed, in grid order: all, or those first in a hashed order."""
    window_len, n_most = study.sampling.window_len, study.window_embeddings.max_windows
    n_windows = np.diff(dataset.offsets) // window_len
    context = np.repeat(np.arange(len(n_windows)), n_windows)
    before = np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    start = (np.arange(len(context)) - before) * window_len
    window_id = (context << 16 | start).astype(np.uint64)
    if n_most is not None and n_most < len(window_id):
        key = address_key(study.sampling.seed, None, None, "window_embeddings")
        drawn = np.sort(np.argsort(hash_priority(key, window_id), kind="stable")[:n_most])
        window_id, context, start = window_id[drawn], context[drawn], start[drawn]
    return window_id, shown_tokens(dataset, context, start, window_len)


def _texts(texts: Iterator[str], n: int) -> _Texts:
    data = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in texts)
    digest = np.frombuffer(data, dtype=np.uint64).reshape(n, 2)
    order = np.lexsort((np.arange(n), digest[:, 1], digest[:, 0]))
    in_order = digest[order]
    is_first = np.append(True, (in_order[1:] != in_order[:-1]).any(axis=1))[:n]
    group = np.cumsum(is_first) - 1
    first, is_repeated = np.empty(n, dtype=np.int64), np.empty(n, dtype=bool)
    first[order] = order[is_first][group]
    is_repeated[order] = np.bincount(group, minlength=1)[group] > 1
    return _Texts(digest, first, is_repeated)


def _rows_with(
    known: UInt64[np.ndarray, "row half"], asked: UInt64[np.ndarray, "asked half"]
) -> Int64[np.ndarray, " asked"]:
    """The first row of each hash; -1 where there is none."""
    if not len(known):
        return np.full(len(asked), -1, dtype=np.int64)
    order = np.argsort(known[:, 0], kind="stable")
    at = np.searchsorted(known[order, 0], asked[:, 0])
    row = order[np.minimum(at, len(order) - 1)]
    return np.where((known[row] == asked).all(axis=1), row, -1)
