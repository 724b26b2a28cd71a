"""A transformers chat model in this process, one unit (one latent's prompts) at a time.

1. The few-shot messages that all units share are run once; their cache is kept.
2. What a unit's prompts share beyond that (the explanation) is run once per unit.
3. The rest is run in batches whose composition depends on the unit alone, right-padded.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local_decoding import decode_labels, decode_text
from autointerp_dagster.adapters.llm.local_model import ChatModel, identity_of, load_chat_model
from autointerp_dagster.adapters.llm.local_prompts import (
    LabelForm,
    Prompt,
    common_len,
    label_form,
    prompt_of,
)
from autointerp_dagster.core.config.models import LocalLLMConfig
from autointerp_dagster.core.llm import LabelList, Request

MAX_BATCH_TOKENS = 2048
"""Rows x longest row of a batch, prefix not counted: bounds the activations."""
MAX_CACHE_TOKENS = 16_384
"""Rows x (prefix + longest row): bounds the keys and values."""


class LocalBackend:
    """A causal language model with a chat template, loaded by the first unit."""

    max_in_flight = 1

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
        self._form: LabelForm | None = None
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
            ModelError: If the model cannot be loaded or used for labels.
        """
        model = load_chat_model(self._model_dir, self._config.dtype, self._config.device)
        if self._form is None:
            self._form = label_form(model.tokenizer)
        prompts = [
            prompt_of(model.tokenizer, self._form, request, request.call_id(self.identity))
            for request in requests
        ]
        replies: dict[str, Reply] = {}
        with model.running, torch.inference_mode():
            fitting = [p for p in prompts if _full_len(p) <= model.max_len]
            for static, alike in _by_static(fitting):
                replies |= _run_alike(model, self._form, static, alike)
        too_long = Reply(text=None, finish_reason="too_long")
        return [replies.get(prompt.call_id, too_long) for prompt in prompts]

    def _set_threads(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)


def _run_alike(
    model: ChatModel, form: LabelForm, static: tuple[int, ...], prompts: list[Prompt]
) -> dict[str, Reply]:
    """Replies by call id for the prompts of a unit that start with the same static tokens."""
    prefix_len = len(static)
    if len(prompts) > 1:
        prefix_len = max(prefix_len, common_len([prompt.ids[:-1] for prompt in prompts]))
    kept = model.extended(model.prefix(static), prompts[0].ids[len(static) : prefix_len])
    replies: dict[str, Reply] = {}
    for batch in batches_of(prompts, prefix_len):
        if isinstance(batch[0].request.answer, LabelList):
            answers = decode_labels(model, form, kept, batch)
        else:
            answers = decode_text(model, kept, batch)
        replies |= {p.call_id: reply for p, reply in zip(batch, answers, strict=True)}
    return replies


def batches_of(prompts: Sequence[Prompt], prefix_len: int) -> Iterator[list[Prompt]]:
    """Prompts of like length and answer together, within the bounds on padded tokens.

    Depends on the set of prompts only, not on their order.
    """

    def order(prompt: Prompt) -> tuple[bool, int, str]:
        is_text = not isinstance(prompt.request.answer, LabelList)
        return is_text, _full_len(prompt), prompt.call_id

    batch: list[Prompt] = []
    for prompt in sorted(prompts, key=order):
        longest = _full_len(prompt)  # sorted: the longest so far
        n_rows = len(batch) + 1
        is_full = (
            n_rows * (longest - prefix_len) > MAX_BATCH_TOKENS
            or n_rows * longest > MAX_CACHE_TOKENS
        )
        if batch and (is_full or order(batch[0])[0] != order(prompt)[0]):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _by_static(prompts: list[Prompt]) -> list[tuple[tuple[int, ...], list[Prompt]]]:
    groups: dict[tuple[int, ...], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.static, []).append(prompt)
    return list(groups.items())


def _full_len(prompt: Prompt) -> int:
    """Tokens of prompt and longest answer."""
    answer = prompt.request.answer
    n_new = 3 * answer.n if isinstance(answer, LabelList) else prompt.request.max_tokens
    return len(prompt.ids) + n_new
