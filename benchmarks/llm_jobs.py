"""Latents to be judged, made up: windows of common words, explanations that name two of them.

The judge of the fake server takes an explanation at its quoted words, so answers vary and can be
compared; which windows hold them is drawn.
"""

from collections.abc import Iterator

import numpy as np

from autointerp_dagster.core.config import DetectionConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.scorers import ScoringTask
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.types import LatentId

WINDOW_LEN = 32
_TEXT = """
the of and to in a is that for it as was with be by on not he his but at are this have from or
had an they which one you were all her she there would their we him been has when who will no
more if out so up said what its about than into them can only other time new some could these
two may first then do any like my now over such our man me even most made after also did many
off before must well back through years much where your way down should because long each just
state those people too mr how little good world make very year still see own work men day get
"""
WORDS = tuple(_TEXT.split())
N_TAKEN_AS_SIGN = 40
"""Words from this one on may be named in an explanation."""

CONFIG = DetectionConfig()
BLOCK = JournalBlock("score_detection", "benchmark", 0)


class Words:
    """The detokenizer: token i is the i-th word."""

    def pieces(self, tokens: np.ndarray) -> list[str]:
        """Each with a space before it."""
        return [f" {WORDS[token]}" for token in tokens.tolist()]


def jobs(n_latents: int, n_windows: int) -> Iterator[Job]:
    """Latents 0, 1, ... with so many test windows of each class, each the same every time."""
    for index in range(n_latents):
        latent = LatentId("sae", "layers.0", index)
        rng = np.random.default_rng(index)
        record = LatentRecord(
            latent=latent,
            status="ok",
            max_activation=1.0,
            top_tokens=(),
            top_token_shares=(),
            windows=tuple(_window(rng, i, i < n_windows) for i in range(2 * n_windows)),
        )
        first, second = rng.choice(np.arange(N_TAKEN_AS_SIGN, len(WORDS)), 2, replace=False)
        text = f'the words "{WORDS[first]}" and "{WORDS[second]}"'
        yield Job(record, (ScoringTask(latent, "default", "own", index, text),))


def _window(rng: np.random.Generator, rank: int, is_activating: bool) -> Window:
    activations = np.zeros(WINDOW_LEN, np.float32)
    activations[WINDOW_LEN // 2] = float(is_activating)
    return Window(
        window_id=rank << 16,
        context=rank,
        start=0,
        split="test",
        is_activating=is_activating,
        negative_kind=None if is_activating else "random",
        quantile=rank % 10 if is_activating else None,
        rank=rank,
        tokens=rng.integers(len(WORDS), size=WINDOW_LEN).astype(np.int32),
        activations=activations,
    )
