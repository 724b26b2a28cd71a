"""The formats that an answer can have, and how tolerantly each is read."""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

_LABEL = re.compile(r"[01]|true|false", re.IGNORECASE)
_ITEM = r"""["']?(?:[01]|true|false)["']?"""
_LABEL_LIST = re.compile(rf"\[\s*{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?\s*\]", re.IGNORECASE)
_NUMBER = r"-?\d{1,9}(?:\.\d{1,9})?"
_QUOTED_NUMBER = rf"""["']?\s*{_NUMBER}\s*["']?"""
_NUMBER_LIST = re.compile(rf"\[\s*{_QUOTED_NUMBER}(?:\s*,\s*{_QUOTED_NUMBER})*\s*,?\s*\]")


class LabelReading(NamedTuple):
    """One label of an answer."""

    prediction: bool
    probability: float | None
    """P(1) / (P(0) + P(1)) over the returned candidates; null where that is not known."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token with the log-probabilities the endpoint returned."""

    text: str
    logprob: float
    """Natural logarithm, <= 0."""
    top: tuple[tuple[str, float], ...] = ()
    """The most probable candidates at this place and their log-probabilities."""


@dataclass(frozen=True, slots=True)
class FreeText:
    """An answer in prose whose last line starts with ``marker``."""

    marker: str = "[EXPLANATION]:"

    @property
    def identity(self) -> list[str | int]:
        """What of the format is in every ``call_id``; a change makes paid answers strangers."""
        return ["text", self.marker]

    def fault(self, text: str) -> str | None:
        """What is wrong with the format, in words a model can act on; null if nothing is."""
        if self.read(text) is None:
            return f"the last line did not start with {self.marker} and a text after it"
        return None

    def read(self, text: str) -> str | None:
        """The text after the last marker, on one line; null if there is none.

        The marker may be in any case and in Markdown emphasis (``**[Explanation]:** words``).
        """
        _, *after_markers = re.split(re.escape(self.marker), text, flags=re.IGNORECASE)
        if not after_markers:
            return None
        line = after_markers[-1].lstrip("*_ \t\r\n").split("\n", maxsplit=1)[0].strip()
        if line.count("**") % 2:
            line = line.removesuffix("**").rstrip()
        return line or None


@dataclass(frozen=True, slots=True)
class LabelList:
    """An answer that is a JSON list of ``n`` zeros and ones, e.g. ``[1, 0, 0]``.

    The last list of the text counts. Quoted digits and ``true`` / ``false`` are read too; what
    stands around the list (prose, code fences, an object) is ignored.
    """

    n: int

    @property
    def identity(self) -> list[str | int]:
        """What of the format is in every ``call_id``; a change makes paid answers strangers."""
        return ["labels", self.n]

    @property
    def json_schema(self) -> dict[str, object]:
        """For endpoints with structured outputs."""
        items = {"type": "integer", "enum": [0, 1]}
        return {"type": "array", "items": items, "minItems": self.n, "maxItems": self.n}

    def fault(self, text: str) -> str | None:
        """What is wrong with the format, in words a model can act on; null if nothing is."""
        labels = self._labels(text)
        if labels is None:
            return "there was no list of zeros and ones"
        if len(labels) != self.n:
            return f"the list had {len(labels)} entries instead of {self.n}"
        return None

    def read(self, text: str, tokens: tuple[Token, ...] | None) -> list[LabelReading] | None:
        """One reading per label, in order; null if the format is faulty.

        Args:
            text: The whole answer.
            tokens: The answer's tokens with log-probabilities, where the endpoint gave them.
        """
        labels = self._labels(text)
        if labels is None or len(labels) != self.n:
            return None
        return [
            LabelReading(label, probability)
            for label, probability in zip(labels, self._probabilities(tokens), strict=True)
        ]

    def _labels(self, text: str) -> list[bool] | None:
        places = _label_places(text)
        return None if places is None else [text[place] in "1tT" for place in places]

    def _probabilities(self, tokens: tuple[Token, ...] | None) -> list[float | None]:
        slots = self._slots(tokens or ())
        return [None if token is None else _probability_of_one(token) for token in slots]

    def _slots(self, tokens: tuple[Token, ...]) -> list[Token | None]:
        """The token that carries each label; null where one token carries several."""
        places = _label_places("".join(token.text for token in tokens))
        if places is None:  # guided decoding returns the label tokens alone
            slots: list[Token | None] = [token for token in tokens if _digit(token.text)]
        else:
            ends = list(accumulate(len(token.text) for token in tokens))
            owners = [bisect_right(ends, place) for place in places]
            slots = [tokens[owner] if owners.count(owner) == 1 else None for owner in owners]
        return slots if len(slots) == self.n else [None] * self.n


def _label_places(text: str) -> list[int] | None:
    """Where each label of the last list starts in ``text``; null if there is no list."""
    lists = list(_LABEL_LIST.finditer(text))
    if not lists:
        return None
    start, stop = lists[-1].span()
    return [label.start() for label in _LABEL.finditer(text, start, stop)]


