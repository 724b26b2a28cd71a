"""What synthetic latents fire on: rules that a program decides, with the descriptions of them.

A rule must be decidable from the window alone, and its description must be true of every window
called activating and false of every other. Two kinds of doubt are kept out of the pack:

1. ``near``: text that comes close to the rule (an opened parenthesis that is never closed) is
   neither. A window that has it and does not fit the rule is not used.
2. Topics have no sharp border. A window is about a topic if it names ``n_distinct`` different words
   of the topic's list; it is about something else if it names none and its document hardly does.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

VERSION = "1"
"""Changes whenever a rule or a description does."""

RuleKind = Literal["tokens", "regexes", "topics"]
"""``tokens``: single words or forms of a word; ``regexes``: stretches of several characters or
words; ``topics``: what a text is about."""

RULE_KINDS: tuple[RuleKind, ...] = get_args(RuleKind)


@dataclass(frozen=True, slots=True)
class Rule:
    """What one synthetic latent fires on."""

    kind: RuleKind
    description: str
    """True of it; what the judge is given."""
    pattern: re.Pattern[str]
    """The latent fires on what this matches."""
    near: re.Pattern[str]
    """Silent windows do not even have this; matches wherever ``pattern`` does."""
    n_distinct: int = 1
    """Different matches, letter case aside, that an activating window has at least."""

    def fits(self, text: str) -> bool:
        """Whether the rule holds of a window, or of a marked stretch of one.

        One match is enough: what has too few for an activating window and too many for a silent
        one is in no pack.
        """
        return self.pattern.search(text) is not None

    def is_activating(self, text: str) -> bool:
        """Whether the latent fires in a window."""
        found = {match.group().lower() for match in self.pattern.finditer(text)}
        return len(found) >= self.n_distinct


def _tokens(description: str, pattern: str) -> Rule:
    compiled = re.compile(pattern)
    return Rule("tokens", description, compiled, compiled)


def _regex(description: str, pattern: str, near: str) -> Rule:
    return Rule("regexes", description, re.compile(pattern), re.compile(near))


def _topic(description: str, words: str) -> Rule:
    pattern = re.compile(rf"\b(?:{'|'.join(words.split())})\b", re.IGNORECASE)
    return Rule("topics", description, pattern, pattern, n_distinct=2)


RULES: tuple[Rule, ...] = (
    _tokens('the word "not"', r"\b[Nn]ot\b"),
    _tokens('the words "he" and "she"', r"\b(?:[Ss]he|[Hh]e)\b"),
    _tokens('the word "but"', r"\b[Bb]ut\b"),
    _tokens('words that end in "ing"', r"\b\w+ing\b"),
    _tokens('words that end in "ly"', r"\b\w+ly\b"),
    _tokens("numbers written in digits", r"\d+"),
    _regex("text in parentheses", r"\([^()]+\)", r"[()\[\]{}]"),
    _regex("words in double quotation marks", r"\"\w[^\"“”]*\"|“[^\"“”]+”", r"[\"“”]|''|``"),
    _regex("questions that end in a question mark", r"\w[^.?!\n]*\?", r"\?"),
    _regex("words joined by a hyphen, such as well-known", r"\w+-\w+", r"[-\u2010-\u2014]"),
    _regex(
        "words written entirely in capital letters", r"\b[A-Z]{2,}\b", r"[A-Z]{2}|\b[B-HJ-Z]\b"
    ),
    _regex("four-digit years, such as 1945", r"\b(?:1[789]|20)\d\d\b", r"\d{4}|\d0s"),
    _topic(
        "war and armed forces",
        "war wars army armies soldier soldiers battle battles military troops invasion weapons "
        "navy artillery siege cavalry veterans combat warfare battlefield regiment infantry",
    ),
    _topic(
        "music and musicians",
        "music song songs album albums guitar piano orchestra singer singers composer composers "
        "concert concerts melody musical musicians drums opera symphony jazz",
    ),
    _topic(
        "religion and faith",
        "god church churches religious religion religions faith bible priest priests prayer "
        "christian christians christianity jesus holy bishop theology worship jewish islam "
        "islamic muslim muslims gospel",
    ),
    _topic(
        "sport and games that teams play",
        "teams player players league football baseball basketball coach coaches championship "
        "championships olympic olympics tournament tournaments stadium sport sports athletes",
    ),
    _topic(
        "taxes, trade and the economy",
        "tax taxes economy economic economies businesses budget deficit debt trade markets "
        "investment income banks inflation unemployment exports imports wages",
    ),
    _topic(
        "law, courts and crime",
        "law laws court courts judge judges trial constitution legal justice crime crimes police "
        "prison lawyer lawyers criminal criminals convicted jury murder",
    ),
)  # fmt: skip
"""Six of each kind. The description that stands in for a rule's own, as its floor, is that of the
rule :data:`FLOOR_STEP` further on, one of another kind."""

FLOOR_STEP = 7
"""Coprime with the number of rules, so that each is the floor of one other."""
