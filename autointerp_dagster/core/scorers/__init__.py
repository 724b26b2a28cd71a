"""Scorers: how well an explanation predicts what its latent does.

Each scorer is a module with a ``VERSION`` and ``verdicts_of``. Those in ``LABEL_SCORERS`` ask a
chat model (``prompts_of``); ``embedding`` asks a sentence embedder.
"""

from collections.abc import Mapping
from types import ModuleType

from autointerp_dagster.core.scorers import detection, embedding, fuzzing
from autointerp_dagster.core.scorers.embedding import Embedder
from autointerp_dagster.core.scorers.judging import LabelScorer, Prompt, ShownWindow
from autointerp_dagster.core.scorers.planning import Job, jobs_of, scoring_tasks
from autointerp_dagster.core.scorers.running import judge, rank
from autointerp_dagster.core.scorers.tasks import (
    ScoringTask,
    Verdict,
    verdicts_frame,
)

__all__ = [
    "LABEL_SCORERS",
    "SCORERS",
    "Embedder",
    "Job",
    "LabelScorer",
    "Prompt",
    "ScoringTask",
    "ShownWindow",
    "Verdict",
    "jobs_of",
    "judge",
    "rank",
    "scoring_tasks",
    "verdicts_frame",
]


LABEL_SCORERS: Mapping[str, LabelScorer] = {"detection": detection, "fuzzing": fuzzing}
"""By name in a study."""

SCORERS: Mapping[str, ModuleType] = {
    "detection": detection,
    "fuzzing": fuzzing,
    "embedding": embedding,
}
"""All, by name in a study."""
