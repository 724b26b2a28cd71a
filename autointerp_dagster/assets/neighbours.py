"""Which latents of the layer fire together, or have alike directions."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.neighbouring import Neighbouring
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_neighbours(study: Study) -> dg.AssetsDefinition:
    """The asset of one study, which asks for neighbours."""
    config = study.finds_neighbours
    assert config is not None  # else the study has no such stage

    @stage_asset(study, "neighbours")
    def neighbours(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        coders: Coders,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        external = {"sparse_coders": lambda layer: coders.identity(study, layer)}
        with store.stage(context, study, "neighbours", external=external) as stage:
            neighbouring = Neighbouring(
                stage=stage,
                study=study,
                config=config,
                coders=coders,
                progress=progress.on(context),
            )
            neighbouring.commit_cells()
            yield from stage.report()

    return neighbours
