"""What each selected latent responds to, in words, by each explainer of the study."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.explaining import Explaining
from autointerp_dagster.resources.llms import LLMs
from autointerp_dagster.resources.metering import Together
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import parts_asked


def build_explanations(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "explanations")
    def explanations(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        llms: LLMs,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        parts = parts_asked(study, "explanations")
        subject = models.of(study)
        external = {"sparse_coders": lambda layer: coders.identity(study, layer)}
        with llms.open(context, study, store.of(study), parts) as opened:
            asked = {part: llm.identity for part, llm in opened.items()}
            with store.stage(
                context, study, "explanations", models=asked, external=external
            ) as stage:
                explaining = Explaining(
                    stage=stage,
                    study=study,
                    llms=opened,
                    coders=coders,
                    subject=subject,
                    progress=progress.on(context),
                    meter=Together(opened.values()),
                )
                explaining.commit_cells()
                yield from stage.report()

    return explanations
