"""The tokens of a prompt that a server echoed, and where each of them ends in the text.

Offsets that servers report cannot be trusted: SGLang reports none, vLLM counts the text of a
beginning-of-sequence token, llama_cpp.server leaves such a token away. So tokens are found in the
prompt one after the other; only a token that is no whole character is placed by its neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from autointerp_dagster.core.llm import Token

_SLACK = 32
"""Characters that tokens not found in the prompt (special ones, parts of characters) may span."""


def prompt_tokens(
    logprobs: Mapping[str, Any], prompt: str, start: int, n_written: int = 1, n_top: int = 0
) -> tuple[Token, ...] | None:
    """The prompt's tokens that end after ``start``, in order; null if the server gave none.

    The first token never counts: nothing is given before it. What was written after the prompt
    does not count either.

    Args:
        logprobs: Of a text completion with ``echo``: ``tokens``, ``token_logprobs`` and perhaps
            ``top_logprobs``, side by side.
        prompt: What was sent.
        start: In characters.
        n_written: How many tokens the model wrote after the prompt.
        n_top: How many candidates of each token are kept, the most probable first.

    Raises:
        KeyError, TypeError, ValueError: If ``logprobs`` has another form.
    """
    texts = [str(text) for text in logprobs["tokens"]]
    scores = list(logprobs["token_logprobs"])
    if len(texts) != len(scores):
        raise ValueError("wanted as many log-probabilities as tokens")
    tops = logprobs.get("top_logprobs") or [None] * len(texts)
    ends = _ends(texts, prompt, n_written)
    wanted = [i for i in range(1, len(ends)) if ends[i] > start]
    if not wanted or any(scores[i] is None for i in wanted):
        return None
    return tuple(Token(texts[i], float(scores[i]), best_of(tops[i], n_top)) for i in wanted)


def best_of(candidates: Mapping[str, Any] | None, n: int) -> tuple[tuple[str, float], ...]:
    """The ``n`` most probable of a text completion's candidates, in descending order."""
    if n == 0 or not candidates:
        return ()
    pairs = [(text, float(logprob)) for text, logprob in candidates.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:n])


def looks_shifted(tokens: Sequence[Token]) -> bool:
    """Whether the server gave each token the probabilities of the place after it.

    Then the most probable candidate of a place is the next token, not this one, again and again.
    llama_cpp.server does so where the prompt has no beginning-of-sequence token.

    Args:
        tokens: Of a prompt that is easy to guess, with candidates.
    """
    guesses = [token.top[0][0] if token.top else None for token in tokens]
    n_here = sum(guess == token.text for guess, token in zip(guesses, tokens, strict=True))
    n_next = sum(guess == token.text for guess, token in zip(guesses, tokens[1:], strict=False))
    return n_next > n_here


def _ends(texts: Sequence[str], prompt: str, n_written: int) -> list[int]:
    """Where each of the prompt's tokens ends, in characters; nothing for tokens after it."""
    ends: list[int] = []
    place, n_unplaced = 0, 0
    for text in texts:
        if place >= len(prompt):
            return ends
        found = _find(text, prompt, place)
        if found is None:
            n_unplaced += 1
            ends.append(len(prompt))
            continue
        ends[len(ends) - n_unplaced :] = [found] * n_unplaced  # they end where this one starts
        place, n_unplaced = found + len(text), 0
        ends.append(place)
    # The prompt ends within a character of several tokens: what was written stands behind these.
    return ends[: len(ends) - min(n_unplaced, n_written)] if place < len(prompt) else ends


def _find(text: str, prompt: str, place: int) -> int | None:
    """Where a token starts, at ``place`` or a little later; null if it is no text of its own."""
    if not text or "\ufffd" in text:
        return None
    found = prompt.find(text, place, place + len(text) + _SLACK)
    return None if found < 0 else found
