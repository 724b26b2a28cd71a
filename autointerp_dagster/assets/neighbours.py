"""Which latents of the layer fire together, or have alike directions."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_neighbours(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "neighbours")
    def neighbours(
        context: dg.AssetExecutionContext, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        with store.stage(context, study, "neighbours") as stage:
            yield from stage.report()

    return neighbours
