"""An ideal judge and explainer for :class:`~.fake_server.FakeLLMServer`: it follows given rules."""

import json
from collections.abc import Callable, Mapping, Sequence

from autointerp_dagster.core.highlight import marked_runs, unescape, without_marks
from autointerp_dagster.core.llm import FreeText
from autointerp_dagster.core.prompts import (
    DESCRIPTION_LABEL,
    asked_for,
    read_examples,
    read_question,
)

ChatMessages = list[dict[str, str]]
Predicate = Callable[[str], bool]


def rule_judge(rules: Mapping[str, Predicate]) -> Callable[[ChatMessages], str]:
    """An answer function that knows what each explanation means.

    Args:
        rules: From the text of an explanation to a predicate over plain text. Detection asks it
            of whole windows, fuzzing of each marked run (all must hold). An explanation without
            a rule is taken to describe nothing.

    Returns:
        A function from a chat of this package's prompts to the right answer: a JSON list of
        labels, or the explanation that holds for most of the marked runs shown.
    """

    def answer(messages: ChatMessages) -> str:
        system = messages[0]["content"]
        if asked_for(system) == "explanation":
            return _explain(rules, _last_user(messages, "1."))
        question = read_question(_last_user(messages, DESCRIPTION_LABEL))
        labels = judge_windows(rules, question.explanation, question.windows)
        return json.dumps([int(label) for label in labels])

    return answer


def judge_windows(
    rules: Mapping[str, Predicate], explanation: str, windows: Sequence[str]
) -> list[bool]:
    """Whether each window, as shown in a prompt, fits the explanation."""
    rule = rules.get(unescape(explanation))
    if rule is None:
        return [False] * len(windows)
    return [
        all(rule(unescape(run)) for run in runs) if runs else rule(unescape(without_marks(window)))
        for window in windows
        for runs in [marked_runs(window)]
    ]


def _explain(rules: Mapping[str, Predicate], text: str) -> str:
    runs = [unescape(run) for window in read_examples(text) for run in marked_runs(window)]
    best = max(rules, key=lambda explanation: sum(map(rules[explanation], runs)))
    return f"{FreeText().marker} {best}"


def _last_user(messages: ChatMessages, start: str) -> str:
    """The last user turn that starts with ``start``; repeats add turns after the question."""
    return next(
        message["content"]
        for message in reversed(messages)
        if message["role"] == "user" and message["content"].startswith(start)
    )
