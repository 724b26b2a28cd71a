"""A judge says which plain windows contain the feature that an explanation describes."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.judging import score_by_labels
from autointerp_dagster.resources.llms import LLMs
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_score_detection(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "score_detection")
    def score_detection(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        llms: LLMs,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult]:
        yield from score_by_labels(
            "detection", study, context, store, models, coders, llms, progress
        )

    return score_detection
