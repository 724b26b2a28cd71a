"""The contrastive explainer: what do activating windows have that silent ones lack?

Source:
    arXiv 2410.13928, section 3.1.
"""

from dataclasses import dataclass

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import ContrastiveExplainerConfig
from autointerp_dagster.core.explainers.default import answered_explanation, shown_example
from autointerp_dagster.core.explainers.explanation import Explanation, skipped_explanation
from autointerp_dagster.core.explainers.spreading import spread_over_quantiles
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import Completion, FreeText, JournalBlock, Request
from autointerp_dagster.core.prompts.contrastive import CONTRASTIVE_VERSION, contrastive_prompt
from autointerp_dagster.core.prompts.explanation import EXPLANATION_VERSION
from autointerp_dagster.core.tokens import Detokenizer

VERSION = f"2.{CONTRASTIVE_VERSION}.{EXPLANATION_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way windows are shown."""


@dataclass(frozen=True, slots=True)
class ContrastiveExplainer:
    """Shows activating train windows of all quantiles and silent ones, under two headings.

    Where there are fewer windows of a kind than asked for, there are fewer in the prompt. Without
    a silent train window there is no contrast, and without an activating one no question: the
    latent is skipped with ``no_train_windows``, never explained as by ``default``.
    """

    name: str
    config: ContrastiveExplainerConfig

    @property
    def asks_a_model(self) -> bool:
        """True."""
        return True

    @property
    def version(self) -> str:
        """See ``VERSION``."""
        return VERSION

    def request(
        self, record: LatentRecord, detokenizer: Detokenizer, block: JournalBlock
    ) -> Request | None:
        """The question, strongest quantile first; null where a kind of window is missing."""
        if record.status != "ok" or record.max_activation is None or not _has_contrast(record):
            return None
        activating = [
            shown_example(window, record.max_activation, detokenizer)
            for window in spread_over_quantiles(record.activating("train"), self.config.n_examples)
        ]
        ranked = sorted(record.non_activating("train"), key=lambda w: (w.rank, w.window_id))
        by_id = {window.window_id: window for window in ranked[::-1]}  # some are of two kinds
        silent = [window for window in ranked if by_id[window.window_id] is window]
        plain = [
            highlight.escape("".join(detokenizer.pieces(window.tokens)))
            for window in silent[: self.config.n_silent]
        ]
        prompt = contrastive_prompt(activating, plain, self.config.show_activations)
        return Request(
            messages=prompt.messages,
            answer=FreeText(),
            unit=f"{record.latent}/{self.name}",
            block=block,
            n_shared=prompt.n_shared,
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )

    def explanation(
        self, record: LatentRecord, detokenizer: Detokenizer, completion: Completion | None
    ) -> Explanation:
        """The description after the marker, or the reason why there is none.

        Raises:
            ValueError: If the record could be asked about and no completion is given.
        """
        del detokenizer
        if record.status == "ok" and not _has_contrast(record):
            return skipped_explanation(record.latent, self.name, "no_train_windows")
        return answered_explanation(record, self.name, completion)


def _has_contrast(record: LatentRecord) -> bool:
    return bool(record.activating("train")) and bool(record.non_activating("train"))