def _digit(token: str) -> str | None:
    """The label that a token reads as, e.g. ``"1"`` for ``" 1"`` and ``"[1,"``."""
    label = token.strip(" \n\t[],\"'")
    return label if label in ("0", "1") else None


def _probability_of_one(token: Token) -> float | None:
    """Null without candidates that read as labels, or if one of theirs is no log-probability."""
    mass = {"0": 0.0, "1": 0.0}
    for text, logprob in token.top:
        digit = _digit(text)
        if digit is None:
            continue
        if math.isnan(logprob) or logprob == math.inf:
            return None
        mass[digit] += math.exp(min(logprob, 0.0))
    total = mass["0"] + mass["1"]
    return mass["1"] / total if total > 0 else None


@dataclass(frozen=True, slots=True)
class IntegerList:
    """An answer that is a JSON list of ``n`` integers, e.g. ``[0, 0, 7]``.

    The last list of numbers in the text counts. Quoted numbers and ``3.0`` are read too; what
    stands around the list (prose, code fences, an object) is ignored. A number with a fraction or
    outside the bounds is a fault, as is another number of entries: nothing is rounded, cut or
    filled up.
    """

    n: int
    lo: int
    """The smallest that counts."""
    hi: int
    """The largest."""

    @property
    def identity(self) -> list[str | int]:
        """What of the format is in every ``call_id``; a change makes paid answers strangers."""
        return ["integers", self.n, self.lo, self.hi]

    @property
    def json_schema(self) -> dict[str, object]:
        """For endpoints with structured outputs."""
        items = {"type": "integer", "enum": list(range(self.lo, self.hi + 1))}
        return {"type": "array", "items": items, "minItems": self.n, "maxItems": self.n}

    def fault(self, text: str) -> str | None:
        """What is wrong with the format, in words a model can act on; null if nothing is."""
        numbers = _last_numbers(text)
        if numbers is None:
            return "there was no list of integers"
        if len(numbers) != self.n:
            return f"the list had {len(numbers)} entries instead of {self.n}"
        if not all(number.is_integer() and self.lo <= number <= self.hi for number in numbers):
            return f"not every entry was an integer from {self.lo} to {self.hi}"
        return None

    def read(self, text: str) -> list[int] | None:
        """The integers, in order; null if the format is faulty."""
        if self.fault(text) is not None:
            return None
        return [int(number) for number in _last_numbers(text) or ()]


def _last_numbers(text: str) -> list[float] | None:
    """The entries of the last list of numbers; null if there is no list."""
    lists = _NUMBER_LIST.findall(text)
    return [float(number) for number in re.findall(_NUMBER, lists[-1])] if lists else None


@dataclass(frozen=True, slots=True)
class Choice:
    """An answer that is exactly one of some options."""

    options: tuple[str, ...]
    """Distinct, at least two, without spaces at their ends."""

    @property
    def identity(self) -> list[str | int]:
        """What of the format is in every ``call_id``; a change makes paid answers strangers."""
        return ["choice", *self.options]

    @property
    def json_schema(self) -> dict[str, object]:
        """For endpoints with structured outputs."""
        return {"type": "string", "enum": list(self.options)}

    def fault(self, text: str) -> str | None:
        """What is wrong with the format, in words a model can act on; null if nothing is."""
        return "it was not one of the options alone" if self.read(text) is None else None

    def read(self, text: str) -> int | None:
        """The index of the option that the text is; quotes and a full stop around it are ignored.

        Case counts only where options differ by nothing else.
        """
        said = text.strip().strip("\"'`*. \n\t")
        if said in self.options:
            return self.options.index(said)
        alike = [i for i, option in enumerate(self.options) if option.lower() == said.lower()]
        return alike[0] if len(alike) == 1 else None


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a base model writes after a plain text, up to the first of ``stop``."""

    stop: tuple[str, ...] = ()
    """Not part of the answer."""

    @property
    def identity(self) -> list[str | int]:
        """What of the format is in every ``call_id``; a change makes paid answers strangers."""
        return ["continuation", *self.stop]

    def fault(self, text: str) -> str | None:
        """Never anything."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Nothing is written: the log-probabilities of a plain text's own tokens are wanted.

    The completion's text is empty; its tokens are those of the prompt that end after ``start``,
    each given all before it.
    """

    start: int
    """Characters of the prompt whose tokens are not wanted; > 0, for the first has no given."""
    candidates: tuple[str, ...] = ()
    """Texts whose log-probabilities are wanted at each place, in ``Token.top``. A model in this
    process gives exactly these, where they are one token each; a server its most probable ones."""

    @property
    def identity(self) -> list[str | int]:
        """What of the format is in every ``call_id``; a change makes paid answers strangers."""
        return ["scores", self.start, *self.candidates]

    def fault(self, text: str) -> str | None:
        """Never anything."""


Answer = FreeText | LabelList | IntegerList | Choice | Continuation | PromptScores
