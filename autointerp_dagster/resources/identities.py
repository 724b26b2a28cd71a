"""What the stages of a study would be made with now: identities of models, versions of weights.

Files are hashed; nothing is loaded, started or asked. A run of a stage finds the same.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from autointerp_dagster.adapters.llm import open_backend
from autointerp_dagster.core.config import LLMConfig
from autointerp_dagster.core.types import LayerKey, Place
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.resources.embedders import Embedders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.replaying import unserved
from autointerp_dagster.resources.stage_inputs import External
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import LLMPart, llm_config, models_asked, parts_asked


@dataclass(frozen=True, slots=True)
class Identities:
    """Of one study."""

    external: External
    """Of each external input: the version that it has now, by place. Raises what reading its files
    raises."""
    models: Callable[[str], Mapping[str, Any]]
    """By stage: identities of the models that it asks, as they stand in its parameters. Raises
    ModelError if a local model cannot be found."""

    @classmethod
    def of(cls, study: Study) -> "Identities":
        """Nothing is read yet; each is found once, when it is first asked for."""
        coders = Coders()

        @cache
        def llm(part: LLMPart) -> str:
            return asyncio.run(_opened_and_closed(unserved(llm_config(study, part))))

        def coder(place: Place) -> str:
            assert isinstance(place, LayerKey)  # the scope of sparse_coders
            return coders.identity(study, place)

        def models(stage: str) -> dict[str, Any]:
            asked = {part: llm(part) for part in parts_asked(study, stage)}
            if "embedder" not in models_asked(study, stage):
                return dict(asked)
            embedder = Embedders().of(study)
            found = {**asked, "embedder": embedder.identity}
            is_scorer = stage.startswith("score_")
            return {**found, "query_prefix": embedder.query_prefix} if is_scorer else found

        external: External = {
            "subject_model": cache(lambda _: SubjectModels().of(study).identity()),
            "corpus": cache(lambda _: Corpora().of(study).identity()),
            "sparse_coders": cache(coder),
        }
        return cls(external, cache(models))


async def _opened_and_closed(config: LLMConfig) -> str:
    backend = open_backend(config)
    try:
        return backend.identity
    finally:
        await backend.close()
