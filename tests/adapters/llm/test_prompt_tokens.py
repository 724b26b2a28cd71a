import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.adapters.llm.remote.prompt_tokens import looks_shifted, prompt_tokens
from autointerp_dagster.core.llm import Token


def scores_of(texts, first=None):
    return {"tokens": texts, "token_logprobs": [first, *(-float(i) for i in range(1, len(texts)))]}


def texts_of(tokens):
    return [token.text for token in tokens]


def test_offsets_are_found_in_the_text_whatever_the_server_says_of_them():
    reported = scores_of(["The", " cat", " sat", "."])
    for offsets in ([-1, -1, -1, -1], [17, 20, 24, 28], None):  # SGLang; vLLM with a BOS token
        tokens = prompt_tokens(reported | {"text_offset": offsets}, "The cat sat", 5)
        assert tokens == (Token(" cat", -1.0), Token(" sat", -2.0))


def test_a_token_counts_if_it_ends_after_the_start():
    reported = scores_of(["The", " cat", " sat"])
    assert texts_of(prompt_tokens(reported, "The cat sat", 6)) == [" cat", " sat"]
    assert texts_of(prompt_tokens(reported, "The cat sat", 7)) == [" sat"]
    assert prompt_tokens(reported, "The cat sat", 11) is None


def test_a_beginning_of_sequence_token_has_no_place_of_its_own():
    reported = scores_of(["<s>", "The", " cat", " end"])
    assert texts_of(prompt_tokens(reported, "The cat", 2)) == ["The", " cat"]


def test_a_special_token_that_is_written_in_the_prompt_may_be_left_away_or_empty():
    prompt = "<|im_start|>A B"
    assert texts_of(prompt_tokens(scores_of(["A", " B", " C"]), prompt, 13)) == [" B"]
    assert texts_of(prompt_tokens(scores_of(["", "A", " B", " C"]), prompt, 12)) == ["A", " B"]


@pytest.mark.parametrize("part", ["", "\ufffd"])
def test_parts_of_a_character_end_where_the_next_token_starts(part):
    prompt = "a 😀 b"
    reported = scores_of(["a", " ", part, part, " b", " c"])
    assert texts_of(prompt_tokens(reported, prompt, 2)) == [part, part, " b"]
    assert texts_of(prompt_tokens(reported, prompt, 3)) == [" b"]


def test_what_was_written_behind_a_cut_character_is_not_of_the_prompt():
    prompt = "a 😀"
    reported = scores_of(["a", " ", "\ufffd", "\ufffd", "\ufffd"])
    assert len(prompt_tokens(reported, prompt, 2, n_written=1)) == 2
    # llama_cpp.server lists no token where the model ended at once.
    assert len(prompt_tokens(reported, prompt, 2, n_written=0)) == 3


def test_sentencepiece_tokens_may_lack_their_space():
    assert texts_of(prompt_tokens(scores_of(["The", "cat", "sat"]), "The cat sat", 3)) == [
        "cat",
        "sat",
    ]


def test_a_prompt_token_without_a_score_is_no_answer():
    reported = {"tokens": ["The", " cat", " sat"], "token_logprobs": [None, None, -1.0]}
    assert prompt_tokens(reported, "The cat sat", 2) is None


def test_candidates_are_kept_in_order_of_probability():
    reported = scores_of(["A", " B"]) | {"top_logprobs": [None, {" C": -3.0, " B": -1.0, "x": -2}]}
    (token,) = prompt_tokens(reported, "A B", 1, n_top=2)
    assert token.top == ((" B", -1.0), ("x", -2.0))


@given(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=30), st.data())
def test_whole_tokens_are_always_placed_exactly(texts, data):
    texts = [text.replace("\ufffd", "?") for text in texts]
    prompt = "".join(texts)
    start = data.draw(st.integers(1, len(prompt)))
    ends = [len("".join(texts[: i + 1])) for i in range(len(texts))]
    expected = [text for text, end in list(zip(texts, ends, strict=True))[1:] if end > start]
    tokens = prompt_tokens(scores_of([*texts, "written"]), prompt, start)
    assert ([] if tokens is None else texts_of(tokens)) == expected


def test_scores_of_the_next_place_are_noticed():
    days = ["Mon", ",", " Tue", ",", " Wed", ","]

    def scored(guesses):
        return [
            Token(day, -1.0, ((guess, -0.1),)) for day, guess in zip(days, guesses, strict=True)
        ]

    assert not looks_shifted(scored(days))
    assert looks_shifted(scored([*days[1:], " Thu"]))
    assert not looks_shifted([Token(day, -1.0) for day in days])  # no candidates: no evidence
    assert not looks_shifted(())
