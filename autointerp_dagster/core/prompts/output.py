"""The ``output`` explainer's text: what do the words have in common that a unit makes likelier?

A plain text that a base model completes: three worked neurons, then the one in question, up to the
word "Explanation:".

Source:
    The task is that of arXiv 2410.13928, section 3.3; the wording and the examples are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

OUTPUT_VERSION = "2"
"""Changes with every word below, and with how a token is quoted."""

EXPLANATION_LABEL = "Explanation:"
"""Opens the last line of a neuron; nothing stands after it in the question."""

_TASK = (
    "Notes on neurons of a language model. Each neuron was switched on at the end of some texts. "
    "Below every text stand the tokens that became likelier there as the next one, with the rise "
    "of their probability in brackets. The last line says what the tokens of the neuron have in "
    "common.\n\n"
)


class PromotedAfter(NamedTuple):
    """A text that breaks off, and what a neuron makes likelier next."""

    text: str
    """Escaped; one line."""
    promoted: tuple[tuple[str, float], ...]
    """Tokens, escaped, with the rise of their probability in (0, 1]; descending."""


class _WorkedNeuron(NamedTuple):
    examples: tuple[PromotedAfter, ...]
    explanation: str


_WORKED = (
    _WorkedNeuron(
        (
            PromotedAfter(
                "We rented a boat for the afternoon and paid",
                ((" two", 0.141), (" 20", 0.118), (" five", 0.064), (" 100", 0.052), (" 3", 0.031)),
            ),
            PromotedAfter(
                "The recipe is on page",
                (("12", 0.093), ("7", 0.087), (" four", 0.071), ("30", 0.044), ("5", 0.029)),
            ),
            PromotedAfter(
                "Nobody remembers the winter of",
                ((" 18", 0.202), (" 19", 0.187), (" six", 0.012), ("16", 0.009), (" 1", 0.008)),
            ),
        ),
        "numbers",
    ),
    _WorkedNeuron(
        (
            PromotedAfter(
                "My grandmother sat down by the stove and",
                (
                    (" told", 0.233),
                    (" began", 0.104),
                    (" tale", 0.037),
                    (" once", 0.022),
                    (" story", 0.016),
                ),
            ),
            PromotedAfter(
                "The children would not sleep until they heard the",
                (
                    (" story", 0.284),
                    (" tale", 0.171),
                    (" legend", 0.046),
                    (" ending", 0.019),
                    (" narr", 0.011),
                ),
            ),
            PromotedAfter(
                "In this valley there is a",
                (
                    (" legend", 0.158),
                    (" tale", 0.096),
                    (" story", 0.083),
                    (" myth", 0.034),
                    (" fable", 0.017),
                ),
            ),
        ),
        "storytelling",
    ),
    _WorkedNeuron(
        (
            PromotedAfter(
                "She came back from the market with a bag of",
                (
                    (" apples", 0.162),
                    (" carrots", 0.108),
                    (" pears", 0.077),
                    (" onions", 0.054),
                    (" plums", 0.041),
                ),
            ),
            PromotedAfter(
                "Beside the keyboard lay half a",
                (
                    (" lemon", 0.119),
                    (" cucumber", 0.066),
                    (" melon", 0.058),
                    (" banana", 0.049),
                    (" apple", 0.027),
                ),
            ),
            PromotedAfter(
                "The doctor advised him to",
                (
                    (" fruit", 0.021),
                    (" spinach", 0.014),
                    (" cabbage", 0.009),
                    (" berries", 0.007),
                    (" beans", 0.006),
                ),
            ),
        ),
        "fruits and vegetables",
    ),
)


def output_prompt(examples: Sequence[PromotedAfter], n_tokens: int) -> str:
    """The text that a base model is to complete with an explanation and a line break.

    Args:
        examples: Of the neuron in question, at least one.
        n_tokens: Tokens shown per text at most, here and in the worked neurons.

    Raises:
        ValueError: If there is no example, or a part is not one line.
    """
    if not examples:
        raise ValueError("prompt: got no example, wanted at least one. Leave the prompt out.")
    parts = [_TASK]
    for number, neuron in enumerate(_WORKED, start=1):
        shown = _neuron(number, neuron.examples, n_tokens)
        parts.append(f"{shown} {neuron.explanation}\n\n")
    return "".join(parts) + _neuron(len(_WORKED) + 1, examples, n_tokens)


def _neuron(number: int, examples: Sequence[PromotedAfter], n_tokens: int) -> str:
    """A neuron up to its label for the explanation."""
    lines = [f"Neuron {number}"]
    for example in examples:
        tokens = example.promoted[:n_tokens]
        listed = ", ".join(f"{_quoted(token)} (+{rise:.3f})" for token, rise in tokens)
        lines += [f"Text: {example.text.strip(' ')}", f"Likelier: {listed}"]
    for line in lines:
        if line.splitlines() != [line]:
            raise ValueError(f"prompt: got {line!r}, wanted one line. Escape it (core.highlight).")
    return "\n".join([*lines, EXPLANATION_LABEL])


def _quoted(token: str) -> str:
    r"""In quotes; one inside becomes ``\"``, which no escaped text holds by itself."""
    said = (token.strip(" ") or " ").replace('"', '\\"')
    return f'"{said}"'
