"""What of a study decides the result of each stage, besides the stage's inputs.

Goes into fingerprints (together with the identities of the models that were asked) and into
Dagster's code version, so that an edited study or prompt shows as stale before anything is run.
"""

from typing import Any

from autointerp_dagster.core.config import Parameters
from autointerp_dagster.core.explainers import make_explainer
from autointerp_dagster.core.scorers import SCORERS
from autointerp_dagster.study.model import Study

_SCORE = "score_"


def parameters_of(study: Study, stage: str) -> dict[str, Any]:
    """The parameters of one stage with the versions of its prompts; JSON-ready."""
    if stage.startswith(_SCORE):
        name = stage.removeprefix(_SCORE)
        config = getattr(study.scorers, name)
        return {**config.identity(), "scorer": SCORERS[name].VERSION}
    match stage:
        case "token_dataset":
            return study.tokens.identity()
        case "latent_records":
            return study.sampling.identity()
        case "explanations":
            return {
                "latents": study.latents_identity,
                "floors": study.floors.identity(),
                "min_tokens": study.sampling.min_tokens,  # decides which latents may be floors
                "explainers": {
                    name: {**config.identity(), "version": make_explainer(name, config).version}
                    for name, config in study.explainers.items()
                },
            }
        case "latent_metrics":
            return {"confidence": study.metrics.confidence}
        case "layer_metrics" | "study_metrics":
            return study.metrics.identity()
    return {}


def models_asked(study: Study, stage: str) -> dict[str, Any]:
    """The models that a stage asks and that are no input of it, as the study describes them."""
    models = study.models
    asked: dict[str, Parameters | None] = {
        "explanations": models.explainer,
        "score_detection": models.judge,
        "score_fuzzing": models.judge,
        "score_embedding": models.embedder,
    }
    config = asked.get(stage)
    return {} if config is None else config.identity()
