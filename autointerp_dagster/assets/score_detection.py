"""A judge says which plain windows contain the feature that an explanation describes."""

from collections.abc import Iterable, Iterator

import dagster as dg

from autointerp_dagster.core.config import DetectionConfig
from autointerp_dagster.core.scorers import Job, Verdict, detection, judge
from autointerp_dagster.core.types import Cell
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.llms import LLMs, paid
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.scoring import Scoring
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def build_score_detection(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "score_detection")
    def score_detection(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        llms: LLMs,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult]:
        config = study.scorers.detection or DetectionConfig()
        detokenizer = models.of(study).detokenizer
        with llms.judge(context, study, store.of(study)) as llm:

            def verdicts(cell: Cell, jobs: Iterable[Job]) -> Iterator[Verdict]:
                block_of = coders.block_of(study, cell.layer, "score_detection")
                return judge(detection, jobs, config, detokenizer, llm, block_of)

            asked = {"judge": llm.identity}
            with store.stage(context, study, "score_detection", models=asked) as stage:
                Scoring(
                    stage, study, verdicts, progress.on(context), lambda: paid(llm)
                ).commit_cells()
                yield from stage.report()

    return score_detection
