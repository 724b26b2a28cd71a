"""What the subject model writes when it is steered along each latent, at equal divergence."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.intervening import Intervening
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_interventions(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "interventions")
    def interventions(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        subject = models.of(study)
        external = {
            "subject_model": lambda _: subject.identity(),
            "sparse_coders": lambda layer: coders.identity(study, layer),
        }
        about = {"subject_model": subject.about}
        with store.stage(context, study, "interventions", external=external, about=about) as stage:
            intervening = Intervening(
                stage=stage,
                study=study,
                subject=subject,
                coders=coders,
                progress=progress.on(context),
            )
            intervening.commit_cells()
            yield from stage.report()

    return interventions
