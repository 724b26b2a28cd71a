import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.core import highlight, prompts
from autointerp_dagster.core.llm import FreeText, LabelList, Message
from autointerp_dagster.core.prompts import ShownExample

SNAPSHOTS = Path(__file__).parent / "snapshots"
JUDGES = {
    "detection": (prompts.detection_prompt, prompts.DETECTION_VERSION),
    "fuzzing": (prompts.fuzzing_prompt, prompts.FUZZING_VERSION),
}
EXAMPLES = (
    ShownExample("a <<river>> ran", (("river", 9),)),
    ShownExample(" no <<sea>> <<near>>", (("sea", 10), ("near", 3))),
)


def rendered(messages: Sequence[Message]) -> str:
    return "".join(f"--- {message.role}\n{message.content}\n" for message in messages)


def snapshot(name: str) -> str:
    """A changed prompt needs a new version, and so a new file; old ones are deleted."""
    return (SNAPSHOTS / f"{name}.txt").read_text(encoding="utf-8")


def turns(chat: prompts.ChatPrompt) -> list[tuple[prompts.Question, list[int]]]:
    """The worked turns of a judge's prompt."""
    worked = chat.messages[1 : chat.n_shared]
    return [
        (prompts.read_question(worked[i].content), json.loads(worked[i + 1].content))
        for i in range(0, len(worked), 2)
    ]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", JUDGES)
def test_a_judges_prompt_reads_as_in_its_snapshot(name: str, size: int):
    build, version = JUDGES[name]
    windows = ["a river ran", "no sea near", "a dry field", "one pond", "two wells"][:size]
    chat = build("words for water", windows, size)
    assert rendered(chat.messages) == snapshot(f"{name}-v{version}-{size}")


@pytest.mark.parametrize("show_activations", [True, False])
def test_the_explainers_prompt_reads_as_in_its_snapshot(show_activations: bool):
    chat = prompts.explanation_prompt(EXAMPLES, show_activations)
    suffix = "with" if show_activations else "without"
    name = f"explanation-v{prompts.EXPLANATION_VERSION}-{suffix}-activations"
    assert rendered(chat.messages) == snapshot(name)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("name", JUDGES)
def test_worked_turns_are_mixed_then_all_0_then_all_1_and_as_long_as_a_question(name, size):
    mixed, zeros, ones = turns(JUDGES[name][0]("z", ["w"] * size, size))
    n = min(size, 5)
    assert set(mixed[1]) == {0, 1}
    assert (zeros[1], ones[1]) == ([0] * n, [1] * n)
    assert len(mixed[0].windows) == len(mixed[1]) == n


@pytest.mark.parametrize("name", JUDGES)
def test_single_window_questions_have_balanced_single_label_worked_turns(name):
    worked = turns(JUDGES[name][0]("z", ["w"], 1))
    assert [len(question.windows) for question, _ in worked] == [1] * 6
    assert sorted(label for _, labels in worked for label in labels) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", JUDGES)
def test_single_window_prompts_use_the_same_pool(name):
    pool = {
        w for question, _ in turns(JUDGES[name][0]("z", ["w"] * 5, 5)) for w in question.windows
    }
    single = {w for question, _ in turns(JUDGES[name][0]("z", ["w"], 1)) for w in question.windows}
    assert single < pool


@pytest.mark.parametrize("name", JUDGES)
def test_the_static_part_is_compact_for_a_small_judge(name):
    chat = JUDGES[name][0]("z", ["w"], 1)
    characters = sum(len(message.content) for message in chat.messages[: chat.n_shared])
    assert characters < 1700  # 325 and 358 tokens with SmolLM2's chat template


@pytest.mark.parametrize("name", JUDGES)
def test_the_static_part_depends_on_neither_explanation_nor_windows(name):
    build = JUDGES[name][0]
    full, last = build("cats", ["a", "b", "c"], 3), build("dogs", ["d"], 3)
    assert full.n_shared == last.n_shared == len(full.messages) - 1
    assert full.messages[: full.n_shared] == last.messages[: last.n_shared]


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_worked_answers_have_the_format_asked_for(name, size):
    chat = JUDGES[name][0]("z", ["w"] * size, size)
    for message in chat.messages[1 : chat.n_shared]:
        if message.role == "assistant":
            assert LabelList(min(size, 5)).fault(message.content) is None


def test_worked_windows_are_marked_in_fuzzing_and_plain_in_detection():
    for name, is_marked in (("fuzzing", True), ("detection", False)):
        for question, _ in turns(JUDGES[name][0]("z", ["w"] * 5, 5)):
            assert all(bool(highlight.marked_runs(w)) == is_marked for w in question.windows)


def test_worked_explanations_have_the_format_asked_for():
    chat = prompts.explanation_prompt(EXAMPLES, True)
    answers = [m.content for m in chat.messages if m.role == "assistant"]
    assert len(answers) == 3
    assert all(FreeText().fault(answer) is None for answer in answers)


def test_each_prompt_is_known_by_its_system_text():
    assert prompts.asked_for(prompts.detection_prompt("z", ["w"], 1).messages[0].content) == (
        "detection"
    )
    assert prompts.asked_for(prompts.fuzzing_prompt("z", ["w"], 1).messages[0].content) == "fuzzing"
    for show in (True, False):
        system = prompts.explanation_prompt(EXAMPLES, show).messages[0].content
        assert prompts.asked_for(system) == "explanation"
    assert prompts.asked_for("You are a helpful assistant.") is None


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_a_question_is_read_back_as_it_was_asked(explanation, texts):
    shown = highlight.shown_explanation(explanation)
    windows = tuple(highlight.escape(text).strip(" ") for text in texts)
    chat = prompts.detection_prompt(shown, windows, 5)
    assert prompts.read_question(chat.messages[-1].content) == (shown, windows)


def test_examples_are_read_back_without_their_activations():
    for show in (True, False):
        chat = prompts.explanation_prompt(EXAMPLES, show)
        read = prompts.read_examples(chat.messages[-1].content)
        assert read == ("a <<river>> ran", "no <<sea>> <<near>>")


@pytest.mark.parametrize("text", ["hello", "Description: z", "Description: z\nno number", ""])
def test_other_text_is_not_read_as_a_question(text):
    with pytest.raises(ValueError, match="wanted a line"):
        prompts.read_question(text)


@pytest.mark.parametrize("part", ["two\nlines", "carriage\rreturn", "separator\u2028here", "end\n"])
def test_text_that_was_not_escaped_is_refused(part):
    with pytest.raises(ValueError, match="wanted one line"):
        prompts.detection_prompt("z", [part], 1)
    with pytest.raises(ValueError, match="wanted one line"):
        prompts.fuzzing_prompt(part, ["w"], 1)


def test_a_prompt_without_windows_is_refused():
    with pytest.raises(ValueError, match="wanted at least one"):
        prompts.detection_prompt("z", [], 5)


def test_the_labels_of_the_prompts_are_escaped_where_text_imitates_them():
    for label in (prompts.DESCRIPTION_LABEL, "Activations: "):
        assert highlight.escape(f"\n{label}x") == f"\\n{label.replace(': ', '')}\\: x"
    assert FreeText().marker not in highlight.escape(f"\n{FreeText().marker} cats")
