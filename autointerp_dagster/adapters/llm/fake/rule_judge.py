"""Ideal judges and explainers for :class:`~.server.FakeLLMServer`."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from autointerp_dagster.adapters.llm.fake.faults import uniform
from autointerp_dagster.adapters.llm.fake.odd_one_out import odd_one_out
from autointerp_dagster.core.highlight import marked_runs, unescape, without_marks
from autointerp_dagster.core.llm import FreeText
from autointerp_dagster.core.prompts import (
    DESCRIPTION_LABEL,
    asked_for,
    read_examples,
    read_question,
)
from autointerp_dagster.core.prompts.contrastive import ACTIVATING_HEADING
from autointerp_dagster.core.prompts.intruder import INTRUDER_SYSTEM, read_intruder_question
from autointerp_dagster.core.prompts.simulation import HIGHEST, SIMULATION_SYSTEM, read_tokens

ChatMessages = list[dict[str, str]]
Predicate = Callable[[str], bool]

N_NAMED = 3
"""Words that :func:`word_judge` names in an explanation."""

_EXAMPLES = ("1.", ACTIVATING_HEADING)
"""What opens a question for an explanation; a request to refine one comes after such a turn."""

_QUOTED = re.compile(r'"([^"]+)"')


def rule_judge(rules: Mapping[str, Predicate]) -> Callable[[ChatMessages], str]:
    """An answer function that knows what each explanation means.

    Args:
        rules: From the text of an explanation to a predicate over plain text. Detection asks it
            of whole windows, fuzzing of each marked run (all must hold). An explanation without
            a rule is taken to describe nothing. Simulation asks it of each token alone,
            and the intruder is the only window of which a rule does not hold.

    Returns:
        A function from a chat of this package's prompts to the right answer: a JSON list of
        labels or activations, the intruder's number, or the explanation that holds for most of the
        marked runs shown.
    """

    def answer(messages: ChatMessages) -> str:
        if messages[0]["content"] == INTRUDER_SYSTEM:
            windows = read_intruder_question(_last_user(messages, "1."))
            return odd_one_out(windows, rules.values())
        if messages[0]["content"] == SIMULATION_SYSTEM:
            explanation, tokens = read_tokens(_last_user(messages, DESCRIPTION_LABEL))
            return _simulated(rules.get(unescape(explanation), _never), tokens)
        if asked_for(messages[0]["content"]) == "explanation":
            runs = _shown_runs(_last_user(messages, *_EXAMPLES))
            return _said(max(rules, key=lambda explanation: sum(map(rules[explanation], runs))))
        question = read_question(_last_user(messages, DESCRIPTION_LABEL))
        labels = judge_windows(rules, question.explanation, question.windows)
        return json.dumps([int(label) for label in labels])

    return answer


def word_judge(seed: int) -> Callable[[ChatMessages], str]:
    """An answer function for any study: it takes an explanation at its quoted words.

    Asked to explain, it quotes the words that are marked most often. A window fits an explanation
    if a quoted word stands in it; where nothing is quoted, labels are drawn by ``seed``. Any other
    chat gets a sentence.
    """

    def answer(messages: ChatMessages) -> str:
        if messages[0]["content"] == INTRUDER_SYSTEM:
            windows = read_intruder_question(_last_user(messages, "1."))
            return odd_one_out(windows)
        if messages[0]["content"] == SIMULATION_SYSTEM:
            explanation, tokens = read_tokens(_last_user(messages, DESCRIPTION_LABEL))
            return _simulated(_word_rule(unescape(explanation), seed), tokens)
        asked = asked_for(messages[0]["content"])
        if asked is None:
            return "This is a fake language model."
        if asked == "explanation":
            words = Counter(
                run.strip().lower() for run in _shown_runs(_last_user(messages, *_EXAMPLES))
            )
            named = " or ".join(json.dumps(word) for word, _ in words.most_common(N_NAMED))
            return _said(f"the words {named}")
        question = read_question(_last_user(messages, DESCRIPTION_LABEL))
        rule = _word_rule(unescape(question.explanation), seed)
        labels = judge_windows({unescape(question.explanation): rule}, *question)
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


def _word_rule(explanation: str, seed: int) -> Predicate:
    words = [word.lower() for word in _QUOTED.findall(explanation)]
    if not words:
        return lambda text: uniform(f"{seed}/{explanation}/{text}") < 0.5
    return lambda text: any(word in text.lower() for word in words)


def _simulated(rule: Predicate, tokens: Sequence[str]) -> str:
    return json.dumps([HIGHEST if rule(unescape(token)) else 0 for token in tokens])


def _never(_: str) -> bool:
    return False


def _said(explanation: str) -> str:
    return f"{FreeText().marker} {explanation}"


def _shown_runs(text: str) -> list[str]:
    return [unescape(run) for window in read_examples(text) for run in marked_runs(window)]


def _last_user(messages: ChatMessages, *starts: str) -> str:
    """The last user turn with such a start; repeats add turns after the question."""
    return next(
        message["content"]
        for message in reversed(messages)
        if message["role"] == "user" and message["content"].startswith(starts)
    )
