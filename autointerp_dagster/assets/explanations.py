"""What each selected latent responds to, in words, by each explainer of the study."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.core.explainers import Explainer, make_explainer
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.explaining import Explaining
from autointerp_dagster.resources.llms import LLMs
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


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
    ) -> Iterator[dg.MaterializeResult]:
        explainers: list[Explainer] = [
            make_explainer(name, config) for name, config in study.explainers.items()
        ]
        external = {"sparse_coders": lambda layer: coders.identity(study, layer)}
        with llms.explainer(context, study, store.of(study)) as llm:
            asked = {"explainer_llm": llm.identity}
            with store.stage(
                context, study, "explanations", models=asked, external=external
            ) as stage:
                explaining = Explaining(
                    stage=stage,
                    study=study,
                    explainers=explainers,
                    llm=llm,
                    coders=coders,
                    detokenizer=models.of(study).detokenizer,
                    progress=progress.on(context),
                    meter=llm,
                )
                explaining.commit_cells()
                yield from stage.report()

    return explanations
