"""The default explainer: a chat model reads the train windows and writes one description.

Source:
    arXiv 2410.13928, section 3.1; temperature 0 is ours (the paper's figures were made at 0.7).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import DefaultExplainerConfig
from autointerp_dagster.core.explainers.explanation import (
    Explanation,
    failed_explanation,
    skipped_explanation,
)
from autointerp_dagster.core.explainers.spreading import spread_over_quantiles
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import Completion, FreeText, JournalBlock, Request
from autointerp_dagster.core.prompts.explanation import (
    CHAIN_OF_THOUGHT_VERSION,
    EXPLANATION_VERSION,
    MAX_LISTED_TOKENS,
    PROMOTED_VERSION,
    ShownExample,
    explanation_prompt,
)
from autointerp_dagster.core.tokens import Detokenizer

VERSION = f"2.{EXPLANATION_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way windows are shown."""

_ANSWER = FreeText()


@dataclass(frozen=True, slots=True)
class DefaultExplainer:
    """Asks for what the marked tokens and their contexts have in common."""

    name: str
    config: DefaultExplainerConfig

    @property
    def asks_a_model(self) -> bool:
        """True."""
        return True

    @property
    def version(self) -> str:
        """``VERSION``, and that of each option used, so that an option changes only its users'."""
        steps = f".steps{CHAIN_OF_THOUGHT_VERSION}" if self.config.chain_of_thought else ""
        promoted = f".promoted{PROMOTED_VERSION}" if self.config.show_promoted else ""
        return VERSION + steps + promoted

    def request(
        self, record: LatentRecord, detokenizer: Detokenizer, block: JournalBlock
    ) -> Request | None:
        """``n_examples`` train windows over all quantiles, by rank; null where there are none."""
        windows = spread_over_quantiles(record.activating("train"), self.config.n_examples)
        if record.status != "ok" or record.max_activation is None or not windows:
            return None
        examples = [
            shown_example(window, record.max_activation, detokenizer)
            for window in sorted(windows, key=lambda w: w.rank)
        ]
        prompt = explanation_prompt(
            examples,
            self.config.show_activations,
            chain_of_thought=self.config.chain_of_thought,
            promoted=shown_tokens(record.promoted_tokens) if self.config.show_promoted else None,
        )
        return Request(
            messages=prompt.messages,
            answer=_ANSWER,
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
        return answered_explanation(record, self.name, completion)


def answered_explanation(
    record: LatentRecord, explainer: str, completion: Completion | None
) -> Explanation:
    """The description after the marker of a chat model's answer, or why there is none.

    Args:
        record: Any record.
        explainer: The explainer's name in the study.
        completion: Null exactly where the latent could not be asked about.

    Raises:
        ValueError: If the record could be asked about and no completion is given.
    """
    if record.status != "ok":
        return skipped_explanation(record.latent, explainer, record.status)
    if not record.activating("train"):
        return skipped_explanation(record.latent, explainer, "no_train_windows")
    if completion is None:
        raise ValueError(
            f"{record.latent}: explainer {explainer!r} got no completion, wanted the answer "
            "to its request. Ask a model first."
        )
    text = None if completion.reason is not None else _description(completion.text)
    if text is None:
        return failed_explanation(record.latent, explainer, completion)
    return Explanation(record.latent, explainer, text, "ok", None, completion.call_id)


def shown_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """The text of tokens as a prompt lists them: escaped, spaces around them dropped."""
    return tuple(highlight.escape(token.strip(" ") or " ") for token in tokens)


def shown_example(window: Window, max_activation: float, detokenizer: Detokenizer) -> ShownExample:
    """A window as the explainer's model sees it.

    Lists the 10 most active marked tokens, the earlier first where activations tie, in the order
    of the text.

    Args:
        window: An activating window.
        max_activation: The latent's largest activation in the cache.
        detokenizer: Of the subject model.
    """
    pieces, activations = highlight.visible_tokens(
        detokenizer.pieces(window.tokens), window.activations
    )
    marks = highlight.marks_of(activations)
    shown = highlight.display_activations(activations, max_activation)
    marked = np.flatnonzero(marks)
    by_activation_desc = marked[np.argsort(-activations[marked], kind="stable")]
    listed = np.sort(by_activation_desc[:MAX_LISTED_TOKENS])
    tokens = tuple((highlight.escape(pieces[i].strip(" ") or " "), int(shown[i])) for i in listed)
    return ShownExample(highlight.mark_text(pieces, marks), tokens)


def _description(answer: str | None) -> str | None:
    text = _ANSWER.read(answer) if answer is not None else None
    return text if text is not None and any(c.isalnum() for c in text) else None
