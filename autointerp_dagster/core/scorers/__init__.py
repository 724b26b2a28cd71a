"""Scorers: how well an explanation predicts what its latent does.

Each scorer is a module with a ``VERSION``. Those in ``LABEL_SCORERS`` have a chat model label
windows and are run by :func:`judge`; every other module has a function ``verdicts``.
"""

from collections.abc import Mapping
from types import ModuleType

from autointerp_dagster.core.scorers import (
    detection,
    embedding,
    example_embedding,
    fuzzing,
    intervention,
    intruder,
    simulation,
    surprisal,
)
from autointerp_dagster.core.scorers.intervention import InterventionJob
from autointerp_dagster.core.scorers.judging import LabelScorer, Prompt, ShownWindow
from autointerp_dagster.core.scorers.planning import Job, jobs_of, scoring_tasks
from autointerp_dagster.core.scorers.running import judge
from autointerp_dagster.core.scorers.tasks import (
    ScoringTask,
    Verdict,
    verdicts_frame,
)
from autointerp_dagster.core.scorers.vectors import Embedder

__all__ = [
    "ASKING_SCORERS",
    "EMBEDDING_SCORERS",
    "EXPLANATION_FREE",
    "LABEL_SCORERS",
    "SCORERS",
    "Embedder",
    "InterventionJob",
    "Job",
    "LabelScorer",
    "Prompt",
    "ScoringTask",
    "ShownWindow",
    "Verdict",
    "intervention",
    "jobs_of",
    "judge",
    "scoring_tasks",
    "verdicts_frame",
]


LABEL_SCORERS: Mapping[str, LabelScorer] = {"detection": detection, "fuzzing": fuzzing}
"""By name in a study."""

ASKING_SCORERS: Mapping[str, ModuleType] = {
    "surprisal": surprisal,
    "simulation": simulation,
    "intruder": intruder,
}
"""Further ones that ask a language model about records, by name in a study."""

EMBEDDING_SCORERS: Mapping[str, ModuleType] = {
    "embedding": embedding,
    "example_embedding": example_embedding,
}
"""Those that ask a sentence embedder, by name in a study."""

SCORERS: Mapping[str, ModuleType] = {
    "detection": detection,
    "fuzzing": fuzzing,
    **ASKING_SCORERS,
    **EMBEDDING_SCORERS,
    "intervention": intervention,
}
"""All, by name in a study."""

EXPLANATION_FREE = ("intruder", "example_embedding")
"""Those that ask how much the windows of a latent have in common, whatever its explanation."""
