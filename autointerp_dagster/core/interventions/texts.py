"""Prompts, continuations and single tokens as text, also where a cut falls inside a character."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from autointerp_dagster.core.tokens import Detokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def prompt_text(detokenizer: Detokenizer, prompt: Int[np.ndarray, " position"]) -> str:
    """The text of a prompt; bytes of a character that it ends in the middle of are left out."""
    return "".join(detokenizer.pieces(prompt)).rstrip(_REPLACEMENT)


def continuation_text(
    detokenizer: Detokenizer,
    prompt: Int[np.ndarray, " position"],
    continuation: Int[np.ndarray, " later"],
    ends: frozenset[int],
) -> str:
    """The text that follows :func:`prompt_text`: a character begun in the prompt stands here.

    Args:
        detokenizer: Of the subject model.
        prompt: Its tokens.
        continuation: Tokens after it.
        ends: Tokens that end a text: what follows the first of them is left out.
    """
    is_end = np.isin(continuation, list(ends))
    n_kept = int(is_end.argmax()) if is_end.any() else len(continuation)
    whole = np.concatenate([prompt, continuation[:n_kept].astype(prompt.dtype)])
    return "".join(detokenizer.pieces(whole)[len(prompt) :])


def promoted_texts(
    detokenizer: Detokenizer,
    prompt: Int[np.ndarray, " position"],
    tokens: Sequence[int],
    rises: Sequence[float],
    n_promoted: int,
) -> tuple[list[str], list[float]]:
    """What the tokens whose probability rose most read as after a prompt, with the rises.

    Args:
        detokenizer: Of the subject model.
        prompt: Its tokens.
        tokens: By rise, descending.
        rises: Of their probabilities.
        n_promoted: Kept at most. Tokens that are no text (special ones) and tokens that did not
            rise are left out.
    """
    texts: list[str] = []
    kept: list[float] = []
    for token, rise in zip(tokens, rises, strict=True):
        text = detokenizer.pieces(np.append(prompt, np.array(token, dtype=prompt.dtype)))[-1]
        if text and rise > 0 and len(texts) < n_promoted:
            texts.append(text)
            kept.append(rise)
    return texts, kept
