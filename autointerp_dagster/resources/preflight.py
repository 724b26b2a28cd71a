"""Everything that can be wrong with a study, asked before anything expensive begins."""

import asyncio

from autointerp_dagster.adapters.coders import check_fits
from autointerp_dagster.adapters.llm import open_backend
from autointerp_dagster.core.config import LLMConfig
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.study import Study


def check_study(study: Study) -> None:
    """Checks corpus, model, tokenizer, hookpoints, coders and language models, cheap ones first.

    Raises:
        AutoInterpError: The first thing that does not fit; names file, key, value and remedy.
    """
    Corpora().of(study)
    for config in {study.models.explainer, study.models.judge or study.models.explainer}:
        asyncio.run(_check_llm(config))
    model = SubjectModels().of(study)
    for layer in study.layer_keys:
        check_fits(Coders().of(study, layer), model, layer, study.max_num_latents)


async def _check_llm(config: LLMConfig) -> None:
    backend = open_backend(config)
    try:
        await backend.check()
    finally:
        await backend.close()
