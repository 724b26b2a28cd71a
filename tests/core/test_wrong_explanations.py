"""An explanation of something that was planted independently must score at chance, on average."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from record_builders import BLOCK, VOCABULARY, make_record, make_window

from autointerp_dagster.core.config import DetectionConfig, FuzzingConfig
from autointerp_dagster.core.highlight import marked_runs, without_marks
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import Completion, Request
from autointerp_dagster.core.prompts import read_question
from autointerp_dagster.core.scorers import LABEL_SCORERS, Job, ScoringTask, judge
from autointerp_dagster.core.types import LatentId

N_LATENTS, N_WINDOWS = 120, 30
CONFIGS = {"detection": DetectionConfig(), "fuzzing": FuzzingConfig()}


class IdealJudge:
    """Knows that the explanation names the letter that a word must hold."""

    identity = "ideal"

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        for request in requests:
            question = read_question(request.messages[-1].content)
            labels = [int(self._fits(question.explanation, window)) for window in question.windows]
            yield request, Completion(request.call_id(self.identity), json.dumps(labels))

    @staticmethod
    def _fits(letter: str, window: str) -> bool:
        runs = marked_runs(window)
        return all(letter in run for run in runs) if runs else letter in without_marks(window)


def planted_record(index: int, rng: np.random.Generator) -> LatentRecord:
    """Fires on one word, which holds an x; a q stands in a fifth of all words, independently."""
    windows = []
    for i in range(2 * N_WINDOWS):
        is_activating = i < N_WINDOWS
        fires_at = int(rng.integers(1, 5))
        has_q = rng.random(6) < 0.2
        words = [
            ("x" if is_activating and place == fires_at else "o") + ("q" if q else "e") + str(place)
            for place, q in enumerate(has_q)
        ]
        activations = [4.0 if place == fires_at else 0.0 for place in range(6)]
        windows.append(
            make_window(
                " ".join(words),
                activations if is_activating else None,
                window_id=(index * 1000 + i) << 16,
                rank=i % N_WINDOWS,
                quantile=i % 10,
            )
        )
    return make_record(windows, latent=LatentId("sae", "layers.3", index))


@pytest.mark.parametrize("scorer", CONFIGS)
@pytest.mark.parametrize(("letter", "expected", "tolerance"), [("q", 0.5, 0.02), ("x", 1.0, 0.01)])
def test_the_mean_over_latents_is_one_half_for_a_wrong_and_one_for_a_true_explanation(
    scorer: str, letter: str, expected: float, tolerance: float
) -> None:
    rng = np.random.default_rng(5)
    records = [planted_record(index, rng) for index in range(N_LATENTS)]
    jobs = [
        Job(record, (ScoringTask(record.latent, "e", "own", record.latent.index, letter),))
        for record in records
    ]
    found = judge(
        LABEL_SCORERS[scorer], jobs, CONFIGS[scorer], VOCABULARY, IdealJudge(), lambda _: BLOCK
    )
    right: dict[tuple[int, bool], list[bool]] = {}
    for verdict in found:
        key = (verdict.latent.index, verdict.is_activating)
        right.setdefault(key, []).append(verdict.prediction == verdict.is_activating)
    balanced = [
        (np.mean(right[index, True]) + np.mean(right[index, False])) / 2
        for index in range(N_LATENTS)
    ]
    assert len(balanced) >= 100
    assert np.mean(balanced) == pytest.approx(expected, abs=tolerance)
