"""Which checks the results of a stage pass before anything is made from them."""

from autointerp_dagster.core.checks import CheckName
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.metrics import FAMILIES
from autointerp_dagster.study.model import Study
from autointerp_dagster.study.stages import SCORE_STAGES, Stage

CHECKS: dict[CheckName, str] = {
    "schema": "Every table has the columns and types declared, sorted by a key that never repeats.",
    "splits_disjoint": "Every window stands in the split of its document: none is in two.",
    "failed_rate": "Most of what was asked has a usable answer.",
    "share_scored": "Most latents have a score by each scorer.",
    "judge_floor": "Under another latent's explanation the judge does no better than a guess.",
    "reconstruction": "Coders from files fire as often as these say, and rebuild what they read.",
}
"""What it means to pass."""

LABELLED = tuple(f"score_{name}" for name, family in FAMILIES.items() if family.kind == "labels")
"""Stages whose judge labels windows, so that its floor is at .5."""


def checks_of(study: Study, stage: Stage) -> tuple[CheckName, ...]:
    """The checks of a stage that the study has not switched off."""
    config, name = study.checks, stage.name
    asks = name == "explanations" or name in SCORE_STAGES
    has_files = any(isinstance(coder, FileCoderConfig) for coder in study.coders.values())
    wanted: dict[CheckName, bool] = {
        "schema": not stage.is_external and name != "window_embeddings",  # which holds no table
        "splits_disjoint": name == "latent_records",
        "failed_rate": asks and config.failed_rate is not None,
        "share_scored": name == "latent_metrics" and config.share_scored is not None,
        "judge_floor": name in LABELLED
        and config.judge_floor is not None
        and study.floors.sample > 0,
        "reconstruction": name == "activation_cache"
        and has_files
        and (config.fvu is not None or config.l0 is not None),
    }
    return tuple(check for check, is_wanted in wanted.items() if is_wanted)
