"""What detection and fuzzing share as stages: a scorer whose judge labels windows."""

from collections.abc import Iterable, Iterator

import dagster as dg

from autointerp_dagster.core.llm import LLM
from autointerp_dagster.core.scorers import LABEL_SCORERS, Job, Verdict, judge
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import Cell
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.llms import LLMs
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.scoring import Scoring, VerdictsOf
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
    with llms.judge(context, study, store.of(study)) as llm:
        verdicts = labelling(name, study, models.of(study).detokenizer, coders, llm)
        asked = {"judge": llm.identity}
        with store.stage(context, study, f"score_{name}", models=asked) as stage:
            Scoring(stage, study, verdicts, progress.on(context), llm).commit_cells()
            yield from stage.report()


def labelling(
    name: str, study: Study, detokenizer: Detokenizer, coders: Coders, llm: LLM
) -> VerdictsOf:
    """How a scorer of ``LABEL_SCORERS`` turns jobs of a cell into verdicts.

    Args:
        name: The scorer, one that the study asks for.
        study: Whose cells these are.
        detokenizer: Of the subject model.
        coders: For the journal's blocks.
        llm: The judge.
    """
    scorer, config = LABEL_SCORERS[name], getattr(study.scorers, name)

    def verdicts(cell: Cell, jobs: Iterable[Job]) -> Iterator[Verdict]:
        block_of = coders.block_of(study, cell.layer, f"score_{name}")
        return judge(scorer, jobs, config, detokenizer, llm, block_of)

    return verdicts
