"""The floor of all explainers: name the tokens that the latent fires on most. No language model."""

from dataclasses import dataclass

import numpy as np

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import TopTokensExplainerConfig
from autointerp_dagster.core.explainers.explanation import Explanation, skipped_explanation
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import Completion, JournalBlock, Request
from autointerp_dagster.core.tokens import Detokenizer

VERSION = f"1.{highlight.VERSION}"
"""Of this module and of escaping."""


@dataclass(frozen=True, slots=True)
class TopTokensExplainer:
    """Up to 8 tokens by summed activation over the train windows, with their shares of it."""

    name: str
    config: TopTokensExplainerConfig

    @property
    def asks_a_model(self) -> bool:
        """False."""
        return False

    @property
    def version(self) -> str:
        """See ``VERSION``."""
        return VERSION

    def request(
        self, record: LatentRecord, detokenizer: Detokenizer, block: JournalBlock
    ) -> Request | None:
        """Null: no model is needed."""
        del record, detokenizer, block

    def explanation(
        self, record: LatentRecord, detokenizer: Detokenizer, completion: Completion | None
    ) -> Explanation:
        """E.g. ``the tokens " the" (42 %), " a" (13 %)``; tokens are escaped as in windows."""
        del completion
        if record.status != "ok":
            return skipped_explanation(record.latent, self.name, record.status)
        if not record.top_tokens:
            return skipped_explanation(record.latent, self.name, "no_train_windows")
        n = self.config.n_tokens
        listed = [
            f"{quoted_token(token, detokenizer)} ({percent(share)})"
            for token, share in zip(record.top_tokens, record.top_token_shares, strict=True)
        ][:n]
        noun = "the token" if len(listed) == 1 else "the tokens"
        return Explanation(record.latent, self.name, f"{noun} {', '.join(listed)}", "ok", None)


def quoted_token(token: int, detokenizer: Detokenizer) -> str:
    """The escaped text of a token in quotes; its number where it has no text of its own."""
    piece = "".join(detokenizer.pieces(np.array([token])))
    return f'"{highlight.escape(piece)}"' if piece else f"number {token}, part of a character"


def percent(share: float) -> str:
    """A share in [0, 1] in whole per cent, e.g. ``42 %``."""
    return "under 1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %")
