"""The embedding of every window of the corpus, each text embedded once."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.embedders import Embedders
from autointerp_dagster.resources.embedding_windows import WindowEmbedding
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_window_embeddings(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "window_embeddings")
    def window_embeddings(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        embedders: Embedders,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        detokenizer, embedder = models.of(study).detokenizer, embedders.of(study)
        asked = {"embedder": embedder.identity}
        with store.stage(context, study, "window_embeddings", models=asked) as stage:
            for place in stage.pending():
                bar = progress.on(context)
                stage.commit(
                    place, WindowEmbedding(stage, study, detokenizer, embedder, bar).made()
                )
            yield from stage.report()

    return window_embeddings
