"""How a window is shown to a language model: which tokens are marked, and text that stays data.

Corpus text may hold anything: our markers, line breaks, chat-template tokens, a forged "2." or
"Answer:". It is escaped character by character, so that

1. escaped text is one line and holds neither ``<`` nor ``>``: every ``<<`` in a prompt is ours;
2. no chat-template token (``<|im_start|>``, ``</s>``, ``[INST]``, ...) survives as such;
3. :func:`unescape` gives the text back;
4. marking never changes the escaped text, it only adds ``<<`` and ``>>``.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

VERSION = "1"
"""Of marking and escaping; a change makes every prompt, and so every score, another one."""

MARK_THRESHOLD = 0.3
"""Share of the largest activation in the window from which a token is marked."""

OPEN, CLOSE = "<<", ">>"
"""Around each maximal run of marked tokens."""

EXPLANATION_CAP = 1000
"""Characters of an explanation that a prompt shows."""

_ROUNDING = 1e-6
"""A ratio this close to a threshold counts as on it: activations are rounded to bfloat16."""

_LEFT, _RIGHT = "\u2039", "\u203a"  # single angle quotation marks
_REPLACED = {
    "<": _LEFT, ">": _RIGHT, _LEFT: f"\\{_LEFT}", _RIGHT: f"\\{_RIGHT}",
    "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t",
}  # fmt: skip
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}
_SHOWN = {_LEFT: "<", _RIGHT: ">"}
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # needed inside words of many scripts, and in emoji

_BRACKETED = re.compile(r"\[(?=[^\]]{0,40}[A-Z]{2})/?[\w ]{2,40}(\])")
"""``[INST]``, ``[/INST]``, ``[gMASK]``, ``[EXPLANATION]``: special to a tokenizer or to us."""

_LINE_OPENING = re.compile(
    r"(?:\A|[\n\r\v\f\x85\u2028\u2029])\s*"
    r"(?:\d{1,3}([.)])(?=\s|\Z)|"
    r"(?:description|activations|texts?|examples?|answers?|system|user|assistant|human)\s?(:))",
    re.IGNORECASE,
)
"""Numbering, and words that name a part of a prompt or a role, where a line begins."""

_UNUSUAL = re.compile(r"[^ -;=?-\[\]-~]")
"""What may need escaping wherever it stands: all but the printable ASCII without ``<``, ``>`` and
the backslash. Most text has none, and prompts are built for every call."""

_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))|([\u2039\u203a])")


class VisibleTokens(NamedTuple):
    """The tokens of a window that a reader can see, with what fired there."""

    pieces: tuple[str, ...]
    """Non-empty, raw text of each token."""
    activations: Float32[np.ndarray, " position"]
    """One per piece, >= 0."""


def visible_tokens(
    pieces: Sequence[str], activations: Float32[np.ndarray, " position"]
) -> VisibleTokens:
    """The tokens that have text; one that has none is counted with the next that has.

    Args:
        pieces: From a ``Detokenizer``: empty where a character is spread over several tokens.
        activations: One per piece.

    Returns:
        Pieces whose activation is the largest of the tokens they stand for. Empty pieces at the
        end go with the last one that has text; without any text both fields are empty.

    Raises:
        ValueError: If the two differ in length.
    """
    if len(pieces) != len(activations):
        raise ValueError(
            f"window: {len(pieces)} pieces of text, {len(activations)} activations. "
            "Pass the activations of the visible tokens only."
        )
    with_text = np.flatnonzero([piece != "" for piece in pieces])
    if with_text.size == 0:
        return VisibleTokens((), np.zeros(0, np.float32))
    starts = np.concatenate([[0], with_text[:-1] + 1])
    largest = np.maximum.reduceat(activations, starts).astype(np.float32)
    return VisibleTokens(tuple(piece for piece in pieces if piece), largest)


def marks_of(activations: Float32[np.ndarray, " position"]) -> Bool[np.ndarray, " position"]:
    """Which tokens are marked: those at >= 0.3 x the largest activation of their window.

    Nothing is marked where nothing fires.

    Source:
        arXiv 2410.13928, section 3; one rule for every explainer and scorer.
    """
    values = activations.astype(np.float64)
    threshold = MARK_THRESHOLD * values.max(initial=0.0) * (1 - _ROUNDING)
    return (values > 0) & (values >= threshold)


def display_activations(
    activations: Float32[np.ndarray, " position"], max_activation: float
) -> Int64[np.ndarray, " position"]:
    """``ceil(10 a / A)``: 1..10 where the latent fires, 0 where it is silent.

    Args:
        activations: >= 0, raw coder units.
        max_activation: A, the latent's largest activation in the cache, > 0.

    Source:
        arXiv 2410.13928, section 3.
    """
    tenths = np.ceil(10 * activations.astype(np.float64) / max_activation - _ROUNDING)
    return np.where(activations > 0, np.clip(tenths, 1, 10), 0).astype(np.int64)


def escape(text: str) -> str:
    r"""Corpus text as one harmless line; :func:`unescape` undoes it.

    ``<`` and ``>`` become single angle quotation marks (U+2039, U+203A); line breaks, tabs, control
    and invisible characters become ``\n``, ``\x00``, ``\u202e``; a backslash is doubled; and a
    backslash stands before the ``]`` of ``[INST]`` and the like, before the dot of a number and the
    colon of a label that open a line.
    """
    return "".join(_escaped_characters(text))


def unescape(text: str) -> str:
    """The corpus text that :func:`escape` was given."""
    return _ESCAPED.sub(_original, text)


def mark_text(pieces: Sequence[str], marks: Bool[np.ndarray, " position"]) -> str:
    """The escaped text with each maximal run of marked tokens wrapped in ``<<`` and ``>>``.

    Spaces before the first word of a run stand before the marker: `` <<the>>``. Without markers the
    result is ``escape("".join(pieces))``.

    Args:
        pieces: Raw text of each token, as :func:`visible_tokens` gives it.
        marks: One per piece.
    """
    characters = _escaped_characters("".join(pieces))
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    shown: list[str] = []
    done = 0
    for first, last in runs_of(marks):
        start, stop = int(ends[first]) - len(pieces[first]), int(ends[last])
        shown += characters[done:start]
        shown.append(_wrap("".join(characters[start:stop])))
        done = stop
    return "".join(shown + characters[done:])


def runs_of(marks: Bool[np.ndarray, " position"]) -> list[tuple[int, int]]:
    """First and last position of each maximal run of marks, in order."""
    edges = np.diff(np.concatenate([[0], marks.astype(np.int8), [0]]))
    firsts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return [(int(first), int(stop) - 1) for first, stop in zip(firsts, stops, strict=True)]


def marked_runs(text: str) -> tuple[str, ...]:
    """The escaped text of each marked run of a shown window, in order."""
    return tuple(re.findall(f"{OPEN}([^<>]*){CLOSE}", text))


def without_marks(text: str) -> str:
    """A shown window without its markers: the escaped plain text."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def shown_explanation(text: str) -> str:
    """An explanation as a prompt shows it: one harmless line of at most 1000 characters.

    Explanations are written by a model that saw escaped text, so backslashes stay as they are and
    the result is not reversible; whitespace is collapsed, a longer text ends in ``…``. Applying it
    twice changes nothing. Empty if there is nothing but whitespace.
    """
    line = " ".join(text.split()).replace("<", _LEFT).replace(">", _RIGHT)
    line = "".join(_code(c) if _is_hidden(c) else c for c in line)
    line = _BRACKETED.sub(lambda found: found[0][:-1] + "\\]", line)
    if len(line) <= EXPLANATION_CAP:
        return line
    return line[: EXPLANATION_CAP - 1].rstrip() + "…"


def _wrap(run: str) -> str:
    word = run.lstrip(" ") or run
    spaces = run[: len(run) - len(word)]
    return f"{spaces}{OPEN}{word}{CLOSE}" if word else ""


def _escaped_characters(text: str) -> list[str]:
    characters = list(text)
    for found in _UNUSUAL.finditer(text):
        characters[found.start()] = _escape_character(found[0])
    for pattern in (_BRACKETED, _LINE_OPENING):
        for found in pattern.finditer(text):
            place = next(found.start(g) for g in range(1, pattern.groups + 1) if found[g])
            characters[place] = "\\" + text[place]
    return characters


def _escape_character(character: str) -> str:
    replaced = _REPLACED.get(character)
    if replaced is not None:
        return replaced
    return _code(character) if _is_hidden(character) else character


def _is_hidden(character: str) -> bool:
    if character.isprintable() or character in _JOINERS:
        return False
    return unicodedata.category(character) in _HIDDEN_CATEGORIES


def _code(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _original(found: re.Match[str]) -> str:
    *codes, named, shown = found.groups()
    if shown is not None:
        return _SHOWN[shown]
    if named is not None:
        return _NAMED.get(named, named)
    return chr(int(next(code for code in codes if code is not None), 16))
