"""The token dataset: documents cut into contexts that the subject model sees.

1. Documents are tokenised in corpus order, each alone, without special tokens; those that are
   tokens already keep theirs.
2. A document is cut from its start into stretches; a stretch with BOS before it is a context. No
   context holds text of two documents, and BOS stays at position 0 of the model's input.
3. The corpus is left as soon as enough tokens are used, at the end of a context, so that a larger
   number of tokens only appends.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Int, Int32, Int64, Integer

from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS
from autointerp_dagster.core.types import Progress, silent

_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 20
"""What is tokenised at once ends at either: memory is bounded, whatever the corpus."""

_PROGRESS_STEP = 1000  # tokens


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus."""

    doc_id: str
    """Unique in the corpus and stable, e.g. a path."""
    text: str
    title: str = ""
    source: str = ""

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.text)

    @property
    def content_hash(self) -> str:
        """Of the text."""
        return content_hash(self.text)


@dataclass(frozen=True, slots=True)
class TokenisedDocument:
    """One document of the corpus that comes as token ids."""

    doc_id: str
    """As for a :class:`Document`."""
    tokens: Integer[np.ndarray, " token"]
    """A BOS at its head is not text: contexts get theirs anyway."""
    title: str = ""
    source: str = ""

    @property
    def size(self) -> int:
        """Tokens."""
        return self.tokens.size

    @property
    def content_hash(self) -> str:
        """Of the tokens, whatever the width of their integers."""
        content = np.ascontiguousarray(self.tokens, dtype="<i8").data
        return hashlib.blake2b(content, digest_size=16, person=b"tokens").hexdigest()


AnyDocument = Document | TokenisedDocument


@dataclass(frozen=True, slots=True)
class TokenDataset:
    """The tokenised corpus. Contexts keep document order, so more tokens only append."""

    tokens: Int32[np.ndarray, " token"]
    """All contexts one after another, each with its BOS where there is one."""
    offsets: Int64[np.ndarray, " boundary"]
    """Context ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``; one entry more than contexts."""
    contexts: pl.DataFrame
    """``schemas.CONTEXTS``."""
    documents: pl.DataFrame
    """``schemas.DOCUMENTS``."""
    bos_id: int | None
    """The token at position 0 of every context; null if the tokenizer has none."""

    @property
    def first_visible(self) -> int:
        """First position that activations are kept for and that a reader is shown."""
        return 0 if self.bos_id is None else 1

    def context_tokens(self, context: int) -> Int32[np.ndarray, " position"]:
        """The tokens of one context, with BOS."""
        return self.tokens[self.offsets[context] : self.offsets[context + 1]]

    def n_tokens_by_source(self) -> dict[str, int]:
        """Tokens used of a source, BOS not counted; of the 20 with most, by number."""
        totals = self.documents.group_by("source").agg(pl.col("n_tokens").sum())
        largest = totals.sort(["n_tokens", "source"], descending=[True, False]).head(20)
        return {source: int(n_tokens) for source, n_tokens in largest.iter_rows()}


@runtime_checkable
class Detokenizer(Protocol):
    """Turns token ids back into the pieces of text they stand for."""

    def pieces(self, tokens: Int[np.ndarray, " position"]) -> list[str]:
        """One string per token; joined they are the text.

        A character whose bytes are spread over several tokens stands whole at the last of them;
        the others are empty strings.
        """
        ...


