"""The surprisal prompt: a plain text in which a description is followed by sentences that fit it.

A base model continues it, so nothing is asked: worked blocks show that the lines under a
description are instances of it. The prompt ends before the space in front of the window's first
word, which tokenizers cut cleanly; whatever they do there, they do it under every description.

Source:
    The task is that of arXiv 2410.13928, section 3.2; the wording and the examples are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

SURPRISAL_VERSION = "1"
"""Changes with every word below."""

UNRELATED = "Various unrelated sentences."
"""z0: the description that says nothing, against which every other is measured."""


class PlainPrompt(NamedTuple):
    """A text for a base model, with the stretch at its end that is to be scored."""

    text: str
    start: int
    """Where the window's stretch begins, in characters: the space before its first word."""


_WORKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Boats, ships and those who sail them.",
        (
            "The ferry left the quay an hour late because its pilot could not be found.",
            "hauled the dinghy up the beach and turned it over for the winter",
        ),
    ),
    (
        'The preposition "between" and the two things it joins.',
        (
            "A hedge ran between the orchard and the lane.",
            "had to choose between a warm coat and the fare home",
            "Talks between the teachers and the council broke off on Friday.",
        ),
    ),
    (
        "Illness and its treatment.",
        (
            "Two days later the fever was gone, but the cough stayed until March.",
            "the dose was halved after several patients complained of dizziness",
        ),
    ),
    (
        "Years written as numbers.",
        (
            "The bridge was finished in 1887 and widened in 1931.",
            "since 2004, when the old stadium closed, matches have been played here",
            "Born in 1746, she outlived both of her brothers.",
        ),
    ),
    (
        "Cooking instructions.",
        (
            "Fry the onions gently until they are soft, then stir in the rice.",
            "leave the dough under a damp cloth for an hour before you roll it out",
        ),
    ),
    (
        'Past-tense verbs that end in "ed".',
        (
            "She locked the shed, crossed the yard and waited.",
            "they walked as far as the mill and turned back when it rained",
        ),
    ),
    (
        "Computer code and those who write it.",
        (
            "The function returns an empty list if the file does not exist.",
            "every pull request is reviewed by two maintainers before it is merged",
        ),
    ),
    (
        "Questions put to somebody directly.",
        (
            "Where did you leave the keys?",
            '"Are you quite sure?" asked the clerk.',
            "Would you mind if I opened the window?",
        ),
    ),
    (
        "Courts, judges and trials.",
        (
            "The jury needed less than an hour to find him guilty.",
            "appealed to a higher court, which set the sentence aside",
        ),
    ),
)


def surprisal_prompt(explanation: str, window: str) -> PlainPrompt:
    """The worked blocks, the description, and the window as the first sentence under it.

    Args:
        explanation: As ``highlight.shown_explanation`` gives it, or :data:`UNRELATED`.
        window: Escaped, without marks. Spaces around it are dropped and one is put before it, which
            is all there is to score of a window without any other character.

    Raises:
        ValueError: If a part is not one line.
    """
    for part in (explanation, window):
        if part.splitlines() not in ([], [part]):
            raise ValueError(f"prompt: got {part!r}, wanted one line. Escape it (core.highlight).")
    given = f"{_STATIC}Description: {explanation}\nSentences:\n-"
    return PlainPrompt(f"{given} {window.strip(' ')}", len(given))


def _block(description: str, sentences: Sequence[str]) -> str:
    lines = "".join(f"- {sentence}\n" for sentence in sentences)
    return f"Description: {description}\nSentences:\n{lines}\n"


_STATIC = "".join(_block(description, sentences) for description, sentences in _WORKED)
"""What every prompt begins with."""
