"""A small detection run through the real scorer: made-up latents, an ideal judge."""

from collections.abc import Iterable

import numpy as np

from autointerp_dagster.core.config import DetectionConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import LLM, JournalBlock
from autointerp_dagster.core.scorers import LABEL_SCORERS, ScoringTask, Verdict
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.running import judge
from autointerp_dagster.core.types import LatentId

BLOCK = JournalBlock("score_detection", "c0ffee", 0)
WORDS = ("rain", "sun", "fog", "snow", "hail", "wind", "frost", "storm", "calm", "dew", "ice")
WINDOW_LEN = 6


class Words:
    """The detokenizer: token i is the i-th word."""

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [f" {WORDS[token]}" for token in tokens.tolist()]


def jobs(n_latents: int, n_activating: int, n_silent: int) -> list[Job]:
    """Latents 0, 1, ..., each of which is about a word, with so many test windows."""
    return [_job(index, n_activating, n_silent) for index in range(n_latents)]


def judged(llm: LLM, asked: Iterable[Job], windows_per_prompt: int = 2) -> list[Verdict]:
    """What the detection scorer says, in an order that does not depend on the model."""
    config = DetectionConfig(windows_per_prompt=windows_per_prompt)
    scorer = LABEL_SCORERS["detection"]
    verdicts = judge(scorer, asked, config, Words(), llm, lambda latent: BLOCK)
    return sorted(verdicts, key=lambda v: (v.latent.index, v.window_id))


def said(verdicts: Iterable[Verdict]) -> list[tuple]:
    """All that does not depend on how often a question was asked."""
    return [
        (v.latent.index, v.window_id, v.is_activating, v.prediction, v.probability, v.status)
        for v in verdicts
    ]


def _job(index: int, n_activating: int, n_silent: int) -> Job:
    rng = np.random.default_rng(index)
    kinds = [True] * n_activating + [False] * n_silent
    record = LatentRecord(
        latent=LatentId("sae", "layers.3", index),
        status="ok",
        max_activation=1.0,
        top_tokens=(),
        top_token_shares=(),
        windows=tuple(_window(rng, i, is_active) for i, is_active in enumerate(kinds)),
    )
    text = f'the word "{WORDS[index % len(WORDS)]}"'
    return Job(record, (ScoringTask(record.latent, "default", "own", index, text),))


def _window(rng: np.random.Generator, number: int, is_activating: bool) -> Window:
    return Window(
        window_id=number << 16,
        context=number,
        start=0,
        split="test",
        is_activating=is_activating,
        negative_kind=None if is_activating else "random",
        quantile=0 if is_activating else None,
        rank=number,
        tokens=rng.integers(len(WORDS), size=WINDOW_LEN).astype(np.int32),
        activations=np.full(WINDOW_LEN, float(is_activating), np.float32),
    )
