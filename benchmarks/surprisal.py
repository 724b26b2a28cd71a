"""The surprisal scorer on a local model, against one whole prompt at a time without a cache.

The embedded SmolLM2-135M in float32; two latents with two explanations each and 40 windows of about
32 tokens, half of which both latents show. Ours is the whole scorer with its journal and starts
cold: prefixes are computed inside the clock. The plain loop runs a prompt per forward pass and the
output head at all its places; it too runs a window under z0 once, whoever shows it. It takes only
every tenth window, and the two are compared by CPU-seconds per prompt.
"""

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from transformers import AutoModelForCausalLM
from upath import UPath

from autointerp_dagster.adapters.embedded import english_documents, smollm2_dir
from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import LocalModel, load_model
from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import LocalLLMConfig, SurprisalConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.prompts.surprisal import UNRELATED, surprisal_prompt
from autointerp_dagster.core.scorers import surprisal
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict
from autointerp_dagster.core.types import LatentId
from benchmarks.measure import Result, cpu_seconds

EXPLANATIONS = ("names of rivers and towns", "verbs of motion in the past tense")
N_WINDOWS = 40
N_SHARED = 20
WORDS = 24
STRIDE = 10
NATS = 1e-4
"""Per token."""
BAR = 5.0

Asked = tuple[str, int]
"""A description and the number of a text."""


class Texts:
    """The detokenizer: a window's only token is the number of its text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def pieces(self, tokens: Int[np.ndarray, " position"]) -> list[str]:
        """The whole text."""
        return [self.texts[int(token)] for token in tokens]


def run() -> list[Result]:
    """Prompts per CPU-second, as a ratio."""
    torch.set_num_threads(1)
    folder = smollm2_dir()
    texts, jobs = _texts(), [_job(0), _job(1)]
    model = load_model(folder, "float32", "cpu")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, ours_s = cpu_seconds(lambda: _ours(folder, model, jobs, texts))
    n_ours = len({asked for job in jobs for asked in _asked(job, 1)}) + len(found) // 2
    sample = sorted({asked for job in jobs for asked in _asked(job, STRIDE)}) + [
        (task.text, int(w.tokens[0]))
        for job in jobs
        for task in job.tasks
        for w in job.record.windows[::STRIDE]
    ]
    expected, plain_s = cpu_seconds(
        lambda: {asked: _plain(whole, model, asked[0], texts[asked[1]]) for asked in sample}
    )
    _check(found, expected, jobs)
    ratio = (plain_s / len(sample)) / (ours_s / n_ours)
    name = "surprisal scorer against whole prompts"
    return [Result(name, ratio, BAR, "x prompts/CPU-s")]


def _ours(
    folder: Path, model: LocalModel, jobs: Sequence[Job], texts: Sequence[str]
) -> list[Verdict]:
    model.blocks.clear()
    config = LocalLLMConfig(source=str(folder), dtype="float32", device="cpu", threads=1)
    with (
        tempfile.TemporaryDirectory() as store,
        Journal(UPath(store)) as journal,
        JournaledLLM(LocalBackend(folder, config), journal) as llm,
    ):
        return list(surprisal.verdicts(jobs, SurprisalConfig(), Texts(texts), llm, _block_of))


def _block_of(latent: LatentId) -> JournalBlock:
    return JournalBlock("score_surprisal", latent.coder, 0)


def _plain(
    whole: torch.nn.Module, model: LocalModel, description: str, text: str
) -> tuple[float, int]:
    """Log-probability and number of the window's tokens, by one forward over the whole prompt."""
    prompt = surprisal_prompt(description, highlight.escape(text))
    tokens = model.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([model.tokenizer.bos_token_id, *tokens["input_ids"]])
    n = sum(end > prompt.start for _, end in tokens["offset_mapping"])
    with torch.inference_mode():
        logits = whole(input_ids=ids[None], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)[:-1].gather(1, ids[1:, None])[-n:]
    return float(logprobs.double().sum()), n


def _check(
    found: Sequence[Verdict], expected: dict[Asked, tuple[float, int]], jobs: Sequence[Job]
) -> None:
    """Every row of the sampled windows is that of the plain loop."""
    scores = {
        (v.latent.index, v.explainer, v.window_id): v.score
        for v in found
        if v.variant == surprisal.PER_TOKEN_VARIANT
    }
    for job in jobs:
        for task in job.tasks:
            for window in job.record.windows[::STRIDE]:
                text = int(window.tokens[0])
                (given, n), (background, _) = expected[task.text, text], expected[UNRELATED, text]
                score = scores[job.record.latent.index, task.explainer, window.window_id]
                assert score is not None
                assert abs(score - (given - background) / n) < NATS


def _asked(job: Job, stride: int) -> list[Asked]:
    """The windows under z0."""
    return [(UNRELATED, int(window.tokens[0])) for window in job.record.windows[::stride]]


def _texts() -> list[str]:
    """The first words of each document that is long enough."""
    stretches = (document.text.split() for document in english_documents())
    long = (words for words in stretches if len(words) >= WORDS)
    return [f" {' '.join(words[:WORDS])}" for words in islice(long, 2 * N_WINDOWS - N_SHARED)]


def _job(index: int) -> Job:
    first = index * (N_WINDOWS - N_SHARED)
    latent = LatentId("sae", "layers.3", index)
    windows = tuple(_window(number) for number in range(first, first + N_WINDOWS))
    tasks = tuple(
        ScoringTask(latent, f"e{i}", "own", index, f"{text}, {index}")
        for i, text in enumerate(EXPLANATIONS)
    )
    return Job(LatentRecord(latent, "ok", 1.0, (), (), windows), tasks)


def _window(number: int) -> Window:
    is_activating = number % 2 == 0
    return Window(
        window_id=number << 16,
        context=number,
        start=0,
        split="test",
        is_activating=is_activating,
        negative_kind=None if is_activating else "random",
        quantile=0 if is_activating else None,
        rank=number,
        tokens=np.array([number], dtype=np.int32),
        activations=np.array([float(is_activating)], dtype=np.float32),
    )
