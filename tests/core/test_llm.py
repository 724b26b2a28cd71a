import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.core.llm import (
    Continuation,
    FreeText,
    JournalBlock,
    LabelList,
    LabelReading,
    Message,
    Request,
    Token,
    Usage,
)

REQUEST = Request(
    messages=(Message("user", "which?"),),
    answer=LabelList(2),
    unit="latent 17",
    block=JournalBlock("score_detection", "c0ffee", 0),
)


def label_token(text: str, p_one: float, spelling: str = "{}") -> Token:
    top = tuple((spelling.format(d), math.log(p)) for d, p in (("1", p_one), ("0", 1 - p_one)))
    return Token(text, max(logprob for _, logprob in top), top)


def predictions(answer: LabelList, text: str) -> list[bool] | None:
    readings = answer.read(text, None)
    return None if readings is None else [reading.prediction for reading in readings]


@pytest.mark.parametrize(
    "text",
    [
        "[1, 0, 1]",
        "[1,0,1]",
        "[ 1 , 0 , 1 , ]",
        "```json\n[\n 1,\n 0,\n 1\n]\n```",
        "Text 2 lacks it, see [0]. So: [1, 0, 1].",
        '{"labels": [1, 0, 1]}',
        '["1", "0", "1"]',
        "[true, False, TRUE]",
    ],
)
def test_a_label_list_is_found_in_whatever_stands_around_it(text):
    assert predictions(LabelList(3), text) == [True, False, True]
    assert LabelList(3).fault(text) is None


@pytest.mark.parametrize(
    "text", ["", "1, 0, 1", "[]", "[1, 0, 1", "[1, 2, 0]", "[10, 1, 0]", "[1 0 1]"]
)
def test_an_answer_without_a_label_list_is_faulty(text):
    assert LabelList(3).read(text, None) is None
    assert LabelList(3).fault(text) == "there was no list of zeros and ones"


def test_a_list_of_another_length_is_faulty_and_the_fault_says_so():
    assert LabelList(3).read("[1, 0]", None) is None
    assert LabelList(3).fault("[1, 0]") == "the list had 2 entries instead of 3"


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_what_the_json_schema_allows_is_read_back(labels):
    text = str([int(label) for label in labels])
    assert predictions(LabelList(len(labels)), text) == labels


def test_the_probability_is_that_of_one_among_zero_and_one():
    # P(1) = 0.6, P(0) = 0.2, the rest of the mass is elsewhere: 0.6 / 0.8 = 0.75.
    top = (("1", math.log(0.6)), ("0", math.log(0.2)), ("2", math.log(0.1)))
    tokens = (Token("[", 0.0), Token("1", math.log(0.6), top), Token("]", 0.0))
    assert LabelList(1).read("[1]", tokens) == [LabelReading(True, pytest.approx(0.75))]


def test_spellings_of_a_label_are_summed():
    # " 1" and "1" together 0.6, "0" 0.4.
    top = ((" 1", math.log(0.4)), ("1", math.log(0.2)), ("0", math.log(0.4)))
    tokens = (Token("[", 0.0), Token(" 1", math.log(0.4), top), Token("]", 0.0))
    assert LabelList(1).read("[ 1]", tokens) == [LabelReading(True, pytest.approx(0.6))]


def test_tokens_merged_with_brackets_and_commas_keep_their_probability():
    tokens = (
        label_token("[1", 0.9, "[{}"),
        label_token(", 0", 0.2, ", {}"),
        label_token(",1", 0.7, ",{}"),
        Token("]\n", 0.0),
    )
    readings = LabelList(3).read("[1, 0,1]\n", tokens)
    assert readings is not None
    assert [r.probability for r in readings] == pytest.approx([0.9, 0.2, 0.7])


def test_digits_around_the_list_are_not_taken_for_labels():
    tokens = (
        label_token("1", 0.5),
        Token(". yes [", 0.0),
        label_token("0", 0.1),
        Token(", ", 0.0),
        label_token("1", 0.8),
        Token("] for ", 0.0),
        label_token("1", 0.5),
    )
    readings = LabelList(2).read("1. yes [0, 1] for 1", tokens)
    assert readings is not None
    assert [r.probability for r in readings] == pytest.approx([0.1, 0.8])


def test_a_token_that_holds_two_labels_has_no_probability():
    tokens = (Token("[", 0.0), Token("1,0", -0.1, (("1,0", -0.1),)), Token("]", 0.0))
    readings = LabelList(2).read("[1,0]", tokens)
    assert readings == [LabelReading(True, None), LabelReading(False, None)]


