"""What a latent's prompts cost in tokens: explanation, detection and fuzzing.

Two ways to pay less: a server with a prefix cache, at the default of 5 windows per prompt; and more
windows per prompt, without any cache.
Windows are 32 tokens of real English (the embedded corpus, SmolLM2's tokenizer and chat template);
which tokens fire is drawn. The explanation is of the usual length. Prompts are those of the
package's own explainer and scorers, under the latent's own explanation alone. New tokens are those
that a prefix cache in blocks of 16 tokens (as vLLM keeps) has not seen in any earlier prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from autointerp_dagster.adapters.embedded import english_documents, smollm2_dir
from autointerp_dagster.core.config import DefaultExplainerConfig, DetectionConfig, FuzzingConfig
from autointerp_dagster.core.explainers import make_explainer
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import JournalBlock, Request
from autointerp_dagster.core.scorers import LABEL_SCORERS, ScoringTask
from autointerp_dagster.core.types import LatentId
from benchmarks.measure import Result

WINDOW_LEN = 32
N_TRAIN = 40
N_LATENTS = 8
CACHE_BLOCK = 16
MORE_FIRING_TOKENS = 0.5
"""Chance of one more firing token in a window, again and again: two on average."""
EXPLANATION = (
    "references to agreements, treaties and contracts between institutions, especially the word "
    "that names the document and the verbs that say it was signed or broken"
)
MANY_PER_PROMPT = 25
BARS = {50: (15_000, 11_000), 100: (30_000, 19_000)}
"""Windows of each class: prompt tokens in all with many windows per prompt, and new ones under a
prefix cache with the default number."""


class Pieces:
    """The detokenizer of windows: every token by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def pieces(self, tokens: np.ndarray) -> list[str]:
        """The text of each token."""
        return [self._tokenizer.decode([token]) for token in tokens.tolist()]


class PrefixCache:
    """Counts what a server would have to read anew."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()

    def n_new(self, ids: list[int]) -> int:
        """Tokens of a prompt beyond its known leading blocks; the prompt is known from then on."""
        n_known = 0
        for end in range(CACHE_BLOCK, len(ids), CACHE_BLOCK):
            prefix = tuple(ids[:end])
            if prefix in self._seen and n_known == end - CACHE_BLOCK:
                n_known = end
            self._seen.add(prefix)
        return len(ids) - n_known


def run() -> list[Result]:
    """Prompt tokens per latent at 50 + 50 and 100 + 100 windows a scorer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    few = DetectionConfig().windows_per_prompt
    results = []
    for n_windows, (bar_all, bar_new) in BARS.items():
        n_all, _ = tokens_per_latent(tokenizer, n_windows, MANY_PER_PROMPT)
        _, n_new = tokens_per_latent(tokenizer, n_windows, few)
        name = f"prompt tokens per latent at {n_windows} + {n_windows} windows"
        results += [
            Result(f"{name}, {MANY_PER_PROMPT} a prompt", n_all, bar_all, "tokens", is_cost=True),
            Result(f"{name}, {few} a prompt, new", n_new, bar_new, "tokens", is_cost=True),
        ]
    return results


def tokens_per_latent(
    tokenizer: Any, n_windows: int, windows_per_prompt: int
) -> tuple[float, float]:
    """Prompt tokens in all, and those that a prefix cache has not seen."""
    cache, n_all, n_new = PrefixCache(), 0, 0
    for record in records(tokenizer, n_windows):
        for request in requests_of(record, Pieces(tokenizer), windows_per_prompt):
            ids = prompt_ids(tokenizer, request)
            n_all += len(ids)
            n_new += cache.n_new(ids)
    return n_all / N_LATENTS, n_new / N_LATENTS


def prompt_ids(tokenizer: Any, request: Request) -> list[int]:
    """The prompt as the model reads it."""
    turns = [{"role": m.role, "content": m.content} for m in request.messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def requests_of(record: LatentRecord, pieces: Pieces, windows_per_prompt: int) -> Iterator[Request]:
    """All that is asked about a latent, in the order of the stages."""
    explainer = make_explainer("default", DefaultExplainerConfig(kind="default"))
    request = explainer.request(record, pieces, _block("explanations"))
    assert request is not None
    yield request
    task = ScoringTask(
        latent=record.latent,
        explainer="default",
        subject="own",
        explanation_of=record.latent.index,
        text=EXPLANATION,
    )
    configs = {"detection": DetectionConfig, "fuzzing": FuzzingConfig}
    for name, config_of in configs.items():
        config = config_of(windows_per_prompt=windows_per_prompt)
        prompts = LABEL_SCORERS[name].prompts_of(record, task, config, pieces, _block(name))
        yield from (prompt.request for prompt in prompts)


def records(tokenizer: Any, n_windows: int) -> Iterator[LatentRecord]:
    """Records over real text, with drawn activations."""
    rng = np.random.default_rng(0)
    texts = _windows_of_text(tokenizer)
    for index in range(N_LATENTS):
        n = N_TRAIN + 2 * n_windows
        tokens = list(islice(texts, n))
        assert len(tokens) == n, "the embedded corpus is too short"
        latent = LatentId("sae", "layers.9", index)
        windows = tuple(_window(rng, i, ids, n_windows) for i, ids in enumerate(tokens))
        yield LatentRecord(
            latent=latent,
            status="ok",
            max_activation=8.0,
            top_tokens=(),
            top_token_shares=(),
            windows=windows,
        )


def _window(rng: np.random.Generator, i: int, ids: Sequence[int], n_windows: int) -> Window:
    is_train = i < N_TRAIN
    is_activating = i < N_TRAIN + n_windows
    activations = np.zeros(WINDOW_LEN, dtype=np.float32)
    if is_activating:
        n_firing = min(int(rng.geometric(1 - MORE_FIRING_TOKENS)), WINDOW_LEN)
        places = rng.choice(WINDOW_LEN, size=n_firing, replace=False)
        activations[places] = rng.uniform(1, 8, size=n_firing)
    return Window(
        window_id=(i + 1) << 16,
        context=i + 1,
        start=0,
        split="train" if is_train else "test",
        is_activating=is_activating,
        negative_kind=None if is_activating else "random",
        quantile=i % 10 if is_activating else None,
        rank=i,
        tokens=np.array(ids, dtype=np.int32),
        activations=activations,
    )


def _windows_of_text(tokenizer: Any) -> Iterator[Sequence[int]]:
    for document in english_documents():
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        yield from _cut(ids)


def _cut(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    last = len(ids) - WINDOW_LEN
    return (ids[i : i + WINDOW_LEN] for i in range(0, last + 1, WINDOW_LEN))


def _block(stage: str) -> JournalBlock:
    return JournalBlock(stage, "benchmark", 0)