def content_hash(text: str) -> str:
    """A 128-bit hash of a document's text, as hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def known_tokens(documents: Iterable[AnyDocument], vocabulary_size: int) -> Iterator[AnyDocument]:
    """The documents, each once its token ids are seen to be the tokenizer's.

    Args:
        documents: Text is passed on as it is.
        vocabulary_size: Token ids are below it.

    Raises:
        CorpusError: At the first token that is not; names document, position and token.
    """
    for document in documents:
        if isinstance(document, TokenisedDocument):
            strange = (document.tokens < 0) | (document.tokens >= vocabulary_size)
            if strange.any():
                position = int(strange.argmax())
                raise CorpusError(
                    f"document {document.doc_id!r}: token {int(document.tokens[position])} at "
                    f"position {position}, wanted ids from 0 to {vocabulary_size - 1}. Tokenise "
                    "with the subject model's tokenizer; if the token fills rows, set "
                    "corpus.padding."
                )
        yield document


def build_token_dataset(
    documents: Iterable[AnyDocument],
    encode: Callable[[list[str]], list[list[int]]],
    bos_id: int | None,
    config: TokenConfig,
    progress: Progress = silent,
) -> TokenDataset:
    """Cut documents into contexts until ``config.n_tokens`` tokens are used, BOS not counted.

    Args:
        documents: In corpus order; read no further than needed, 64 at a time, fewer if long.
        encode: Token ids of each text, without special tokens.
        bos_id: Put before every context; null if the tokenizer has none. 0 is a real token.
        config: Whole contexts are taken, so up to one context more than ``n_tokens`` is used. A
            full context is kept even where BOS leaves it fewer than ``min_visible`` tokens.
        progress: Shows how many tokens there are so far.

    Returns:
        Contexts in document order. Every document read has a row, with ``n_tokens`` 0 if it is too
        short for a context. With a larger ``n_tokens`` contexts and documents are only appended,
        except that ``n_tokens`` of the last document may grow.

    Raises:
        CorpusError: If two documents share an id, or no document holds a context.
    """
    cutting = _Cutting(bos_id, config)
    steps = cutting.take(_encoded(documents, encode, bos_id))
    for _ in progress(
        steps,
        total=max(config.n_tokens // _PROGRESS_STEP, 1),
        description="tokenising",
        unit="thousand tokens",
        note=lambda: f"{len(cutting.documents)} documents",
    ):
        pass
    if not cutting.stretches:
        raise CorpusError(
            f"corpus: {len(cutting.documents)} documents, none with {cutting.least} tokens, the "
            "least that a context needs. Add longer texts or lower tokens.min_visible."
        )
    return _assemble(cutting.stretches, list(cutting.documents.values()), bos_id)


def context_batches(dataset: TokenDataset, batch_size: int) -> list[Int64[np.ndarray, " context"]]:
    """The fixed chunks that the subject model runs: contexts of equal length, by index.

    Args:
        dataset: Its contexts, each in exactly one chunk.
        batch_size: Most contexts in a chunk, >= 1.

    Returns:
        Chunks of ascending context indices, ordered by their first. They depend on the lengths of
        the contexts and on ``batch_size`` alone.
    """
    if batch_size < 1:
        raise ValueError(f"context_batches: batch_size is {batch_size}, wanted at least 1.")
    lengths = np.diff(dataset.offsets)
    chunks = []
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length).astype(np.int64)
        chunks.extend(same[i : i + batch_size] for i in range(0, same.size, batch_size))
    return sorted(chunks, key=lambda chunk: int(chunk[0]))


class _Stretch(NamedTuple):
    document: int
    start: int
    ids: Int32[np.ndarray, " token"]


class _UsedDocument(NamedTuple):
    document: int
    doc_id: str
    title: str
    source: str
    content_hash: str
    n_tokens: int


@dataclass
class _Cutting:
    """Stretches and documents so far."""

    bos_id: int | None
    config: TokenConfig
    stretches: list[_Stretch] = field(default_factory=list)
    documents: dict[str, _UsedDocument] = field(default_factory=dict)

    @property
    def stretch_len(self) -> int:
        """Tokens of a full context, without BOS."""
        return self.config.context_len - (0 if self.bos_id is None else 1)

    @property
    def least(self) -> int:
        """Tokens that a context needs, without BOS."""
        return min(self.stretch_len, self.config.min_visible)

    def take(
        self, encoded: Iterable[tuple[AnyDocument, Int32[np.ndarray, " token"]]]
    ) -> Iterator[int]:
        """Cuts documents until there are enough tokens; yields once per thousand of them."""
        n_taken = 0
        for document, ids in encoded:
            steps_before = n_taken // _PROGRESS_STEP
            n_taken += self._cut(document, ids, self.config.n_tokens - n_taken)
            yield from range(steps_before, n_taken // _PROGRESS_STEP)
            if n_taken >= self.config.n_tokens:
                return

    def _cut(self, document: AnyDocument, ids: Int32[np.ndarray, " token"], n_wanted: int) -> int:
        if document.doc_id in self.documents:
            raise CorpusError(
                f"document id {document.doc_id!r} occurs twice in the corpus; wanted unique ids. "
                "Rename or remove one of the two."
            )
        index = len(self.documents)
        cut = [
            _Stretch(index, start, ids[start : start + self.stretch_len])
            for start in range(0, min(len(ids), n_wanted), self.stretch_len)
        ]
        cut = [stretch for stretch in cut if stretch.ids.size >= self.least]
        n_used = sum(stretch.ids.size for stretch in cut)
        self.stretches.extend(cut)
        self.documents[document.doc_id] = _UsedDocument(
            index, document.doc_id, document.title, document.source, document.content_hash, n_used
        )
        return n_used


def _encoded(
    documents: Iterable[AnyDocument],
    encode: Callable[[list[str]], list[list[int]]],
    bos_id: int | None,
) -> Iterator[tuple[AnyDocument, Int32[np.ndarray, " token"]]]:
    for batch in _batches(documents):
        texts = [document.text for document in batch if isinstance(document, Document)]
        encoded = iter(encode(texts) if texts else ())
        for document in batch:
            if isinstance(document, Document):
                yield document, np.asarray(next(encoded), dtype=np.int32)
            else:
                yield document, _without_bos(document.tokens, bos_id).astype(np.int32)


def _batches(documents: Iterable[AnyDocument]) -> Iterator[list[AnyDocument]]:
    batch: list[AnyDocument] = []
    for document in documents:
        batch.append(document)
        is_full = len(batch) == _BATCH_DOCUMENTS
        if is_full or sum(document.size for document in batch) >= _BATCH_CHARACTERS:
            yield batch
            batch = []
    if batch:
        yield batch


def _without_bos(
    tokens: Integer[np.ndarray, " token"], bos_id: int | None
) -> Integer[np.ndarray, " visible"]:
    has_bos = bos_id is not None and tokens.size > 0 and tokens[0] == bos_id
    return tokens[1:] if has_bos else tokens


def _assemble(
    stretches: list[_Stretch], documents: list[_UsedDocument], bos_id: int | None
) -> TokenDataset:
    bos = np.array([] if bos_id is None else [bos_id], dtype=np.int32)
    lengths = np.array([bos.size + stretch.ids.size for stretch in stretches], dtype=np.int64)
    contexts = pl.DataFrame(
        {
            "context": np.arange(len(stretches), dtype=np.uint32),
            "document": np.array([stretch.document for stretch in stretches], dtype=np.uint32),
            "offset": np.array([stretch.start for stretch in stretches], dtype=np.uint32),
            "n_tokens": lengths.astype(np.uint32),
        }
    )
    return TokenDataset(
        tokens=np.concatenate([part for stretch in stretches for part in (bos, stretch.ids)]),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        contexts=CONTEXTS.conform(contexts),
        documents=DOCUMENTS.conform(
            pl.DataFrame(documents, schema=list(_UsedDocument._fields), orient="row")
        ),
        bos_id=bos_id,
    )
