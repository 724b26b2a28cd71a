"""A judge says in which windows every marked token fits the explanation."""

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


def build_score_fuzzing(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "score_fuzzing")
    def score_fuzzing(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        llms: LLMs,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult]:
        yield from score_by_labels("fuzzing", study, context, store, models, coders, llms, progress)

    return score_fuzzing
