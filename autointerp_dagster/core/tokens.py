"""The token dataset: documents cut into contexts that the subject model sees.

1. Documents are tokenised in corpus order, each alone, without special tokens.
2. A document is cut from its start into stretches; a stretch with BOS before it is a context. No
   context holds text of two documents, and BOS stays at position 0 of the model's input.
3. The corpus is left as soon as enough tokens are used, at the end of a context, so that a larger
   number of tokens only appends.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Int, Int32, Int64

from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS

_ENCODE_BATCH = 64  # documents tokenised at once


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus."""

    doc_id: str
    """Unique in the corpus and stable, e.g. a path."""
    text: str
    title: str = ""
    source: str = ""


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
        """Tokens used of each source, BOS not counted; by name."""
        totals = self.documents.group_by("source").agg(pl.col("n_tokens").sum()).sort("source")
        return {source: int(n_tokens) for source, n_tokens in totals.iter_rows()}


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


def build_token_dataset(
    documents: Iterable[Document],
    encode: Callable[[list[str]], list[list[int]]],
    bos_id: int | None,
    config: TokenConfig,
) -> TokenDataset:
    """Cut documents into contexts until ``config.n_tokens`` tokens are used, BOS not counted.

    Args:
        documents: In corpus order; read no further than needed, 64 at a time.
        encode: Token ids of each text, without special tokens.
        bos_id: Put before every context; null if the tokenizer has none. 0 is a real token.
        config: Whole contexts are taken, so up to one context more than ``n_tokens`` is used. A
            full context is kept even where BOS leaves it fewer than ``min_visible`` tokens.

    Returns:
        Contexts in document order. Every document read has a row, with ``n_tokens`` 0 if it is too
        short for a context. With a larger ``n_tokens`` contexts and documents are only appended,
        except that ``n_tokens`` of the last document may grow.

    Raises:
        CorpusError: If two documents share an id, or no document holds a context.
    """
    stretch_len = config.context_len - (0 if bos_id is None else 1)
    least = min(stretch_len, config.min_visible)
    documents_seen: dict[str, _UsedDocument] = {}
    stretches: list[_Stretch] = []
    n_left = config.n_tokens
    for document, ids in _encoded(documents, encode):
        if document.doc_id in documents_seen:
            raise CorpusError(
                f"document id {document.doc_id!r} occurs twice in the corpus; wanted unique ids. "
                "Rename or remove one of the two."
            )
        index = len(documents_seen)
        cut = [
            _Stretch(index, start, ids[start : start + stretch_len])
            for start in range(0, min(len(ids), n_left), stretch_len)
        ]
        cut = [s for s in cut if s.ids.size >= least]
        stretches.extend(cut)
        n_used = sum(s.ids.size for s in cut)
        documents_seen[document.doc_id] = _UsedDocument.of(index, document, n_used)
        n_left -= n_used
        if n_left <= 0:
            break
    if not stretches:
        raise CorpusError(
            f"corpus: {len(documents_seen)} documents, none with {least} tokens, the least "
            "that a context needs. Add longer texts or lower tokens.min_visible."
        )
    return _assemble(stretches, list(documents_seen.values()), bos_id)


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

    @classmethod
    def of(cls, index: int, document: Document, n_tokens: int) -> "_UsedDocument":
        return cls(
            index,
            document.doc_id,
            document.title,
            document.source,
            content_hash(document.text),
            n_tokens,
        )


def _encoded(
    documents: Iterable[Document], encode: Callable[[list[str]], list[list[int]]]
) -> Iterator[tuple[Document, Int32[np.ndarray, " token"]]]:
    remaining = iter(documents)
    while batch := list(islice(remaining, _ENCODE_BATCH)):
        encoded = encode([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            yield document, np.asarray(ids, dtype=np.int32)


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
