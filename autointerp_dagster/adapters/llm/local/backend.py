"""A transformers model in this process, one unit (one latent's prompts) at a time.

1. What many units begin with is run once and its cache kept: a chat's few-shot messages, or whole
   blocks of a plain text.
2. What a unit's prompts share beyond that (the explanation) is run once per unit.
3. The rest is run in batches whose composition depends on the unit alone, right-padded.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import torch
from transformers.cache_utils import DynamicCache

from autointerp_dagster.adapters.llm.backend import TOO_LONG, Reply
from autointerp_dagster.adapters.llm.local.continuation import continue_text
from autointerp_dagster.adapters.llm.local.decoding import decode_labels, decode_text
from autointerp_dagster.adapters.llm.local.integers import decode_integers
from autointerp_dagster.adapters.llm.local.model import LocalModel, identity_of, load_model
from autointerp_dagster.adapters.llm.local.prompts import Prompt, common_len, prompt_of
from autointerp_dagster.adapters.llm.local.scores import choose, score_prompts
from autointerp_dagster.core.config.models import LocalLLMConfig
from autointerp_dagster.core.llm import (
    Choice,
    Continuation,
    FreeText,
    IntegerList,
    LabelList,
    PromptScores,
    Request,
    Usage,
)

MAX_BATCH_TOKENS = 2048
"""Rows x longest row of a batch, prefix not counted: bounds the activations."""
MAX_CACHE_TOKENS = 16_384
"""Rows x (prefix + longest row): bounds the keys and values. An option of a choice is a row."""
NOTHING_GIVEN = "nothing_given"
"""Finish reason where a text's first token is wanted of a model without BOS."""

_Answering = Callable[[LocalModel, DynamicCache, Sequence[Prompt]], list[Reply]]

_ANSWERS: dict[type, _Answering] = {
    LabelList: decode_labels,
    FreeText: decode_text,
    Choice: choose,
    Continuation: continue_text,
    PromptScores: score_prompts,
    IntegerList: decode_integers,
}
_KINDS = list(_ANSWERS)


class LocalBackend:
    """A causal language model, loaded by the first unit.

    One without chat template answers plain texts only.
    """

    max_in_flight = 1
    capabilities: Mapping[str, bool] | None = MappingProxyType(
        dict.fromkeys(
            ("structured_outputs", "log_probabilities", "prompt_log_probabilities", "seed"), True
        )
    )

    def __init__(self, model_dir: Path, config: LocalLLMConfig) -> None:
        """Hash the model's files; the weights are loaded later.

        Args:
            model_dir: Folder in Hugging Face's layout.
            config: Dtype, device and threads. The number of threads is set for the whole process.

        Raises:
            ModelError: If ``model_dir`` holds no weights.
        """
        self._model_dir = model_dir
        self._config = config
        self.identity = identity_of(model_dir, config.dtype)
        self._worker = ThreadPoolExecutor(1, "local-llm", initializer=self._set_threads)

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Consecutive requests of one unit together."""
        return (list(unit) for _, unit in groupby(requests, key=lambda request: request.unit))

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self.run_unit, group)

    async def check(self) -> None:
        """Nothing to ask: the files were there when the backend was made."""

    async def close(self) -> None:
        """End the worker; the weights stay loaded for others."""
        self._worker.shutdown(wait=False)

    def run_unit(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; depends on these requests alone.

        Raises:
            ModelError: If the model cannot be loaded, or a chat is asked of a base model.
            ValueError: If a request has a chat where a plain text is wanted, or the reverse.
        """
        model = load_model(self._model_dir, self._config.dtype, self._config.device)
        replies: dict[str, Reply] = {}
        with model.running, torch.inference_mode():
            prompts = [
                prompt_of(model.tokenizer, request, request.call_id(self.identity))
                for request in requests
            ]
            open_: list[Prompt] = []
            for prompt in prompts:
                reply = _without_model(prompt, model.max_len)
                if reply is None:
                    open_.append(prompt)
                else:
                    replies[prompt.call_id] = reply
            for alike in _by_static(open_):
                replies |= _run_alike(model, alike)
        return [replies[prompt.call_id] for prompt in prompts]

    def _set_threads(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)


def _without_model(prompt: Prompt, max_len: int) -> Reply | None:
    """The reply to a prompt that the model cannot or need not be asked; null for any other."""
    if _full_len(prompt) > max_len:
        return Reply(text=None, finish_reason=TOO_LONG)
    if isinstance(prompt.request.answer, PromptScores) and not prompt.pieces:
        return Reply(text="", finish_reason="stop", tokens=(), usage=Usage(len(prompt.ids)))
    if len(prompt.ids) <= len(prompt.pieces):
        return Reply(text=None, finish_reason=NOTHING_GIVEN)
    return None


def _run_alike(model: LocalModel, prompts: list[Prompt]) -> dict[str, Reply]:
    """Replies by call id for the prompts of a unit that start with the same static tokens."""
    static = prompts[0].static
    prefix_len = 0 if static is None else len(static)
    if static is None or len(prompts) > 1:
        prefix_len = max(prefix_len, common_len([prompt.given for prompt in prompts]))
    ids = prompts[0].ids[:prefix_len]
    if static is None:
        kept = model.block_prefix(ids)
    else:
        kept = model.extended(model.prefix(static), ids[len(static) :])
    replies: dict[str, Reply] = {}
    for batch in batches_of(prompts, prefix_len):
        answers = _ANSWERS[type(batch[0].request.answer)](model, kept, batch)
        replies |= {p.call_id: reply for p, reply in zip(batch, answers, strict=True)}
    if static is None:  # somebody has paid for the prefix
        payer = min(replies)
        usage = replace(replies[payer].usage, cached_tokens=0)
        replies[payer] = replace(replies[payer], usage=usage)
    return replies


def batches_of(prompts: Sequence[Prompt], prefix_len: int) -> Iterator[list[Prompt]]:
    """Prompts of like length and answer together, within the bounds on padded tokens.

    Depends on the set of prompts only, not on their order.
    """

    def order(prompt: Prompt) -> tuple[int, int, str]:
        return _KINDS.index(type(prompt.request.answer)), _full_len(prompt), prompt.call_id

    batch: list[Prompt] = []
    n_rows = 0
    for prompt in sorted(prompts, key=order):
        longest = _full_len(prompt)  # sorted: the longest so far
        n_rows += max(1, len(prompt.options))
        is_full = (
            n_rows * (longest - prefix_len) > MAX_BATCH_TOKENS
            or n_rows * longest > MAX_CACHE_TOKENS
        )
        if batch and (is_full or order(batch[0])[0] != order(prompt)[0]):
            yield batch
            batch = []
            n_rows = max(1, len(prompt.options))
        batch.append(prompt)
    if batch:
        yield batch


def _by_static(prompts: list[Prompt]) -> list[list[Prompt]]:
    groups: dict[tuple[int, ...] | None, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.static, []).append(prompt)
    return list(groups.values())


def _full_len(prompt: Prompt) -> int:
    """Tokens of prompt and longest answer."""
    answer = prompt.request.answer
    if isinstance(answer, LabelList):
        return len(prompt.ids) + 3 * answer.n
    if isinstance(answer, IntegerList):
        return len(prompt.ids) + 5 * answer.n
    if isinstance(answer, Choice):
        return len(prompt.ids) + max(map(len, prompt.options))
    if isinstance(answer, PromptScores):
        return len(prompt.ids)
    return len(prompt.ids) + prompt.request.max_tokens
