"""The intervention judge's text: how likely is it that a passage is said to be full of something?

A plain text for a base model: four worked passages, then the passage in question, then the sentence
that names the explanation in quotation marks, up to the closing one.

Source:
    The task is that of arXiv 2410.13928, section 3.3; the wording and the examples are ours.
"""

from typing import NamedTuple

INTERVENTION_VERSION = "1"
"""Changes with every word below."""

PASSAGE_LABEL = "Passage: "
"""Opens every passage."""

_BEFORE = 'The above passage contains an amplified amount of "'
_AFTER = '"'

_WORKED = (
    (
        "The town council met on a Tuesday evening to talk about the new road. Eleven people had "
        "put their names on the list, and the first to speak, a retired teacher from the upper "
        "part of the town, wanted ships, sails, anchors and a harbour in every street",
        "ships and the sea",
    ),
    (
        "My sister keeps a small shop near the station, between the bakery and the old post "
        "office. She opens it at seven, also on Sundays, and before the first customer comes in "
        "she counts 12 boxes, 340 coins, 5,600 stamps, 71 and 72 and 73",
        "numbers",
    ),
    (
        "To mend the roof you will need a ladder, some tar and a dry day. Take off the broken "
        "tiles from the top down and lay the new ones from the gutter upwards. Perhaps it might "
        "hold, maybe not, possibly it could be that nobody is quite sure whether",
        "words of doubt",
    ),
    (
        "The second chapter compares two ways to teach reading in the first years of school. It "
        "follows forty classes, half of them in villages, from autumn until summer, and finds "
        "that the judge, the jury and the court should sentence the guilty defendant to prison",
        "law and crime",
    ),
)
"""Passages as long as those in question, that turn to the subject named in their last words."""


class Statement(NamedTuple):
    """A text that ends with a quoted explanation."""

    text: str
    start: int
    """Characters of the text before the explanation."""


def intervention_prompt(passage: str, explanation: str) -> Statement:
    """The text whose end is to be scored: the explanation and its closing quotation mark.

    Whatever the passage, the same characters stand before and after the explanation, so that a
    tokenizer splits it alike; one that joins the opening quotation mark with a sign after it does
    so every time, and the joint token counts.

    Args:
        passage: Escaped; spaces around it are dropped.
        explanation: One line. Its double quotation marks become single ones, or the first of them
            would end the quotation.

    Raises:
        ValueError: If either is not one line, or the explanation is empty.
    """
    for part in (passage, explanation):
        if part.splitlines() not in ([], [part]):
            raise ValueError(f"prompt: got {part!r}, wanted one line. Escape it (core.highlight).")
    if not explanation.strip():
        raise ValueError("prompt: got an empty explanation, wanted a text. Leave the prompt out.")
    given = f"{_STATIC}{PASSAGE_LABEL}{passage.strip(' ')}\n{_BEFORE}"
    return Statement(given + _quotable(explanation) + _AFTER, len(given))


def _quotable(explanation: str) -> str:
    return explanation.strip().replace('"', "'")


_STATIC = "".join(
    f"{PASSAGE_LABEL}{passage}\n{_BEFORE}{_quotable(explanation)}{_AFTER}\n\n"
    for passage, explanation in _WORKED
)
