"""The language models of a study, opened for a step with journal and budget."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import dagster as dg
from pydantic import Field

from autointerp_dagster.adapters.llm import (
    JournaledLLM,
    Ledger,
    Mode,
    SpendFile,
    open_journal,
    open_llm,
)
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.study import BudgetConfig, Study
from autointerp_dagster.study.parameters import LLMPart, llm_config

BUDGET_TAG = "autointerp/budget"
"""Tag of Dagster runs that share one run's budget: those of one command."""


BUDGET_LIMIT_TAGS = {"usd": "autointerp/budget_usd", "tokens": "autointerp/budget_tokens"}
"""Tags of runs that take the place of the study's limits of one run."""


def limits_of(context: dg.AssetExecutionContext, study: Study) -> BudgetConfig:
    """What a step may spend: as the study says, or as its run does."""
    tags = context.run.tags
    own = {name: tags[tag] for name, tag in BUDGET_LIMIT_TAGS.items() if tag in tags}
    return BudgetConfig.model_validate({**study.budget.model_dump(), **own})


def budget_of(context: dg.AssetExecutionContext) -> str:
    """Under which name a step's spending is counted: a command's, a backfill's, or the run's."""
    tags = context.run.tags
    return tags.get(BUDGET_TAG) or tags.get("dagster/backfill") or context.run_id


class LLMs(dg.ConfigurableResource):
    """Opens the language models that play a part in a study, for the length of a step."""

    mode: Mode = Field(
        default="record",
        description="record: what the journal lacks is asked and kept; replay: nothing is sent.",
    )

    @contextmanager
    def open(
        self,
        context: dg.AssetExecutionContext,
        study: Study,
        store: Store,
        parts: Sequence[LLMPart],
    ) -> Iterator[Mapping[LLMPart, JournaledLLM]]:
        """The models that play some parts; two parts with one description share a model.

        Together they may spend what run and study have left; one in this process is free.
        """
        hours = study.budget.hours
        with ExitStack() as opened:
            journal = opened.enter_context(open_journal(store.root))
            spend = SpendFile(store.root, study.name, budget_of(context))
            ledger = opened.enter_context(Ledger(limits_of(context, study), spend))
            models: dict[LLMPart, JournaledLLM] = {}
            for part in parts:
                config = llm_config(study, part)
                alike = [m for p, m in models.items() if llm_config(study, p) == config]
                if alike:
                    models[part] = alike[0]
                else:
                    llm = open_llm(
                        config,
                        journal=journal,
                        ledger=ledger,
                        deadline=None if hours is None else timedelta(hours=hours),
                        mode=self.mode,
                    )
                    models[part] = opened.enter_context(llm)
            yield models
