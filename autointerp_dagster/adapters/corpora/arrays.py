"""Token ids in files as documents: a row is one, or what stands between two separators."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Integer
from safetensors import SafetensorError, safe_open

from autointerp_dagster.adapters.corpora.files import CorpusFile, ends_in, reading, stem_of
from autointerp_dagster.adapters.corpora.texts import column_batches
from autointerp_dagster.core.config import TokensCorpusConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import TokenisedDocument

TOKEN_SUFFIXES = (".npy", ".safetensors", ".parquet")
"""Files that can hold token ids."""

_BLOCK = 1 << 20  # tokens of an array that are in memory at once

_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})  # of safetensors

Tokens = Integer[np.ndarray, " token"]


class _Row(NamedTuple):
    place: tuple[int, ...]
    """Of a document in its file."""
    tokens: Tokens


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    is_integer: bool
    content: Any
    """Read from disk when it is sliced."""


def tokenised_documents(
    file: CorpusFile, config: TokensCorpusConfig
) -> Iterator[TokenisedDocument]:
    """The documents of one file, in its order.

    A row is one document ``<path>:<row>``; with a separator each stretch between two is one,
    ``<path>:<row>:<position>``, ``<path>:<position>`` in a flat array. Nothing between two
    separators is no document.

    Args:
        file: Its name ends in one of ``TOKEN_SUFFIXES``.
        config: Column, separator, padding.

    Raises:
        CorpusError: If the file is damaged, holds Python objects or no integers, has no such
            column, or is flat and no separator is given.
    """
    if ends_in(file.name, (".parquet",)):
        rows = _parquet_rows(file, config)
    else:
        rows = _array_rows(file, _array_of(file, config), config)
    n_documents = 0
    for place, tokens in rows:
        n_documents += 1
        name = ":".join(map(str, (file.name, *place)))
        title = " ".join(map(str, (stem_of(file), *place)))
        yield TokenisedDocument(name, tokens, title, file.name.rsplit("/", 1)[-1])
    if n_documents == 0:
        raise CorpusError(
            f"{file.where}: the file is empty, wanted token ids. Take it out of the corpus."
        )


def _parquet_rows(file: CorpusFile, config: TokensCorpusConfig) -> Iterator[_Row]:
    batches = column_batches(file, config.column, _holds_tokens, "lists of token ids", n_rows=1024)
    first_row = 0
    for values in batches:
        if pa.types.is_integer(values.type):
            blocks = (_ids_of(file, ids) for ids in chain([values], batches))
            yield from _stretches_of(file, blocks, config)
            return
        for row, ids in enumerate(values, start=first_row):
            tokens = np.zeros(0, np.int64) if ids.values is None else _ids_of(file, ids.values)
            yield from _documents_of(_Row((row,), tokens), config)
        first_row += len(values)


def _holds_tokens(kind: pa.DataType) -> bool:
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_kind(kind) for is_kind in is_list):
        kind = kind.value_type
    return pa.types.is_integer(kind)


def _ids_of(file: CorpusFile, ids: pa.Array) -> Tokens:
    if ids.null_count:
        raise CorpusError(
            f"{file.where}: a token is null, wanted an id. Take the file out of the corpus."
        )
    return ids.to_numpy(zero_copy_only=False)


def _array_of(file: CorpusFile, config: TokensCorpusConfig) -> _Array:
    if ends_in(file.name, (".npy",)):
        with reading(file, "an array of numbers (Python objects are never read)"):
            array = np.load(file.path(), mmap_mode="r", allow_pickle=False)
        is_integer = np.issubdtype(array.dtype, np.integer)
        return _Array(array.shape, str(array.dtype), is_integer, array)
    with reading(file, "a safetensors file"):
        try:
            tensors = safe_open(file.path(), framework="np")
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        names = list(tensors.keys())
        name = names[0] if len(names) == 1 else config.column
        if name not in names:
            raise CorpusError(f"{file.where}: tensors {names}, wanted {name!r}. Set corpus.column.")
        tensor = tensors.get_slice(name)
        dtype = tensor.get_dtype()
        return _Array(tuple(tensor.get_shape()), dtype, dtype in _INTEGERS, tensor)


def _array_rows(file: CorpusFile, array: _Array, config: TokensCorpusConfig) -> Iterator[_Row]:
    if not array.is_integer:
        raise CorpusError(
            f"{file.where}: holds {array.dtype}, wanted integers: token ids. Store them as such."
        )
    if len(array.shape) == 1:
        yield from _stretches_of(file, _blocks(array, _BLOCK), config)
    elif len(array.shape) == 2:
        blocks = _blocks(array, max(_BLOCK // max(array.shape[1], 1), 1))
        for row, tokens in enumerate(chain.from_iterable(blocks)):
            yield from _documents_of(_Row((row,), tokens), config)
    else:
        raise CorpusError(
            f"{file.where}: an array of shape {array.shape}, wanted (document, token), or a flat "
            "one with corpus.separator. Reshape it."
        )


def _blocks(array: _Array, n_rows: int) -> Iterator[np.ndarray]:
    for start in range(0, array.shape[0], n_rows):
        yield np.asarray(array.content[start : min(start + n_rows, array.shape[0])])


def _documents_of(row: _Row, config: TokensCorpusConfig) -> Iterator[_Row]:
    tokens = row.tokens
    if config.padding is not None:
        held = np.flatnonzero(tokens != config.padding)
        tokens = tokens[: held[-1] + 1] if held.size else tokens[:0]
    if config.separator is None:
        yield _Row(row.place, tokens)
        return
    for start, stretch in _stretches([tokens], config.separator):
        yield _Row((*row.place, start), stretch)


def _stretches_of(
    file: CorpusFile, blocks: Iterable[Tokens], config: TokensCorpusConfig
) -> Iterator[_Row]:
    if config.separator is None:
        raise CorpusError(
            f"{file.where}: a flat array, in which no document can be told from the next. Set "
            "corpus.separator to the token between two documents, or store one document per row."
        )
    for start, stretch in _stretches(blocks, config.separator):
        yield _Row((start,), stretch)


def _stretches(blocks: Iterable[Tokens], separator: int) -> Iterator[tuple[int, Tokens]]:
    """What stands between separators, with its place; blocks follow each other without a gap."""
    held: list[Tokens] = []  # of a stretch that goes on in the next block
    start = offset = 0
    for block in blocks:
        done = 0
        for place in np.flatnonzero(block == separator).tolist():
            held.append(block[done:place])
            yield from _whole(start, held)
            held, done, start = [], place + 1, offset + place + 1
        held.append(block[done:])
        offset += len(block)
    yield from _whole(start, held)


def _whole(start: int, parts: list[Tokens]) -> Iterator[tuple[int, Tokens]]:
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, int)
    if tokens.size:
        yield start, tokens
