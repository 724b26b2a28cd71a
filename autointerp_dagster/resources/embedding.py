"""What the scorers share as stages that ask a sentence embedder."""

from collections.abc import Iterable, Iterator

import dagster as dg

from autointerp_dagster.core.scorers import EMBEDDING_SCORERS, Job, Verdict
from autointerp_dagster.core.types import Cell
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.embedders import Embedders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.scoring import Scoring
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def embedding_asset(study: Study, name: str) -> dg.AssetsDefinition:
    """The asset of a scorer that asks a sentence embedder.

    Args:
        study: Whose cells these are.
        name: The scorer, one that the study asks for.
    """
    stage_name = f"score_{name}"

    @stage_asset(study, stage_name)
    def score(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        embedders: Embedders,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        config = study.scorers.of(name)
        detokenizer, embedder = models.of(study).detokenizer, embedders.of(study)

        def verdicts(cell: Cell, jobs: Iterable[Job]) -> Iterator[Verdict]:
            del cell
            return EMBEDDING_SCORERS[name].verdicts(jobs, config, detokenizer, embedder)

        asked = {"embedder": embedder.identity, "query_prefix": embedder.query_prefix}
        with store.stage(context, study, stage_name, models=asked) as stage:
            Scoring(stage, study, verdicts, progress.on(context)).commit_cells()
            yield from stage.report()

    return score
