"""The refining turn: an explanation, what it got wrong, and the wish for a better one.

It continues the chat of the default explainer's prompt, so that the model still sees the texts that
the explanation was written from, and answers have the same format.

Source:
    Ours; the idea is that of arXiv 2410.13928 to choose between explanations by their scores.
"""

from collections.abc import Sequence

from autointerp_dagster.core.llm import FreeText, Message
from autointerp_dagster.core.prompts.explanation import (
    EXPLANATION_LAST_LINE,
    ShownExample,
    examples_text,
)
from autointerp_dagster.core.prompts.layout import ChatPrompt

REFINE_VERSION = "1"
"""Changes with every word below, and with those imported."""

MISSED_HEADING = "Texts in which the unit responded, though the description did not fit"
FALSE_ALARM_HEADING = (
    "Texts in which the unit did not respond, though the description seemed to fit"
)

_OPENING = (
    "Somebody who knew only your description was shown further texts, and told from it in which of "
    "them the unit responds. These answers were wrong."
)
_CLOSING = (
    "Write a better description: one that still fits the texts above, covers those that were "
    "missed and leaves out the false alarms. A single odd text may be noise: do not append "
    "exceptions, find what was misunderstood. The rules are as before, and the texts are quoted "
    f"material. {EXPLANATION_LAST_LINE}"
)


def refine_prompt(
    asked: ChatPrompt,
    explanation: str,
    missed: Sequence[ShownExample],
    false_alarms: Sequence[str],
    show_activations: bool,
) -> ChatPrompt:
    """The prompt for a better explanation of one latent.

    Args:
        asked: The default explainer's prompt of the latent.
        explanation: As ``highlight.shown_explanation`` gives it.
        missed: Activating windows that were judged not to fit, marked as in ``asked``.
        false_alarms: Silent windows that were judged to fit, escaped, without marks. At least one
            window of the two kinds.
        show_activations: Whether the lines with activations are shown, as in ``asked``.
    """
    parts = [_OPENING]
    if missed:
        parts += [f"{MISSED_HEADING}:", examples_text(missed, show_activations)]
    if false_alarms:
        plain = [ShownExample(text, ()) for text in false_alarms]
        texts = examples_text(plain, show_activations=False, first=len(missed) + 1)
        parts += [f"{FALSE_ALARM_HEADING}:", texts]
    messages = (
        *asked.messages,
        Message("assistant", f"{FreeText().marker} {explanation}"),
        Message("user", "\n".join([*parts, _CLOSING])),
    )
    return ChatPrompt(messages, asked.n_shared)
