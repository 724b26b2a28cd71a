"""Pieces joined are the decoded text, and a character stands whole at its last token."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from autointerp_dagster.adapters.tokenizers import HFDetokenizer

LETTERS = st.text(alphabet=st.sampled_from("ab é中文🙂\n <s>\ufffdﬁ"), max_size=40)


@pytest.fixture(scope="module")
def byte_level(tiny_subject_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_subject_model_dir)


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerBase:
    """Like Llama-2: words begin with a low line, and bytes stand for unknown letters."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("▁", "a")], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return HFDetokenizer(tokenizer).pieces(np.array(ids, dtype=np.int32))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_pieces_joined_are_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    detokenizer = HFDetokenizer(tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(text=LETTERS, start=st.integers(0, 5), stop=st.integers(0, 5))
    def check(text: str, start: int, stop: int) -> None:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = ids[start : len(ids) - stop]  # windows cut characters
        found = detokenizer.pieces(np.array(ids, dtype=np.int32))
        assert len(found) == len(ids)
        assert "".join(found) == decoded(tokenizer, ids)

    check()


def test_any_token_sequence_is_decoded(byte_level: PreTrainedTokenizerBase) -> None:
    detokenizer = HFDetokenizer(byte_level)

    @settings(max_examples=100, deadline=None)
    @given(ids=st.lists(st.integers(0, len(byte_level) - 1), max_size=30))
    def check(ids: list[int]) -> None:
        assert "".join(detokenizer.pieces(np.array(ids, dtype=np.int64))) == decoded(
            byte_level, ids
        )

    check()


def bytes_as_ids(tokenizer: PreTrainedTokenizerBase, content: bytes) -> list[int]:
    """One byte per token, as a rare character is tokenised."""
    letter_of = bytes_to_unicode()
    return [tokenizer.convert_tokens_to_ids(letter_of[byte]) for byte in content]


def test_a_character_over_several_tokens_stands_whole_at_the_last(
    byte_level: PreTrainedTokenizerBase,
) -> None:
    ids = bytes_as_ids(byte_level, "x中🙂y".encode())
    assert pieces(byte_level, ids) == ["x", "", "", "中", "", "", "", "🙂", "y"]


def test_a_cut_character_is_a_replacement_character(byte_level: PreTrainedTokenizerBase) -> None:
    ids = bytes_as_ids(byte_level, "中x中".encode())[1:-1]
    # Two stray bytes, x, and two bytes of a character whose end is cut off.
    assert pieces(byte_level, ids) == ["\ufffd", "\ufffd", "x", "", "\ufffd"]


def test_a_real_replacement_character_stays_at_its_token(
    byte_level: PreTrainedTokenizerBase,
) -> None:
    ids = bytes_as_ids(byte_level, "a\ufffd\ufffdb".encode())
    assert pieces(byte_level, ids) == ["a", "", "", "\ufffd", "", "", "\ufffd", "b"]


def test_special_tokens_are_no_text_and_token_0_is_a_token(
    byte_level: PreTrainedTokenizerBase,
) -> None:
    assert byte_level.bos_token_id == 0
    letter = byte_level.convert_tokens_to_ids("a")
    assert pieces(byte_level, [0, letter, 0]) == ["", "a", ""]


def test_a_leading_space_is_dropped_only_where_the_tokenizer_drops_it(
    byte_level: PreTrainedTokenizerBase, byte_fallback: PreTrainedTokenizerBase
) -> None:
    word = byte_fallback.convert_tokens_to_ids("▁a")
    assert pieces(byte_fallback, [word, word]) == ["a", " a"]
    assert pieces(byte_fallback, [byte_fallback.bos_token_id, word]) == ["", "a"]
    ids = byte_level(" a a", add_special_tokens=False).input_ids
    assert "".join(pieces(byte_level, ids)) == " a a"


def test_an_empty_sequence_has_no_pieces(byte_level: PreTrainedTokenizerBase) -> None:
    assert pieces(byte_level, []) == []
