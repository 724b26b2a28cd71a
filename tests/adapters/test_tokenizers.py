"""Pieces joined are the decoded text, in every script and with every kind of tokenizer."""

from collections.abc import Callable
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from autointerp_dagster.adapters.tokenizers import HFDetokenizer, vocabulary_size
from autointerp_dagster.core.highlight import mark_text, marks_of, visible_tokens

TEXTS = (
    "The river runs past the old mill, and the mill stands on the river; it isn't far.",
    "naïve café, Übergröße, e\u0301 and n\u0303 with combining marks",
    "中文字符和日本語、한국어",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "नमस्ते दुनिया क्षत्रिय",
    "שָׁלוֹם עולם, مرحبا بالعالم",
    "family 👨‍👩‍👧‍👦, flag 🇺🇳, tone 👍🏽, done 🙂🙃",
    "tabs\tand\n\nlines   and   spaces",
)


def train(model: models.Model, trainer: trainers.Trainer, **parts: object) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([*TEXTS] * 3, trainer)
    return tokenizer


def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerBase:
    """Like GPT-2, Llama-3, Qwen: words begin with a space, letters are bytes; BOS is token 0."""
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    split = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer = train(models.BPE(), trainer, pre_tokenizer=split, decoder=decoders.ByteLevel())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def byte_fallback(strips: bool = True) -> PreTrainedTokenizerBase:
    """Like Llama-2 (or Gemma, which keeps a first space): bytes stand for unknown letters."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "b", "▁a", "▁▁", "中"]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "▁")],
            byte_fallback=True, fuse_unk=True, unk_token="<unk>",
        )
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if strips else "never", split=False
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strips)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerBase:
    """Like T5 and XLM-R: no bytes, and the first token loses its low lines."""
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer = train(
        models.Unigram(), trainer,
        pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerBase:
    """Like BERT: no spaces in the vocabulary, parts of words begin with ``##``."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    tokenizer = train(
        models.WordPiece(unk_token="[UNK]"), trainer,
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(), decoder=decoders.WordPiece(),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", unk_token="[UNK]")


def word_ends() -> PreTrainedTokenizerBase:
    """Like GPT-1 and CLIP: the end of a word is a suffix, whose space the last word has not."""
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer = train(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainer,
        pre_tokenizer=pre_tokenizers.Whitespace(), decoder=decoders.BPEDecoder(suffix="</w>"),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words() -> PreTrainedTokenizerBase:
    """No decoder: words are joined by spaces."""
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<unk>"])
    tokenizer = train(
        models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.WhitespaceSplit()
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level": byte_level,
    "byte_level_prefix": lambda: byte_level(add_prefix_space=True),
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strips=False),
    "unigram": unigram,
    "word_piece": word_piece,
    "word_ends": word_ends,
    "words": words,
    "python": ByT5Tokenizer,
}
KEEPS_TEXT = ("byte_level", "byte_fallback", "byte_fallback_unstripped")
"""Decoding what was encoded gives the text."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Of every kind, each with tokens that were added later: plain ones and a special one."""
    made = {kind: make() for kind, make in MAKERS.items()}
    for tokenizer in made.values():
        tokenizer.add_tokens([AddedToken("<|code|>"), AddedToken("é中"), AddedToken("   ")])
        tokenizer.add_tokens([AddedToken("<|end|>", special=True)], special_tokens=True)
    return made


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return HFDetokenizer(tokenizer).pieces(np.array(ids, dtype=np.int32))


def shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What a window reads: the decoded text, but that bytes which are no character spoil no others.

    Other tokenizers than those with byte fallback do that themselves.
    """
    names = [tokenizer.convert_ids_to_tokens(i) for i in ids if i not in special(tokenizer)]
    if not any(name.startswith("<0x") for name in names):
        return decoded(tokenizer, ids)
    text = ""
    for is_bytes, run in groupby(names, key=lambda name: name.startswith("<0x")):
        if is_bytes:
            text += bytes(int(name[3:-1], 16) for name in run).decode(errors="replace")
        else:
            text += "".join(run).replace("▁", " ")
    strips = "Strip" in str(tokenizer.backend_tokenizer.decoder)
    return text.removeprefix(" ") if strips else text


def special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {token for token, about in added if about.special}


@pytest.mark.parametrize("kind", MAKERS)
def test_pieces_of_any_window_of_a_text_joined_are_what_it_reads(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    detokenizer = HFDetokenizer(tokenizer)

    @settings(max_examples=60, deadline=None)
    @given(
        text=st.one_of(st.text(max_size=30), st.sampled_from(TEXTS)),
        start=st.integers(0, 7),
        stop=st.integers(0, 7),
    )
    def check(text: str, start: int, stop: int) -> None:
        ids = encoded(tokenizer, text)
        ids = ids[start : max(len(ids) - stop, 0)]  # windows cut characters
        found = detokenizer.pieces(np.array(ids, dtype=np.int32))
        assert len(found) == len(ids)
        assert "".join(found) == shown(tokenizer, ids)

    check()


@pytest.mark.parametrize("kind", MAKERS)
def test_pieces_of_any_tokens_joined_are_what_they_read(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    detokenizer = HFDetokenizer(tokenizer)
    size = vocabulary_size(tokenizer)
    tokens = st.one_of(st.integers(0, size - 1), st.integers(size - 6, size - 1))  # added ones too

    @settings(max_examples=60, deadline=None)
    @given(ids=st.lists(tokens, max_size=20))
    def check(ids: list[int]) -> None:
        found = detokenizer.pieces(np.array(ids, dtype=np.int64))
        assert len(found) == len(ids)
        assert "".join(found) == shown(tokenizer, ids)

    check()


@pytest.mark.parametrize("kind", KEEPS_TEXT)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), start=st.integers(0, 9), length=st.integers(0, 9))
def test_only_characters_that_a_window_cuts_are_lost(
    kind: str, text: str, start: int, length: int
) -> None:
    tokenizer = CACHED[kind]
    text = text.replace("\ufffd", "").replace("▁", "")
    window = encoded(tokenizer, text)[start : start + length]
    joined = "".join(pieces(tokenizer, window))
    assert joined.strip("\ufffd") in text


@pytest.mark.parametrize("kind", KEEPS_TEXT)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_a_whole_text_comes_back(kind: str, text: str) -> None:
    text = text.replace("▁", "").lstrip(" ")  # Llama's tokenizer takes a first space as its own
    assert "".join(pieces(CACHED[kind], encoded(CACHED[kind], text))) == text


CACHED = {kind: MAKERS[kind]() for kind in KEEPS_TEXT}


def bytes_as_ids(tokenizer: PreTrainedTokenizerBase, content: bytes) -> list[int]:
    """One byte per token, as a rare character is tokenised."""
    letter_of = bytes_to_unicode()
    names = {"<": [f"<0x{byte:02X}>" for byte in content]}
    plain = [letter_of[byte] for byte in content]
    has_bytes = "<0x00>" in tokenizer.get_vocab()
    return tokenizer.convert_tokens_to_ids(names["<"] if has_bytes else plain)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x中🙂y".encode(), ["x", "", "", "中", "", "", "", "🙂", "y"]),
        # Two stray bytes, x, and two bytes of a character whose end is cut off.
        ("中x中".encode()[1:-1], ["\ufffd", "\ufffd", "x", "", "\ufffd"]),
        # What is cut off spoils no whole character beside it.
        ("中文中".encode()[2:-2], ["\ufffd", "", "", "文", "\ufffd"]),
        # A real replacement character is a character like another.
        ("a\ufffd\ufffdb".encode(), ["a", "", "", "\ufffd", "", "", "\ufffd", "b"]),
        # Thai vowel signs and combining accents are characters of their own.
        ("กำ".encode(), ["", "", "ก", "", "", "ำ"]),
        (b"\xff\xc0a", ["\ufffd", "\ufffd", "a"]),
    ],
)
def test_a_character_stands_at_the_token_with_its_last_byte(
    kind: str, content: bytes, expected: list[str]
) -> None:
    assert pieces(CACHED[kind], bytes_as_ids(CACHED[kind], content)) == expected


def test_a_character_split_over_tokens_is_marked_whole() -> None:
    tokenizer = CACHED["byte_level"]
    ids = bytes_as_ids(tokenizer, "x🙂y".encode())
    activations = np.array([0, 0, 2, 0, 0, 0], dtype=np.float32)  # at its second byte
    visible = visible_tokens(pieces(tokenizer, ids), activations)
    assert mark_text(visible.pieces, marks_of(visible.activations)) == "x<<🙂>>y"


@pytest.mark.parametrize("text", ["👨‍👩‍👧‍👦", "e\u0301", "क्षत्रिय", "שָׁלוֹם", "مرحبا", "🇺🇳👍🏽"])
@pytest.mark.parametrize("kind", KEEPS_TEXT)
def test_joiners_combining_marks_and_right_to_left_text_keep_their_order(
    kind: str, text: str
) -> None:
    assert "".join(pieces(CACHED[kind], encoded(CACHED[kind], text))) == text


def test_special_tokens_are_no_text_and_token_0_is_a_token() -> None:
    tokenizer = CACHED["byte_level"]
    assert tokenizer.bos_token_id == 0
    letter = tokenizer.convert_tokens_to_ids("a")
    assert pieces(tokenizer, [0, letter, 0]) == ["", "a", ""]


def test_bytes_of_a_character_meet_across_a_special_token() -> None:
    for tokenizer in (CACHED["byte_level"], CACHED["byte_fallback"]):
        first, *rest = bytes_as_ids(tokenizer, "中".encode())
        assert pieces(tokenizer, [first, tokenizer.bos_token_id, *rest]) == ["", "", "", "中"]


def test_a_leading_space_is_dropped_only_where_the_tokenizer_drops_it() -> None:
    llama, gemma = CACHED["byte_fallback"], CACHED["byte_fallback_unstripped"]
    word = llama.convert_tokens_to_ids("▁a")
    assert pieces(llama, [word, word]) == ["a", " a"]
    assert pieces(llama, [llama.bos_token_id, word]) == ["", "a"]
    assert pieces(gemma, [word, word]) == [" a", " a"]
    ids = encoded(CACHED["byte_level"], " a a")
    assert "".join(pieces(CACHED["byte_level"], ids)) == " a a"


def test_the_space_that_ends_a_word_stands_before_the_next() -> None:
    tokenizer = word_ends()
    ids = encoded(tokenizer, "the mill stands")
    assert "".join(pieces(tokenizer, ids)) == "the mill stands"
    starts = [i for i, piece in enumerate(pieces(tokenizer, ids)) if piece.startswith(" ")]
    assert len(starts) == 2


def test_an_empty_sequence_has_no_pieces() -> None:
    for tokenizer in (*CACHED.values(), word_ends()):
        assert pieces(tokenizer, []) == []


def test_the_vocabulary_holds_added_tokens() -> None:
    tokenizer = byte_level()
    size = vocabulary_size(tokenizer)
    tokenizer.add_tokens(["<|code|>"])
    assert vocabulary_size(tokenizer) == size + 1 == tokenizer.convert_tokens_to_ids("<|code|>") + 1
