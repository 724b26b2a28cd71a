"""Everything Dagster loads: the assets of every study in the studies folder, and their resources.

The folder is ``./studies`` or what ``AUTOINTERP_STUDIES`` names. A new study needs "Reload
definitions" in the UI, nothing else.
"""

import logging
import os
from pathlib import Path

import dagster as dg

from autointerp_dagster.adapters.study_layers import with_plain_layers
from autointerp_dagster.assets.activation_cache import build_activation_cache
from autointerp_dagster.assets.corpus import build_corpus
from autointerp_dagster.assets.explanations import build_explanations
from autointerp_dagster.assets.interventions import build_interventions
from autointerp_dagster.assets.latent_metrics import build_latent_metrics
from autointerp_dagster.assets.latent_records import build_latent_records
from autointerp_dagster.assets.layer_metrics import build_layer_metrics
from autointerp_dagster.assets.neighbours import build_neighbours
from autointerp_dagster.assets.score_detection import build_score_detection
from autointerp_dagster.assets.score_embedding import build_score_embedding
from autointerp_dagster.assets.score_example_embedding import build_score_example_embedding
from autointerp_dagster.assets.score_fuzzing import build_score_fuzzing
from autointerp_dagster.assets.score_intervention import build_score_intervention
from autointerp_dagster.assets.score_intruder import build_score_intruder
from autointerp_dagster.assets.score_simulation import build_score_simulation
from autointerp_dagster.assets.score_surprisal import build_score_surprisal
from autointerp_dagster.assets.sparse_coders import build_sparse_coders
from autointerp_dagster.assets.study_metrics import build_study_metrics
from autointerp_dagster.assets.subject_model import build_subject_model
from autointerp_dagster.assets.token_dataset import build_token_dataset_asset
from autointerp_dagster.assets.window_embeddings import build_window_embeddings
from autointerp_dagster.automation import build_automation
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.resources.embedders import Embedders
from autointerp_dagster.resources.llms import LLMs
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study, find_studies
from autointerp_dagster.study.stages import stages_of
from autointerp_dagster.up_to_date import build_up_to_date

logger = logging.getLogger(__name__)

BUILDERS = {
    "subject_model": build_subject_model,
    "corpus": build_corpus,
    "sparse_coders": build_sparse_coders,
    "token_dataset": build_token_dataset_asset,
    "activation_cache": build_activation_cache,
    "neighbours": build_neighbours,
    "window_embeddings": build_window_embeddings,
    "latent_records": build_latent_records,
    "interventions": build_interventions,
    "explanations": build_explanations,
    "score_detection": build_score_detection,
    "score_fuzzing": build_score_fuzzing,
    "score_surprisal": build_score_surprisal,
    "score_embedding": build_score_embedding,
    "score_simulation": build_score_simulation,
    "score_intruder": build_score_intruder,
    "score_example_embedding": build_score_example_embedding,
    "score_intervention": build_score_intervention,
    "latent_metrics": build_latent_metrics,
    "layer_metrics": build_layer_metrics,
    "study_metrics": build_study_metrics,
}


def build_resources() -> dict[str, dg.ConfigurableResource]:
    """The providers that every study's assets ask; none of them knows a study."""
    return {
        "store": StoreResource(),
        "models": SubjectModels(),
        "corpora": Corpora(),
        "coders": Coders(),
        "llms": LLMs(),
        "embedders": Embedders(),
        "progress": ProgressDisplay(),
    }


def build_study(study: Study) -> list[dg.AssetsDefinition]:
    """The assets of one study, in the order of the data."""
    return [BUILDERS[stage.name](study) for stage in stages_of(study)]


def build_definitions(studies: list[Study]) -> dg.Definitions:
    """The definitions of several studies.

    Layer and study metrics follow the rest by themselves; nothing that costs GPU time or money
    does, unless the sensor or the schedule of a study that discovers its layers is switched on.
    """
    assets = [asset for study in studies for asset in build_study(study)]
    following = dg.AutomationConditionSensorDefinition(
        "metrics_follow",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Recomputes layer and study metrics when the metrics below them change.",
    )
    whole = dg.Definitions(
        assets=assets,
        resources=build_resources(),
        sensors=[following] if assets else [],
        executor=dg.in_process_executor,  # models are loaded once per run, not once per step
    )
    discovering = [build_automation(study) for study in studies if study.discovers]
    checks = [build_up_to_date(study) for study in studies]
    return dg.Definitions.merge(whole, *discovering, *checks)


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions of the studies folder."""
    folder = Path(os.environ.get("AUTOINTERP_STUDIES", "studies"))
    return build_definitions([_with_layers(study) for study in find_studies(folder)])


def _with_layers(study: Study) -> Study:
    """A study whose store does not answer loads without the layers that were found."""
    try:
        return with_plain_layers(study)
    except StoreError as error:
        logger.warning(
            "study %s: what it found cannot be read, so it loads without layers: %s",
            study.name,
            error,
        )
        return study
