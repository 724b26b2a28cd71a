"""From token ids back to the pieces of text that they stand for, in whatever script.

1. A token is looked up once: the text it adds behind another token, and the text it gives where a
   sequence begins, which some tokenizers write without its leading space.
2. A token that is no whole text (a part of a character, a byte) is kept as bytes.
3. The bytes of a sequence are read as UTF-8; each character stands at the token with its last byte.

A tokenizer whose text does not follow from its tokens one by one (a decoder that looks ahead, or
code of its own) is asked for the text of every beginning of the sequence instead.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TOKENWISE = {"ByteLevel", "ByteFallback", "Metaspace", "WordPiece", "Fuse", "Replace", "Strip"}
"""Decoders of the ``tokenizers`` library whose text of a token does not depend on later ones."""


class _Token(NamedTuple):
    text: str
    """What it adds to a text that has begun; empty for a special token."""
    first: str
    """What it gives at the beginning of a text."""
    partial: bytes | None
    """Its bytes if they need not be whole characters."""


class HFDetokenizer:
    """Pieces of text by a Hugging Face tokenizer.

    Joined they are the tokenizer's own decoded text, with one exception at the edges of a window
    that cuts a character in two: the bytes that are left of it become U+FFFD, and only they. (A
    tokenizer with byte fallback would give one U+FFFD for every byte up to the next token that is
    none.) Special tokens are no text: their piece is empty, as in the decoded text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[int, _Token] = {}
        self._partial: set[int] = set()
        added = tokenizer.added_tokens_decoder.items()
        self._special = {token for token, about in added if about.special}
        self._special.update(tokenizer.all_special_ids)

    def pieces(self, tokens: np.ndarray) -> list[str]:
        """One string per token of a sequence ``[position]``; joined they are its text.

        A character whose bytes are spread over several tokens stands whole at the last of them;
        the others are empty strings, or what comes before it. Bytes that are no character become
        U+FFFD at the last of their tokens.
        """
        ids: list[int] = tokens.tolist()
        if self._anchor is None:
            return self._grown(ids)
        known = self._tokens
        found = [known[i] if i in known else self._look_up(i) for i in ids]
        pieces = [token.text for token in found]
        start = next((i for i, token in enumerate(ids) if token not in self._special), None)
        if start is not None:
            pieces[start] = found[start].first
        if self._partial.isdisjoint(ids):
            return pieces
        contents = [piece.encode() for piece in pieces]
        for i, token in enumerate(found):
            if token.partial is not None and (i != start or token.first):
                contents[i] = token.partial
        return _characters_at_their_last_byte(contents)

    def _look_up(self, token: int) -> _Token:
        if token in self._special:
            found = _Token("", "", None)
        else:
            assert self._anchor is not None  # else tokens are never looked up
            anchor, anchor_text = self._anchor
            text = self._decode([anchor, token]).removeprefix(anchor_text)
            found = _Token(text, self._decode([token]), self._bytes_of(token, text))
            if found.partial is not None:
                self._partial.add(token)
        self._tokens[token] = found
        return found

    def _bytes_of(self, token: int, text: str) -> bytes | None:
        """The token's bytes if they may be a part of a character; null for whole text."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return None
        if "ByteFallback" in self._decoders and re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            return bytes.fromhex(name[3:-1])
        if "ByteLevel" in self._decoders and _REPLACEMENT in text:
            byte_of = _byte_of_letter()
            is_bytes = all(letter in byte_of for letter in name)
            return bytes(byte_of[letter] for letter in name) if is_bytes else name.encode()
        return None

    def _grown(self, ids: list[int]) -> list[str]:
        """What the text of the first tokens has in common with that of all, token by token."""
        whole = self._decode(ids)
        texts = [self._decode(ids[:n]) for n in range(1, len(ids))]
        ends = [_shared(text, whole) for text in texts] + [len(whole)]
        ends = list(accumulate(ends[: len(ids)], max))
        return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Kinds of the parts that the tokenizer's decoder is made of; empty if it has none."""
        return frozenset(part["type"] for part in _decoder_parts(self._tokenizer) or ())

    @cached_property
    def _anchor(self) -> tuple[int, str] | None:
        """A token to put before another, so that the other does not begin the text, and its text.

        Null if the text of a sequence does not follow from its tokens one by one.
        """
        parts = _decoder_parts(self._tokenizer)
        if parts is None or not all(map(_is_tokenwise, parts)):
            return None
        for token in sorted(self._tokenizer.get_vocab().values()):
            text = "" if token in self._special else self._decode([token])
            if text.isascii() and text.isalnum() and self._decode([token] * 2).startswith(text):
                return token, text
        return None

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list of ids, not of sequences
        return text


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's token ids are below it; a model may have more embeddings."""
    return max(tokenizer.get_vocab().values()) + 1


def _decoder_parts(tokenizer: PreTrainedTokenizerBase) -> list[Mapping[str, Any]] | None:
    """What the decoder of the ``tokenizers`` library is made of; null for a decoder of its own."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if type(tokenizer)._decode is not PreTrainedTokenizerFast._decode:
        return None
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return []
    if type(decoder) is decoders.Decoder:  # written in Python
        return None
    return list(_flat(json.loads(decoder.__getstate__())))


def _flat(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if part["type"] == "Sequence":
        for inner in part["decoders"]:
            yield from _flat(inner)
    else:
        yield part


def _is_tokenwise(part: Mapping[str, Any]) -> bool:
    replaces_more = part["type"] == "Replace" and "String" not in part["pattern"]
    strips_ends = part["type"] == "Strip" and part["stop"] > 0
    return part["type"] in _TOKENWISE and not replaces_more and not strips_ends


def _shared(a: str, b: str) -> int:
    """Characters that two texts have in common at their beginning."""
    unlike = (i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    return next(unlike, min(len(a), len(b)))


def _characters_at_their_last_byte(contents: Sequence[bytes]) -> list[str]:
    """The joined bytes as UTF-8, each character at the part that holds its last byte.

    The longest stretch of bytes that could begin a character but does not is one U+FFFD, any other
    byte that is no character is one, as in Unicode's recommended practice and in ``bytes.decode``.
    """
    whole = b"".join(contents)
    ends = list(accumulate(map(len, contents)))
    pieces = [""] * len(contents)
    for character, end in _characters(whole):
        pieces[bisect_left(ends, end)] += character
    return pieces


def _characters(content: bytes) -> Iterator[tuple[str, int]]:
    """Each character with the place after its last byte."""
    done = 0
    while done < len(content):
        try:
            text, bad = content[done:].decode(), None
        except UnicodeDecodeError as error:
            text, bad = content[done : done + error.start].decode(), done + error.end
        for character in text:
            done += len(character.encode())
            yield character, done
        if bad is not None:
            done = bad
            yield _REPLACEMENT, done


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
