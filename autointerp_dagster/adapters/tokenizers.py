"""From token ids back to the pieces of text that they stand for."""

import codecs
import re
from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class HFDetokenizer:
    """Pieces of text by a Hugging Face tokenizer; the text of a token is looked up once.

    Byte-level and sentencepiece-like tokenizers are exact: the pieces of a sequence joined are its
    decoded text. Special tokens are no text: their piece is empty, as in the decoded text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._piece_of: dict[int, str] = {}
        self._first_piece_of: dict[int, str] = {}
        # Tokens that may not be whole text by themselves. Special tokens are left out of a text, so
        # that bytes before and after one meet.
        self._partial = set(self._special)

    def pieces(self, tokens: np.ndarray) -> list[str]:
        """One string per token of a sequence ``[position]``; joined they are its text.

        A character whose bytes are spread over several tokens stands whole at the last of them;
        the others are empty strings. Bytes that are no text become U+FFFD.
        """
        ids: list[int] = tokens.tolist()
        known = self._piece_of
        pieces = [known[i] if i in known else self._look_up(i) for i in ids]
        start = next((i for i, token in enumerate(ids) if token not in self._special), None)
        if start is not None and pieces[start].startswith(" "):
            pieces[start] = self._look_up_first(ids[start])
        for first, last in _runs([token in self._partial for token in ids]):
            pieces[first:last] = self._spread_characters(ids[first:last])
        return pieces

    def _look_up(self, token: int) -> str:
        """The token's text in the middle of a sequence; notes it if it may be part of a letter."""
        anchor_ids, anchor = self._anchor
        piece = self._decode([*anchor_ids, token]).removeprefix(anchor)
        self._piece_of[token] = piece
        if _REPLACEMENT in piece or _is_byte(self._tokenizer.convert_ids_to_tokens(token)):
            self._partial.add(token)
        return piece

    def _look_up_first(self, token: int) -> str:
        """The token's text at the start of a sequence, where some tokenizers drop a space."""
        if token not in self._first_piece_of:
            self._first_piece_of[token] = self._decode([token])
        return self._first_piece_of[token]

    def _spread_characters(self, ids: list[int]) -> list[str]:
        """Pieces of a run of tokens that stand for bytes or parts of letters."""
        anchor_ids, anchor = self._anchor
        text = self._decode([*anchor_ids, *ids]).removeprefix(anchor)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        parts = [self._bytes_of(token) for token in ids]
        pieces = [decoder.decode(part or b"") for part in parts]
        pieces[-1] += decoder.decode(b"", final=True)
        if None in parts or "".join(pieces) != text:
            return [""] * (len(ids) - 1) + [text]
        return pieces

    def _bytes_of(self, token: int) -> bytes | None:
        """The bytes a token stands for; null where the vocabulary does not tell."""
        if token in self._special:
            return b""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return None
        if _is_byte(name):
            return bytes.fromhex(name[3:-1])
        values = [_byte_of_letter().get(letter) for letter in name]
        whole = [value for value in values if value is not None]
        return bytes(whole) if len(whole) == len(values) else None

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token before another, so that the other is not at the start of the text."""
        ids = self._tokenizer("a", add_special_tokens=False).input_ids
        return ids, self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list of ids, not of sequences
        return text


def _is_byte(name: object) -> bool:
    """Whether a token is a single byte of a sentencepiece vocabulary, such as ``<0x0A>``.

    Such tokens are decoded as a run, and one stray byte spoils the whole run.
    """
    return isinstance(name, str) and re.fullmatch(r"<0x[0-9A-F]{2}>", name) is not None


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Maximal runs of true flags as [first, last)."""
    runs: list[tuple[int, int]] = []
    for i, flag in enumerate(flags):
        if not flag:
            continue
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


@cache
def _byte_of_letter() -> dict[str, int]:
    """Which byte each letter of a byte-level vocabulary stands for.

    Source: GPT-2's ``bytes_to_unicode``: printable bytes of Latin-1 stand for themselves, the other
    68 for the letters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}
