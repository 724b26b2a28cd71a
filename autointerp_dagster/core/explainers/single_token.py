"""The single-token explainer: where one token carries a latent, a template says so.

Otherwise the latent is explained by the default explainer, with the same question and so the same
calls.
"""

from dataclasses import dataclass

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import DefaultExplainerConfig, SingleTokenExplainerConfig
from autointerp_dagster.core.explainers import default
from autointerp_dagster.core.explainers.default import DefaultExplainer
from autointerp_dagster.core.explainers.explanation import Explanation
from autointerp_dagster.core.explainers.top_tokens import percent, quoted_token
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import Completion, JournalBlock, Request
from autointerp_dagster.core.tokens import Detokenizer

VERSION = f"1.{highlight.VERSION}.{default.VERSION}"
"""Of the template, of escaping and of the default explainer."""


@dataclass(frozen=True, slots=True)
class SingleTokenExplainer:
    """A template from a share of ``min_share`` on, the default explainer below it."""

    name: str
    config: SingleTokenExplainerConfig

    @property
    def asks_a_model(self) -> bool:
        """True, for latents that no single token carries."""
        return True

    @property
    def version(self) -> str:
        """See ``VERSION``."""
        return VERSION

    def request(
        self, record: LatentRecord, detokenizer: Detokenizer, block: JournalBlock
    ) -> Request | None:
        """The default explainer's question; null where the template says it."""
        if self._is_carried(record):
            return None
        return self._default().request(record, detokenizer, block)

    def explanation(
        self, record: LatentRecord, detokenizer: Detokenizer, completion: Completion | None
    ) -> Explanation:
        """E.g. ``the token " the" (93 % of the activation over 120 texts)``, or as ``default``.

        The share is the token's of the summed activation over all train windows; the texts are
        these windows.

        Raises:
            ValueError: If the record had to be asked about and no completion is given.
        """
        if not self._is_carried(record):
            return self._default().explanation(record, detokenizer, completion)
        token = quoted_token(record.top_tokens[0], detokenizer)
        share = percent(record.top_token_shares[0])
        n = len(record.activating("train")) if record.n_train is None else record.n_train
        texts = "1 text" if n == 1 else f"{n} texts"
        text = f"the token {token} ({share} of the activation over {texts})"
        return Explanation(record.latent, self.name, text, "ok", None)

    def _is_carried(self, record: LatentRecord) -> bool:
        has_top_token = record.status == "ok" and bool(record.top_token_shares)
        return has_top_token and record.top_token_shares[0] >= self.config.min_share

    def _default(self) -> DefaultExplainer:
        shared = {
            name: getattr(self.config, name)
            for name in ("n_examples", "show_activations", "temperature", "max_tokens")
        }
        return DefaultExplainer(self.name, DefaultExplainerConfig(kind="default", **shared))
