"""What detection and fuzzing share as assets: one run of a scorer whose judge labels windows."""

from collections.abc import Iterable, Iterator

import dagster as dg

from autointerp_dagster.core.scorers import LABEL_SCORERS, Job, Verdict, judge
from autointerp_dagster.core.types import Cell
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.llms import LLMs, paid
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.scoring import Scoring
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study


def score_by_labels(
    name: str,
    study: Study,
    context: dg.AssetExecutionContext,
    store: StoreResource,
    models: SubjectModels,
    coders: Coders,
    llms: LLMs,
    progress: ProgressDisplay,
) -> Iterator[dg.MaterializeResult]:
    """Scores the cells of one step with the study's judge.

    Args:
        name: The scorer, one of ``LABEL_SCORERS`` that the study asks for.
        study: Whose cells these are.
        context: Of the asset that runs; the others are its resources.
        store: Where results go.
        models: For the subject model's detokenizer.
        coders: For the journal's blocks.
        llms: For the judge.
        progress: For whoever watches.
    """
    stage_name = f"score_{name}"
    scorer, config = LABEL_SCORERS[name], getattr(study.scorers, name)
    detokenizer = models.of(study).detokenizer
    with llms.judge(context, study, store.of(study)) as llm:

        def verdicts(cell: Cell, jobs: Iterable[Job]) -> Iterator[Verdict]:
            block_of = coders.block_of(study, cell.layer, stage_name)
            return judge(scorer, jobs, config, detokenizer, llm, block_of)

        asked = {"judge": llm.identity}
        with store.stage(context, study, stage_name, models=asked) as stage:
            Scoring(stage, study, verdicts, progress.on(context), lambda: paid(llm)).commit_cells()
            yield from stage.report()
