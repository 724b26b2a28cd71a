"""What the science asks of a language model, and what it gets back.

Scorers and explainers build :class:`Request` objects and read :class:`Completion` objects; somebody
else sends them, so batching, retries, the journal and the budget live once.
"""

from autointerp_dagster.core.llm.answers import (
    Answer,
    Choice,
    Continuation,
    FreeText,
    IntegerList,
    LabelList,
    LabelReading,
    PromptScores,
    Token,
)
from autointerp_dagster.core.llm.asking import (
    LLM,
    Completion,
    JournalBlock,
    Message,
    Request,
    Usage,
    estimated_tokens,
)

__all__ = [
    "LLM",
    "Answer",
    "Choice",
    "Completion",
    "Continuation",
    "FreeText",
    "IntegerList",
    "JournalBlock",
    "LabelList",
    "LabelReading",
    "Message",
    "PromptScores",
    "Request",
    "Token",
    "Usage",
    "estimated_tokens",
]
