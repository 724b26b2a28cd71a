"""The embedding of every window of the corpus, each text embedded once."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_window_embeddings(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "window_embeddings")
    def window_embeddings(
        context: dg.AssetExecutionContext, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        with store.stage(context, study, "window_embeddings") as stage:
            yield from stage.report()

    return window_embeddings
