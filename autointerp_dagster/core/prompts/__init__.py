"""Every prompt as text, in one place, each with a version that changes with its wording."""

from typing import Literal

from autointerp_dagster.core.prompts.detection import (
    DETECTION_SYSTEM,
    DETECTION_VERSION,
    detection_prompt,
)
from autointerp_dagster.core.prompts.explanation import (
    EXPLANATION_TASK,
    EXPLANATION_VERSION,
    MAX_LISTED_TOKENS,
    ShownExample,
    explanation_prompt,
    read_examples,
)
from autointerp_dagster.core.prompts.fuzzing import FUZZING_SYSTEM, FUZZING_VERSION, fuzzing_prompt
from autointerp_dagster.core.prompts.layout import (
    DESCRIPTION_LABEL,
    ChatPrompt,
    Question,
    read_question,
)

__all__ = [
    "DESCRIPTION_LABEL",
    "DETECTION_VERSION",
    "EXPLANATION_VERSION",
    "FUZZING_VERSION",
    "MAX_LISTED_TOKENS",
    "ChatPrompt",
    "Question",
    "ShownExample",
    "asked_for",
    "detection_prompt",
    "explanation_prompt",
    "fuzzing_prompt",
    "read_examples",
    "read_question",
]


def asked_for(system: str) -> Literal["detection", "fuzzing", "explanation"] | None:
    """Which of this package's prompts a chat is, by its system text; null for any other chat."""
    if system == DETECTION_SYSTEM:
        return "detection"
    if system == FUZZING_SYSTEM:
        return "fuzzing"
    return "explanation" if system.startswith(EXPLANATION_TASK) else None
