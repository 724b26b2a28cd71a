"""What the scorers share as stages that ask a language model."""

from collections.abc import Iterable, Iterator
from typing import Any

import dagster as dg

from autointerp_dagster.core.llm import LLM
from autointerp_dagster.core.scorers import (
    ASKING_SCORERS,
    LABEL_SCORERS,
    Verdict,
    intervention,
    judge,
)
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import Cell
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.llms import LLMs
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.scoring import Scoring, VerdictsOf
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import parts_asked


def asking_asset(study: Study, name: str) -> dg.AssetsDefinition:
    """The asset of a scorer that asks one language model.

    Args:
        study: Whose cells these are.
        name: The scorer, one that the study asks for.
    """
    stage_name = f"score_{name}"

    @stage_asset(study, stage_name)
    def score(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        llms: LLMs,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        (part,) = parts_asked(study, stage_name)
        with llms.open(context, study, store.of(study), [part]) as opened:
            llm = opened[part]
            verdicts = answering(name, study, models.of(study).detokenizer, coders, llm)
            with store.stage(context, study, stage_name, models={part: llm.identity}) as stage:
                Scoring(stage, study, verdicts, progress.on(context), llm).commit_cells()
                yield from stage.report()

    return score


def answering(
    name: str, study: Study, detokenizer: Detokenizer, coders: Coders, llm: LLM
) -> VerdictsOf:
    """How a scorer that asks a language model turns jobs of a cell into verdicts.

    Args:
        name: The scorer, one that the study asks for.
        study: Whose cells these are.
        detokenizer: Of the subject model.
        coders: For the journal's blocks.
        llm: The model that it asks.
    """
    config: Any = study.scorers.of(name)  # of the scorer's own kind

    def verdicts(cell: Cell, jobs: Iterable[Any]) -> Iterator[Verdict]:
        block_of = coders.block_of(study, cell.layer, f"score_{name}")
        if name == "intervention":
            return intervention.verdicts(jobs, config, llm, block_of)
        if name in LABEL_SCORERS:
            scorer = LABEL_SCORERS[name]
            sure = study.metrics.confidence
            return judge(scorer, jobs, config, detokenizer, llm, block_of, study.scoring, sure)
        return ASKING_SCORERS[name].verdicts(jobs, config, detokenizer, llm, block_of)

    return verdicts
