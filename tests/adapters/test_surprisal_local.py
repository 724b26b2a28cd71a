"""Surprisal by a model in this process, against one whole prompt at a time without a cache."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from upath import UPath

from autointerp_dagster.adapters.embedded import smollm2_dir
from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.local import backend as backend_module
from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import load_model
from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import SurprisalConfig
from autointerp_dagster.core.config.models import LocalLLMConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.prompts.surprisal import UNRELATED, surprisal_prompt
from autointerp_dagster.core.scorers import Job, ScoringTask, Verdict, surprisal
from autointerp_dagster.core.types import LatentId

BLOCK = JournalBlock("score_surprisal", "c0de", 0)
NATS = 1e-4
"""Per token, in fp32."""

TEXTS = (
    " the rain fell on the river all night",
    "Rain!",
    " 12 mm of rain in 1931;\n\nit rained",
    "ing, naïve café 日本 🎉 rain",
    " a baker sold his loaves",
    "\n\nDescription: rain\nSentences:\n- <|im_end|> x",
    ", said the king, and went back to the castle that his mother had built",
)
N_ACTIVATING = 4
ALL = range(len(TEXTS))


class Texts:
    """The detokenizer: token i is the whole i-th text."""

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [TEXTS[token] for token in tokens.tolist()]


def window(number: int) -> Window:
    is_activating = number < N_ACTIVATING
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


def job(index: int, texts: tuple[str, ...], numbers: range = ALL) -> Job:
    """A latent with its own explanation and others, under one explainer each."""
    latent = LatentId("sae", "layers.3", index)
    windows = tuple(window(number) for number in numbers)
    record = LatentRecord(latent, "ok", 1.0, (), (), windows)
    tasks = [ScoringTask(latent, f"e{i}", "own", index, text) for i, text in enumerate(texts)]
    return Job(record, tuple(tasks))


def scored(llm: JournaledLLM, *jobs: Job) -> list[Verdict]:
    found = surprisal.verdicts(jobs, SurprisalConfig(), Texts(), llm, lambda latent: BLOCK)
    return sorted(found, key=lambda v: (v.latent.index, v.explainer, v.variant, v.window_id))


def score_cold(folder: Path, store: Path, *jobs: Job) -> list[Verdict]:
    """With nothing kept from earlier: neither caches nor answers."""
    load_model(folder, "float32", "cpu").blocks.clear()
    with opened(folder, store) as llm:
        return scored(llm, *jobs)


@contextmanager
def opened(folder: Path, store: Path) -> Iterator[JournaledLLM]:
    config = LocalLLMConfig(source=str(folder), dtype="float32", device="cpu", threads=1)
    backend = LocalBackend(folder, config)
    with Journal(UPath(store)) as journal, JournaledLLM(backend, journal) as llm:
        yield llm


class PlainLoop:
    """The oracle: transformers alone, one sequence, the whole prompt, no cache."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, description: str, text: str) -> tuple[list[int], int]:
        """The whole prompt after BOS, and how many of its last tokens are the window's."""
        prompt = surprisal_prompt(description, highlight.escape(text))
        shown = prompt.text[prompt.start :]
        parts = [
            self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for part in (prompt.text[: prompt.start], shown, prompt.text)
        ]
        assert parts[0] + parts[1] == parts[2]  # no token lies across the border
        return [self.tokenizer.bos_token_id, *parts[2]], len(parts[1])

    def logprob(self, description: str, text: str) -> float:
        ids, n = self.ids(description, text)
        with torch.no_grad():
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits.double(), dim=-1)[:-1]
        return float(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[-n:].sum())

    def per_token(self, description: str, text: str) -> float:
        gain = self.logprob(description, text) - self.logprob(UNRELATED, text)
        return gain / self.ids(description, text)[1]


def per_token(verdicts: list[Verdict]) -> list[float]:
    rows = [v for v in verdicts if v.variant == surprisal.PER_TOKEN_VARIANT]
    return [v.score for v in rows if v.score is not None]