def test_label_tokens_alone_are_enough():
    readings = LabelList(2).read("[1, 0]", (label_token("1", 0.9), label_token("0", 0.3)))
    assert readings is not None
    assert [r.probability for r in readings] == pytest.approx([0.9, 0.3])


def test_no_candidate_that_reads_as_a_label_gives_null_not_zero():
    tokens = (Token("[", 0.0), Token("1", -0.1, (("yes", -0.1),)), Token("]", 0.0))
    assert LabelList(1).read("[1]", tokens) == [LabelReading(True, None)]
    assert LabelList(1).read("[1]", ()) == [LabelReading(True, None)]


@pytest.mark.parametrize("nonsense", [math.nan, math.inf])
@pytest.mark.parametrize("text", ["0", " 1"])
def test_a_label_whose_candidate_is_no_log_probability_has_no_probability(text, nonsense):
    top = (("1", -0.5), ("0", -1.0), (text, nonsense))
    tokens = (Token("[", 0.0), Token("1", -0.5, top), Token("]", 0.0))
    assert LabelList(1).read("[1]", tokens) == [LabelReading(True, None)]
    harmless = (("1", math.log(0.6)), ("0", math.log(0.2)), ("maybe", nonsense))
    tokens = (Token("[", 0.0), Token("1", -0.5, harmless), Token("]", 0.0))
    assert LabelList(1).read("[1]", tokens) == [LabelReading(True, pytest.approx(0.75))]


def test_a_log_probability_above_zero_counts_as_certain_and_none_as_never():
    top = (("1", 800.0), ("0", 0.0), ("0", -math.inf))
    tokens = (Token("[", 0.0), Token("1", 800.0, top), Token("]", 0.0))
    assert LabelList(1).read("[1]", tokens) == [LabelReading(True, 0.5)]


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("[EXPLANATION]: words for rain", "words for rain"),
        ("I see a pattern.\n[EXPLANATION]: words for rain\n", "words for rain"),
        ("[EXPLANATION]: a guess\n[EXPLANATION]: words for rain", "words for rain"),
        ("**[Explanation]:** words for rain", "words for rain"),
        ("**[EXPLANATION]: words for rain**", "words for rain"),
        ("[EXPLANATION]:\nwords for rain\nand more", "words for rain"),
    ],
)
def test_free_text_is_what_follows_the_last_marker(text, explanation):
    assert FreeText().read(text) == explanation
    assert FreeText().fault(text) is None


@pytest.mark.parametrize("text", ["", "words for rain", "[EXPLANATION]:", "EXPLANATION: rain"])
def test_text_without_marker_or_without_words_is_faulty_not_an_explanation(text):
    assert FreeText().read(text) is None
    assert "[EXPLANATION]:" in str(FreeText().fault(text))


@pytest.mark.parametrize(
    "change",
    [
        {"messages": (Message("user", "which one?"),)},
        {"answer": LabelList(3)},
        {"temperature": 0.5},
        {"max_tokens": 1},
        {"top_logprobs": 5},
        {"seed": 0},
        {"attempt": 1},
        {"sample": 1},
    ],
)
def test_everything_that_decides_the_answer_is_in_the_call_id(change):
    assert replace(REQUEST, **change).call_id("m") != REQUEST.call_id("m")
    assert REQUEST.call_id("m") != REQUEST.call_id("other model")


def test_hints_and_places_are_not_in_the_call_id():
    same = replace(REQUEST, unit="u", block=JournalBlock("s", "h", 1), n_shared=1)
    assert same.call_id("m") == REQUEST.call_id("m")


def test_usage_adds_field_by_field():
    assert Usage(1, 2, 3, 0.5) + Usage(10, 20, 30, 0.25) == Usage(11, 22, 33, 0.75)


def test_a_call_keeps_its_address_between_versions():
    """Another address would make every answer that was ever paid for a stranger."""
    chat = Request(
        messages=(Message("system", "s"), Message("user", "u")),
        answer=LabelList(3),
        unit="any",
        block=JournalBlock("any", "any", 0),
        top_logprobs=5,
        seed=7,
    )
    text = replace(chat, messages=(), prompt="p", answer=Continuation(("\n",)))
    assert chat.call_id("model") == "ecd685dfef693fcee5eb50b0559a9035"
    assert text.call_id("model") == "48d24bf853e87a8d23256ca13bd9b0f0"
