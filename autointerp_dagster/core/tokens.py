"""The token dataset: documents cut into contexts that the subject model sees."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl
from jaxtyping import Int, Int32, Int64


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


class Detokenizer(Protocol):
    """Turns token ids back into the pieces of text they stand for."""

    def pieces(self, tokens: Int[np.ndarray, " position"]) -> list[str]:
        """One string per token; joined they are the text.

        A character whose bytes are spread over several tokens stands whole at the last of them;
        the others are empty strings.
        """
        ...
