"""Windows ranked by the similarity of their embedding to the explanation's."""

from collections.abc import Iterable, Iterator

import dagster as dg

from autointerp_dagster.core.config import EmbeddingConfig
from autointerp_dagster.core.scorers import Job, Verdict, rank
from autointerp_dagster.core.types import Cell
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.embedders import Embedders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.scoring import Scoring
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_score_embedding(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "score_embedding")
    def score_embedding(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        embedders: Embedders,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult]:
        config = study.scorers.embedding or EmbeddingConfig()
        detokenizer, embedder = models.of(study).detokenizer, embedders.of(study)

        def verdicts(cell: Cell, jobs: Iterable[Job]) -> Iterator[Verdict]:
            del cell
            return rank(jobs, config, detokenizer, embedder)

        asked = {"embedder": embedder.identity, "query_prefix": embedder.query_prefix}
        with store.stage(context, study, "score_embedding", models=asked) as stage:
            Scoring(stage, study, verdicts, progress.on(context)).commit_cells()
            yield from stage.report()

    return score_embedding
