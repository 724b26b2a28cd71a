"""Every activation above zero of every latent, from one forward pass over the token dataset."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.caching import Caching
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.preflight import check_study, stages_of_run
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_activation_cache(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "activation_cache")
    def activation_cache(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        model = models.of(study)
        external = {
            "subject_model": lambda _: model.identity(),
            "sparse_coders": lambda layer: coders.identity(study, layer),
        }
        about = {"subject_model": model.about}
        with store.stage(
            context, study, "activation_cache", external=external, about=about
        ) as stage:
            layers = sorted({cell.layer for cell in stage.pending_cells()})
            if layers:  # what comes next is dear: what would fail after it had better fail now
                check_study(study, stages_of_run(context, study), layers)
                caching = Caching(stage, study, model, coders, progress.on(context))
                caching.commit_layers(layers)
            yield from stage.report()

    return activation_cache
