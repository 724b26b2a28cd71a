"""What of a study decides the result of each stage, besides the stage's inputs.

Goes into fingerprints (together with the identities of the models that were asked) and into
Dagster's code version, so that an edited study or prompt shows as stale before anything is run.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from autointerp_dagster.core.config import (
    BestOfNExplainerConfig,
    ExplainerConfig,
    LLMConfig,
    OutputExplainerConfig,
    Parameters,
    RefineExplainerConfig,
    TopTokensExplainerConfig,
)
from autointerp_dagster.core.explainers import make_explainer
from autointerp_dagster.core.explainers.output import VERSION as OUTPUT_VERSION
from autointerp_dagster.core.logit_lens import VERSION as LENS_VERSION
from autointerp_dagster.core.scorers import EXPLANATION_FREE, LABEL_SCORERS, SCORERS
from autointerp_dagster.core.selection import VERSION as SELECTION_VERSION
from autointerp_dagster.study.model import Study

LLMPart = Literal["explainer", "judge", "base_lm"]
"""The part that a language model plays in a study; its key in ``models``."""

PROMPT_KEYS = frozenset({"scorer", "version", "logit_lens"})
"""Last keys of parameters that are versions of a prompt or of what stands in one."""
MODEL_KEYS = ("explainer", "judge", "base_lm", "embedder")
"""Keys of parameters that are identities of models."""

_SCORE = "score_"


def parameters_of(study: Study, stage: str) -> dict[str, Any]:
    """The parameters of one stage with the versions of its prompts; JSON-ready."""
    if stage.startswith(_SCORE):
        return _scorer_parameters(study, stage.removeprefix(_SCORE))
    match stage:
        case "token_dataset":
            return study.tokens.identity()
        case "activation_cache":
            return {"logit_lens": LENS_VERSION if study.logit_lens else None}
        case "neighbours":
            return _neighbour_parameters(study)
        case "window_embeddings":
            return _window_parameters(study)
        case "latent_records":
            return study.sampling.identity()
        case "interventions":
            splits = {"split_block", "train_share", "select_share", "seed"}
            return {
                **_ranking_parameters(study),
                **study.interventions.identity(),
                "splits": study.sampling.model_dump(include=splits),
            }
        case "explanations":
            return {
                **_selection_parameters(study),
                "explainers": {
                    name: _explainer_parameters(study, config)
                    for name, config in study.explainers.items()
                },
            }
        case "latent_metrics" | "layer_metrics" | "study_metrics":
            return _metrics_parameters(study, stage)
    return {}


def explainer_version(config: ExplainerConfig) -> str:
    """Changes whenever the same record could get another question or another text."""
    match config:
        case BestOfNExplainerConfig() | RefineExplainerConfig():
            return SELECTION_VERSION
        case OutputExplainerConfig():
            return OUTPUT_VERSION
        case _:
            return make_explainer(config.kind, config).version


def parts_of_explainer(config: ExplainerConfig) -> tuple[LLMPart, ...]:
    """The language models that an explainer asks, the one that writes first."""
    match config:
        case TopTokensExplainerConfig():
            return ()
        case OutputExplainerConfig():
            return ("base_lm",)
        case BestOfNExplainerConfig() | RefineExplainerConfig():
            return ("explainer", "judge")
        case _:
            return ("explainer",)


def parts_asked(study: Study, stage: str) -> tuple[LLMPart, ...]:
    """The language models that a stage of a study asks, each once."""
    match stage:
        case "explanations":
            explainers = study.explainers.values()
            return _distinct([part for c in explainers for part in parts_of_explainer(c)])
        case "score_detection" | "score_fuzzing" | "score_intruder":
            return ("judge",)
        case "score_surprisal" | "score_intervention":
            return ("base_lm",)
        case "score_simulation":
            simulation = study.scorers.simulation
            is_plain = simulation is not None and simulation.mode == "all_at_once"
            return ("base_lm",) if is_plain else ("judge",)
    return ()


def all_parts_asked(study: Study, stages: Iterable[str]) -> tuple[LLMPart, ...]:
    """The language models that some stages ask, each once."""
    return _distinct([part for name in stages for part in parts_asked(study, name)])


def llm_configs(study: Study, stages: Iterable[str]) -> list[LLMConfig]:
    """The descriptions of the language models that some stages ask; alike ones once."""
    configs = [llm_config(study, part) for part in all_parts_asked(study, stages)]
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def llm_config(study: Study, part: LLMPart) -> LLMConfig:
    """The language model that plays a part; who is not named is checked by the study."""
    config = getattr(study.models, part)
    assert config is not None, part
    return config


def models_asked(study: Study, stage: str) -> dict[str, Any]:
    """The models that a stage asks and that are no input of it, as the study describes them."""
    asked: dict[str, Parameters | None] = {
        part: llm_config(study, part) for part in parts_asked(study, stage)
    }
    embeds = stage in ("score_embedding", "score_example_embedding", "window_embeddings")
    if embeds or (stage == "study_metrics" and study.matches_layers):
        asked["embedder"] = study.models.embedder
    return {part: config.identity() for part, config in asked.items() if config is not None}


def _distinct(parts: Sequence[LLMPart]) -> tuple[LLMPart, ...]:
    return tuple(part for i, part in enumerate(parts) if part not in parts[:i])


def _metrics_parameters(study: Study, stage: str) -> dict[str, Any]:
    if stage == "study_metrics":
        return study.metrics.identity()
    if stage == "layer_metrics":
        return {**study.metrics.identity(), "adaptive": list(study.adaptive_scorers)}
    asked = {name: study.scorers.of(name) for name in study.scorers.asked}
    resamples = {"n_bootstrap", "seed"} if study.scorers.simulation is not None else set()
    return {
        **study.metrics.model_dump(include={"confidence", *resamples}),
        "scorers": {
            name: {field: config.identity()[field] for field in ("latents", "explainers")}
            for name, config in asked.items()
        },
        "scoring": None if study.scoring is None else study.scoring.identity(),
        **study.sampling.model_dump(include={"strategy", "n_quantiles", "silent_scope"}),
    }


def _neighbour_parameters(study: Study) -> dict[str, Any]:
    config = study.finds_neighbours
    assert config is not None  # else the study has no such stage
    parameters = config.identity() | study.sampling.model_dump(include={"window_len", "seed"})
    if "cofiring" not in config.measures:  # nothing is counted
        del parameters["max_tokens"]
    return parameters


def _window_parameters(study: Study) -> dict[str, Any]:
    is_sample = study.window_embeddings.max_windows is not None
    drawn = {"window_len", "seed"} if is_sample else {"window_len"}
    return study.window_embeddings.identity() | study.sampling.model_dump(include=drawn)


def _scorer_parameters(study: Study, name: str) -> dict[str, Any]:
    parameters = {**study.scorers.of(name).identity(), "scorer": SCORERS[name].VERSION}
    if name in LABEL_SCORERS and study.scoring is not None:
        parameters["scoring"] = study.scoring.identity()
        parameters["confidence"] = study.metrics.confidence
    if name in EXPLANATION_FREE:
        parameters |= _ranking_parameters(study)
    if name == "intervention":  # the order of the targets is in no table
        parameters["main_kl"] = study.interventions.kl[0]
    return parameters


def _explainer_parameters(study: Study, config: ExplainerConfig) -> dict[str, Any]:
    parameters = {**config.identity(), "version": explainer_version(config)}
    if isinstance(config, OutputExplainerConfig):
        parameters["kl"] = config.kl or study.interventions.kl[0]
        parameters["steered"] = study.interventions.identity()["latents"]  # are donors, too
    return parameters


def _ranking_parameters(study: Study) -> dict[str, Any]:
    """Which latents are explained, and in which order a sample takes them."""
    return {
        "latents": study.latents_identity,
        "floors_seed": study.floors.seed,
        "min_tokens": study.sampling.min_tokens,
    }


def _selection_parameters(study: Study) -> dict[str, Any]:
    return {
        "latents": study.latents_identity,
        "floors": study.floors.identity(),
        "min_tokens": study.sampling.min_tokens,  # decides which latents may be floors
    }
