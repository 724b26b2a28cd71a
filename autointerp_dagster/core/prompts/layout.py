"""The shape that every prompt shares: a static part first, then the question.

A judge's question is ``Description: ...`` and one numbered line per window. Callers pass text that
is already escaped (``core.highlight``), so a line break is always ours.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from autointerp_dagster.core.llm import Message

DESCRIPTION_LABEL = "Description: "
"""Opens the first line of every question to a judge."""

_NUMBERED = re.compile(r"\d+\.(?: (.*))?")
_SINGLE_WINDOW_TURNS = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (2, 1))
"""(turn, window) of the pool that are asked one by one when a prompt holds a single window."""


class ChatPrompt(NamedTuple):
    """A whole prompt."""

    messages: tuple[Message, ...]
    """System text, worked turns, question."""
    n_shared: int
    """Leading messages that do not depend on the latent."""


class WorkedTurn(NamedTuple):
    """A question with its right answer."""

    description: str
    windows: tuple[str, ...]
    labels: tuple[int, ...]
    """0 or 1 for each window."""


class Question(NamedTuple):
    """What a judge is asked, as :func:`read_question` finds it."""

    explanation: str
    windows: tuple[str, ...]


def judge_prompt(
    system: str,
    worked: Sequence[WorkedTurn],
    explanation: str,
    windows: Sequence[str],
    windows_per_prompt: int,
) -> ChatPrompt:
    """System text, worked turns as long as the study's questions, and the question.

    Args:
        system: What is asked.
        worked: Three turns: mixed labels (a 1, then a 0), all 0, all 1; at least two windows each.
        explanation: One line.
        windows: One line each; fewer than ``windows_per_prompt`` in a latent's last group.
        windows_per_prompt: The study's group size; decides the worked turns, which so stay the
            same for all of its prompts.
    """
    static = [Message("system", system)]
    for turn in _worked_turns(worked, windows_per_prompt):
        static.append(Message("user", question_text(turn.description, turn.windows)))
        static.append(Message("assistant", answer_text(turn.labels)))
    question = Message("user", question_text(explanation, windows))
    return ChatPrompt((*static, question), len(static))


def question_text(explanation: str, windows: Sequence[str]) -> str:
    """The last user turn of a judge's prompt; :func:`read_question` undoes it.

    Raises:
        ValueError: If there is no window, or a part is not one line.
    """
    for part in (explanation, *windows):
        if part.splitlines() not in ([], [part]):
            raise ValueError(f"prompt: got {part!r}, wanted one line. Escape it (core.highlight).")
    if not windows:
        raise ValueError("prompt: got no window, wanted at least one. Leave the prompt out.")
    return f"{DESCRIPTION_LABEL}{explanation}\n{numbered(windows)}"


def numbered(windows: Sequence[str]) -> str:
    """One line per window, ``1. ...``; spaces around a window are dropped."""
    lines = (f"{i}. {window.strip(' ')}".rstrip(" ") for i, window in enumerate(windows, start=1))
    return "\n".join(lines)


def answer_text(labels: Sequence[int]) -> str:
    """The answer that ``llm.LabelList`` reads, e.g. ``[1, 0, 0]``."""
    return json.dumps(list(labels))


def read_question(text: str) -> Question:
    """Explanation and windows of a question, as they were shown (escaped, marked, stripped).

    Args:
        text: Content of the user turn made by :func:`question_text`.

    Raises:
        ValueError: If ``text`` is no such turn.
    """
    first, *lines = text.split("\n")
    windows = [_NUMBERED.fullmatch(line) for line in lines]
    if not first.startswith(DESCRIPTION_LABEL) or not windows or None in windows:
        raise ValueError(
            f"question: got {text!r}, wanted a line {DESCRIPTION_LABEL!r}... and numbered lines. "
            "Pass the content of a judge's last user turn."
        )
    explanation = first.removeprefix(DESCRIPTION_LABEL)
    return Question(explanation, tuple(w[1] or "" for w in windows if w is not None))


def _worked_turns(pool: Sequence[WorkedTurn], windows_per_prompt: int) -> list[WorkedTurn]:
    if windows_per_prompt > 1:
        return [
            WorkedTurn(turn.description, turn.windows[:n], turn.labels[:n])
            for turn in pool
            for n in [min(windows_per_prompt, len(turn.windows))]
        ]
    return [
        WorkedTurn(pool[t].description, (pool[t].windows[w],), (pool[t].labels[w],))
        for t, w in _SINGLE_WINDOW_TURNS
    ]