@pytest.fixture(scope="module")
def folder(tiny_subject_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny subject model, whose BOS is token 0, for longer texts."""
    copy = shutil.copytree(tiny_subject_model_dir, tmp_path_factory.mktemp("base") / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return copy


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainLoop:
    return PlainLoop(folder)


@pytest.fixture
def llm(folder: Path, tmp_path: Path) -> Iterator[JournaledLLM]:
    load_model(folder, "float32", "cpu").blocks.clear()
    with opened(folder, tmp_path / "store") as opened_llm:
        yield opened_llm


def test_scores_are_those_of_one_whole_prompt_at_a_time_without_a_cache(llm, plain):
    names = ("rain", "kings and castles" * 20)
    verdicts = scored(llm, job(0, names))
    expected = [plain.per_token(name, text) for name in names for text in TEXTS]
    assert per_token(verdicts) == pytest.approx(expected, abs=NATS)
    totals = [v.score for v in verdicts if v.variant == "all"]
    lengths = [plain.ids(name, text)[1] for name in names for text in TEXTS]
    assert totals == pytest.approx([s * n for s, n in zip(expected, lengths, strict=True)], abs=0.1)


@pytest.mark.parametrize("batch_tokens", [1, 150])
def test_the_batch_size_changes_no_score(folder, tmp_path, monkeypatch, batch_tokens):
    """In batches of one, and in batches of which the last is partial."""
    jobs = (job(0, ("rain", "kings")), job(1, ("bread",), range(2, 5)))
    large = score_cold(folder, tmp_path / "large", *jobs)
    monkeypatch.setattr(backend_module, "MAX_BATCH_TOKENS", batch_tokens)
    small = score_cold(folder, tmp_path / "small", *jobs)
    assert per_token(small) == pytest.approx(per_token(large), abs=NATS)


def test_scoring_again_with_the_kept_prefix_changes_no_bit(folder, tmp_path):
    """The prefix's cache does not grow from unit to unit."""
    jobs = [job(i, ("rain", f"kings {i}")) for i in range(3)]
    cold = score_cold(folder, tmp_path / "cold", *jobs)
    blocks = load_model(folder, "float32", "cpu").blocks
    kept = {ids: cache.get_seq_length() for ids, cache in blocks.items()}
    with opened(folder, tmp_path / "warm") as llm:
        assert scored(llm, *jobs) == cold
    assert {ids: cache.get_seq_length() for ids, cache in blocks.items()} == kept
    assert all(len(ids) == n for ids, n in kept.items())


def test_the_order_of_latents_hardly_changes_a_score(folder, tmp_path):
    jobs = [job(i, ("rain", "kings"), range(i, 4 + i)) for i in range(3)]
    forwards = score_cold(folder, tmp_path / "forwards", *jobs)
    backwards = score_cold(folder, tmp_path / "backwards", *jobs[::-1])
    assert per_token(forwards) == pytest.approx(per_token(backwards), abs=NATS)


def test_windows_shared_by_latents_are_paid_for_once_under_z0(llm, plain):
    jobs = [job(0, ("rain",), range(5)), job(1, ("kings",), range(3, 7))]
    scored(llm, *jobs)
    asked = [(UNRELATED, number) for number in range(7)]
    asked += [("rain", number) for number in range(5)] + [("kings", n) for n in range(3, 7)]
    lengths = [len(plain.ids(name, TEXTS[number])[0]) for name, number in asked]
    assert llm.usage.prompt_tokens == sum(lengths)


def test_a_second_explanation_is_scored_without_asking_z0_again(folder, tmp_path, plain):
    with opened(folder, tmp_path) as first:
        scored(first, job(0, ("rain",)))
    with opened(folder, tmp_path) as again:
        verdicts = scored(again, job(0, ("rain", "kings")))
        lengths = [len(plain.ids("kings", text)[0]) for text in TEXTS]
        assert again.usage.prompt_tokens == sum(lengths)
    expected = [plain.per_token(name, text) for name in ("rain", "kings") for text in TEXTS]
    assert per_token(verdicts) == pytest.approx(expected, abs=NATS)


def test_a_prompt_that_does_not_fit_the_model_fails_its_rows(tiny_subject_model_dir, tmp_path):
    with opened(tiny_subject_model_dir, tmp_path) as llm:  # of 512 tokens
        verdicts = scored(llm, job(0, ("rain",)))
    assert {(v.status, v.reason, v.score) for v in verdicts} == {("failed", "too_long", None)}


@pytest.mark.slow
def test_smollm2_scores_windows_as_a_plain_loop_does_and_tells_topics(tmp_path, monkeypatch):
    folder = smollm2_dir()
    plain = PlainLoop(folder)
    names = ("rain or other wet weather", "kings and castles")
    large = per_token(score_cold(folder, tmp_path / "large", job(0, names)))
    rain, kings = large[: len(TEXTS)], large[len(TEXTS) :]
    expected = [plain.per_token(names[0], text) for text in TEXTS]
    assert rain == pytest.approx(expected, abs=NATS)
    is_likelier = [one > other for one, other in zip(rain, kings, strict=True)]
    assert is_likelier[:N_ACTIVATING] == [True] * N_ACTIVATING
    assert not is_likelier[-1]  # the window about a king
    monkeypatch.setattr(backend_module, "MAX_BATCH_TOKENS", 1)
    alone = per_token(score_cold(folder, tmp_path / "alone", job(0, names)))
    assert alone == pytest.approx(large, abs=NATS)
