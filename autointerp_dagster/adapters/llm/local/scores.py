"""Log-probabilities of given tokens: of a plain text's own, and of the options of a choice.

The output head is run only at the places that are wanted, in fp32, some at a time.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local.decoding import Draw
from autointerp_dagster.adapters.llm.local.model import Batch, LocalModel
from autointerp_dagster.adapters.llm.local.prompts import Prompt, encoded
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.llm import Choice, PromptScores, Token, Usage

HEAD_ROWS = 256
"""Places whose logits over the whole vocabulary are in memory together."""

Top = tuple[tuple[str, float], ...]


class Places(NamedTuple):
    """What the model says at some places. Natural logarithms over the whole vocabulary."""

    logprobs: list[float]
    """Of the token that stands there."""
    ends: list[float]
    """Of any token that ends the turn."""
    tops: list[Top]
    """The most probable tokens, best first."""
    named: list[list[float]]
    """Of the tokens asked about by name, in their order."""


def score_prompts(model: LocalModel, kept: DynamicCache, prompts: Sequence[Prompt]) -> list[Reply]:
    """The log-probabilities of each prompt's last tokens, each given all before it.

    Args:
        model: The model.
        kept: Cache of a prefix of what all prompts give; not written to.
        prompts: Requests for prompt scores with at least one token wanted and one given.

    Returns:
        In order; ``text`` is empty and ``tokens`` are those of the prompt.
    """
    prefix_len = int(kept.get_seq_length())
    # The step begins with the last given token, so the first wanted one is scored like the others.
    steps = [prompt.ids[prefix_len:-1] for prompt in prompts]
    states = model.states(Batch(kept, len(prompts)), steps)
    counts = [len(prompt.pieces) for prompt in prompts]
    wanted = [
        states[row, len(step) - n : len(step)]
        for row, (step, n) in enumerate(zip(steps, counts, strict=True))
    ]
    targets = [token for p, n in zip(prompts, counts, strict=True) for token in p.ids[-n:]]
    n_top = max((p.request.top_logprobs for p in prompts if not _named_by(p)), default=0)
    named = _candidates(model, prompts)
    places = torch.cat(wanted)
    found = score_places(model, places, torch.tensor(targets), n_top, tuple(named.values()))
    return [
        Reply(
            text="",
            finish_reason="stop",
            tokens=tuple(
                Token(piece, found.logprobs[place], _top_at(prompt, found, place, list(named)))
                for piece, place in zip(prompt.pieces, range(start, stop), strict=True)
            ),
            usage=Usage(len(prompt.ids), prefix_len, 0),
        )
        for prompt, (start, stop) in zip(
            prompts, pairwise(accumulate(counts, initial=0)), strict=True
        )
    ]


def _candidates(model: LocalModel, prompts: Sequence[Prompt]) -> dict[str, int]:
    """The token of each text that some prompt names; one of several tokens is left out."""
    names = {name for prompt in prompts for name in _named_by(prompt)}
    before = encoded(model.tokenizer, "\n")
    ids = {name: encoded(model.tokenizer, f"\n{name}") for name in sorted(names)}
    n = len(before)
    return {name: i[-1] for name, i in ids.items() if i[:n] == before and len(i) == n + 1}


def _named_by(prompt: Prompt) -> tuple[str, ...]:
    answer = prompt.request.answer
    return answer.candidates if isinstance(answer, PromptScores) else ()


def _top_at(prompt: Prompt, found: Places, place: int, names: Sequence[str]) -> Top:
    """What is told of one place: the candidates that the prompt names, else the most probable."""
    wanted = _named_by(prompt)
    if not wanted:
        return found.tops[place][: prompt.request.top_logprobs]
    pairs = zip(names, found.named[place], strict=True)
    return tuple(sorted((p for p in pairs if p[0] in wanted), key=lambda p: (-p[1], p[0])))


def choose(model: LocalModel, kept: DynamicCache, prompts: Sequence[Prompt]) -> list[Reply]:
    """The option of each prompt that is most probable as the whole answer.

    An option's log-probability is that of its tokens and of the turn's end after them, so that
    ``1`` is not preferred to ``10`` for being its beginning. The options are disjoint events: their
    probabilities sum to at most 1, and P(option | one of the options) is the softmax over them.

    Args:
        model: The model.
        kept: Cache of a prefix of every prompt; not written to.
        prompts: Requests for a choice, each longer than the prefix. At temperature > 0 the answer
            is drawn from that softmax.

    Returns:
        In order. ``tokens`` is a single one: the whole option, with the log-probabilities of all
        options in ``top``, best first.

    Raises:
        ModelError: If the model has no token that ends a turn.
    """
    if not model.stop_ids:
        raise ModelError(
            f"{model.tokenizer.name_or_path}: no token ends a turn, so options cannot be compared. "
            "Declare eos_token_id in generation_config.json."
        )
    prefix_len = int(kept.get_seq_length())
    batch = Batch(kept, len(prompts))
    questions = model.hidden(batch, [prompt.ids[prefix_len:] for prompt in prompts])
    totals = iter(_option_logprobs(model, batch, questions, prompts))
    return [
        _chosen(prompt, [next(totals) for _ in prompt.options], prefix_len) for prompt in prompts
    ]


def score_places(
    model: LocalModel,
    hidden: Float[Tensor, "place d_in"],
    targets: Int[Tensor, " place"],
    n_top: int = 0,
    named: Sequence[int] = (),
) -> Places:
    """What the model says at each place.

    Args:
        model: The model.
        hidden: The last layer's output before each place.
        targets: The token at each place.
        n_top: Most probable tokens to tell of each place.
        named: Tokens to tell of at each place, however improbable.
    """
    ends = torch.tensor(sorted(model.stop_ids), dtype=torch.long, device=model.device)
    found = Places([], [], [], [])
    for states, tokens in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logprobs = torch.log_softmax(model.fine_head(states), dim=-1)
        found.logprobs.extend(logprobs.gather(1, tokens.to(model.device)[:, None])[:, 0].tolist())
        found.ends.extend(logprobs[:, ends].logsumexp(dim=-1).tolist())
        found.tops.extend(top_of(model, row, n_top) for row in logprobs)
        found.named.extend(logprobs[:, list(named)].tolist())
    return found


def top_of(model: LocalModel, logprobs: Float[Tensor, " token"], n_top: int) -> Top:
    """The most probable tokens and their log-probabilities, best first."""
    if n_top == 0:
        return ()
    best = logprobs.topk(min(n_top, len(logprobs)))
    texts = map(model.text_of, best.indices.tolist())
    return tuple(zip(texts, best.values.tolist(), strict=True))


def _option_logprobs(
    model: LocalModel,
    batch: Batch,
    questions: Float[Tensor, "prompt d_in"],
    prompts: Sequence[Prompt],
) -> list[float]:
    """The log-probability of each option of each prompt, and the end of the turn after it."""
    options = [option for prompt in prompts for option in prompt.options]
    copies = [len(prompt.options) for prompt in prompts]
    owners = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies))
    firsts = torch.tensor([option[0] for option in options])
    begun = score_places(model, questions[owners.to(model.device)], firsts)
    batch.repeat(copies)
    states = model.states(batch, options)
    places = torch.cat([states[row, : len(option)] for row, option in enumerate(options)])
    # What stands after an option's last token does not matter: only the turn's end is read there.
    targets = torch.tensor([token for option in options for token in (*option[1:], option[0])])
    rest = score_places(model, places, targets)
    totals: list[float] = []
    borders = pairwise(accumulate(map(len, options), initial=0))
    for first, (start, stop) in zip(begun.logprobs, borders, strict=True):
        totals.append(first + sum(rest.logprobs[start : stop - 1]) + rest.ends[stop - 1])
    return totals


def _chosen(prompt: Prompt, totals: list[float], prefix_len: int) -> Reply:
    answer = prompt.request.answer
    assert isinstance(answer, Choice)
    best = Draw(prompt)(torch.tensor(totals, dtype=torch.float64))
    option = answer.options[best]
    ranked = sorted(zip(answer.options, totals, strict=True), key=lambda pair: -pair[1])
    return Reply(
        text=option,
        finish_reason="stop",
        tokens=(Token(option, totals[best], tuple(ranked)),),
        usage=Usage(len(prompt.ids), prefix_len, len(prompt.options[best])),
    )
