"""Everything that can be wrong with a study, asked before anything expensive begins."""

import asyncio
from collections.abc import Collection, Iterable

import dagster as dg

from autointerp_dagster.adapters.coder_files import LoadedCoder, check_fits
from autointerp_dagster.adapters.llm import open_backend
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.config import LLMConfig
from autointerp_dagster.core.errors import LLMError, StudyError
from autointerp_dagster.core.hooks import edited
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.resources.embedders import Embedders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.pending import stages_that_ask
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import llm_configs, models_asked
from autointerp_dagster.study.stages import stages_of

REPLAY_TAG = "autointerp/replay"
"""Of a run that asks no language model: the journal answers, or nobody does."""


def stages_of_run(context: dg.AssetExecutionContext, study: Study) -> set[str]:
    """Names of the stages that the whole run of a step is to materialize.

    Those that would ask a language model are left out of a replay: they need no server.
    """
    asking = set(stages_that_ask(study)) if REPLAY_TAG in context.run.tags else set()
    if context.run.asset_selection:
        return {key.path[-1] for key in context.run.asset_selection} - asking
    steps = context.run.step_keys_to_execute  # a run from a script names its steps instead
    made = [stage.name for stage in stages_of(study)]
    names = {name for name in made if steps is None or f"{study.name}__{name}" in steps}
    return names - asking


def check_study(
    study: Study, stages: Collection[str], layers: Iterable[LayerKey] | None = None
) -> None:
    """Checks what some stages need against each other, cheap things first.

    The first document of every file of a folder is read, and the first of a hub dataset: a file
    that is empty or no text is better found now than later.

    Args:
        study: The study.
        stages: Names of the stages that are to run.
        layers: Whose coders are to be run; null: all.

    Raises:
        AutoInterpError: The first thing that does not fit; names file, key, value and remedy.
    """
    corpus = Corpora().of(study)
    for config in llm_configs(study, stages):
        _check_llm(study, config)
    if any("embedder" in models_asked(study, name) for name in stages):
        _ = Embedders().of(study).identity
    corpus.check()
    model = SubjectModels().of(study)
    for layer in study.layer_keys if layers is None else layers:
        loaded = Coders().of(study, layer)
        check_fits(loaded, model, layer, study.max_num_latents)
        if "interventions" in stages:
            _check_steerable(model, loaded.writes)
        check_listed(study, layer, loaded)


def check_listed(study: Study, layer: LayerKey, loaded: LoadedCoder) -> None:
    """Refuse a coder that lacks a latent which the study lists.

    Raises:
        StudyError: Names the first.
    """
    listed = study.latents if isinstance(study.latents, tuple) else ()
    beyond = [latent for latent in listed if latent >= loaded.coder.num_latents]
    if beyond:
        raise StudyError(
            f"study {study.name}: latents: {beyond[0]} is not a latent of {layer}, whose coder "
            f"has {loaded.coder.num_latents}. Remove it from the list."
        )


def _check_steerable(model: SubjectModel, hookpoint: str) -> None:
    """Raises what steering would raise after the forward pass."""
    with edited(model.base_model, hookpoint, lambda hidden: hidden):
        pass


def _check_llm(study: Study, config: LLMConfig) -> None:
    try:
        asyncio.run(_check_backend(config))
    except LLMError as error:
        raise LLMError(
            f"{error} (`autointerp run {study.name} --replay` makes all that the journal can "
            "answer, without any server.)"
        ) from None


async def _check_backend(config: LLMConfig) -> None:
    backend = open_backend(config)
    try:
        await backend.check()
    finally:
        await backend.close()
