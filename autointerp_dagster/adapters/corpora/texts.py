"""Text of a file as documents: a text file is one, a line of JSON or a row of Parquet is one."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from autointerp_dagster.adapters.corpora.files import CorpusFile, ends_in, reading, stem_of
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import Document

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_TEXT = (".txt", ".txt.gz", ".txt.zst")
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
TEXT_SUFFIXES = (".parquet", *_TEXT, *_LINES)
"""Files that hold text. ``.json`` is read as one object per line, as many datasets mean it."""

_BOM = codecs.BOM_UTF8.decode("utf-8")
_REMEDY = "Take it out of the corpus."

BUFFER_BYTES = 1 << 20
"""Read at once of a file; a Parquet column is never held whole."""


def text_documents(file: CorpusFile, column: str) -> Iterator[Document]:
    """The documents of one file, in its order. An empty text or a null is an empty document.

    Args:
        file: Its name ends in one of ``TEXT_SUFFIXES``.
        column: Key or column of the text.

    Raises:
        CorpusError: If the file is damaged, holds no document, is not UTF-8, or has no such
            column; names the line or row.
    """
    if ends_in(file.name, (".parquet",)):
        documents = _parquet_documents(file, column)
    elif ends_in(file.name, _LINES):
        documents = _line_documents(file, column)
    else:
        documents = iter([_text_document(file)])
    n_documents = 0
    for document in documents:
        n_documents += 1
        yield document
    if n_documents == 0:
        raise CorpusError(f"{file.where}: the file is empty, wanted text. {_REMEDY}")


def _text_document(file: CorpusFile) -> Document:
    with reading(file, "a text file"), _opened(file) as content:
        whole = content.read()
    text = _decode(whole, file.where).removeprefix(_BOM).replace("\r\n", "\n")
    if not text.strip():
        raise CorpusError(f"{file.where}: the file is empty, wanted text. {_REMEDY}")
    return Document(file.name, text, stem_of(file), file.name.rsplit("/", 1)[-1])


def _line_documents(file: CorpusFile, column: str) -> Iterator[Document]:
    """One document per line, named ``<path>:<line>`` from 1; blank lines are skipped."""
    offset = 0
    for number, line in enumerate(_lines(file), start=1):
        where = f"{file.where}, line {number}"
        content = _decode(line, where, offset)
        content = content.removeprefix(_BOM) if offset == 0 else content
        offset += len(line)
        if content.strip():
            yield _numbered(file, number, _text_of(content, column, where))


def _lines(file: CorpusFile) -> Iterator[bytes]:
    with reading(file, "lines of JSON"), _opened(file) as content:
        yield from content


def _parquet_documents(file: CorpusFile, column: str) -> Iterator[Document]:
    """One document per row, named ``<path>:<row>`` from 0, as the hub numbers them."""
    first = 0
    for values in column_batches(file, column, _is_text, "text"):
        contents = values.cast(pa.large_binary()).to_pylist()
        for row, content in enumerate(contents, start=first):
            yield _numbered(file, row, _decode(content or b"", f"{file.where}, row {row}"))
        first += len(values)


def column_batches(
    file: CorpusFile,
    column: str,
    is_right: Callable[[pa.DataType], bool],
    wanted: str,
    n_rows: int = 64,
) -> Iterator[pa.Array]:
    """The values of one column of a Parquet file, some rows at a time; reads no other column.

    Args:
        file: The file.
        column: Its name, at the top level.
        is_right: Whether a type of value can be used.
        wanted: Such a value, for messages.
        n_rows: Decoded at once.

    Raises:
        CorpusError: If the file is damaged, or has no such column of a right type.
    """
    with reading(file, "a Parquet file"), file.open() as content:
        parquet = pq.ParquetFile(content, buffer_size=BUFFER_BYTES, pre_buffer=False)
        schema = parquet.schema_arrow
        if column not in schema.names:
            raise CorpusError(
                f"{file.where}: columns {schema.names}, wanted {column!r}. Set corpus.column."
            )
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not is_right(kind):
            raise CorpusError(
                f"{file.where}: column {column!r} holds {kind}, wanted {wanted}. Set "
                "corpus.column, or corpus.kind: `files` and `hub` read text, `tokens` token ids."
            )
        for batch in parquet.iter_batches(batch_size=n_rows, columns=[column]):
            values = batch.column(column)
            yield values.cast(kind) if pa.types.is_dictionary(values.type) else values


def _is_text(kind: pa.DataType) -> bool:
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*is_text, *is_bytes))


def _opened(file: CorpusFile) -> BinaryIO:
    """The content, decompressed where the name says that it is compressed."""
    content = file.open()
    for suffix, codec in _CODECS.items():
        if ends_in(file.name, (suffix,)):
            packed = pa.PythonFile(content, mode="r")
            content = pa.CompressedInputStream(packed, codec)
    return cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", content), BUFFER_BYTES))


def _numbered(file: CorpusFile, number: int, text: str) -> Document:
    source = file.name.rsplit("/", 1)[-1]
    return Document(f"{file.name}:{number}", text, f"{stem_of(file)} {number}", source)


def _decode(content: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 text; ``offset`` is where ``content`` starts in its file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: byte {offset + error.start} is {content[error.start]:#04x}, not UTF-8 "
            f"({error.reason}). Convert the file to UTF-8."
        ) from error


def _text_of(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: no JSON ({error}). Wanted one object per line.") from error
    if not isinstance(row, dict) or column not in row:
        got = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise CorpusError(f"{where}: got {got}, wanted a key {column!r}. Set corpus.column.")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise CorpusError(
            f"{where}: {column!r} holds a {type(text).__name__}, wanted text. Set corpus.column."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: {column!r} holds half a surrogate pair at character {error.start}, which is "
            "no text. Repair the line."
        ) from error
    return text
