"""Language models that explain and judge, each behind its journal and the study's budget."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from autointerp_dagster.core.config import LLMConfig
from autointerp_dagster.study import Study

BUDGET_TAG = "autointerp/budget"
"""Tag of Dagster runs that share one run's budget: those of one command."""


def budget_of(context: dg.AssetExecutionContext) -> str:
    """Under which name a step's spending is counted: a command's, a backfill's, or the run's."""
    tags = context.run.tags
    return tags.get(BUDGET_TAG) or tags.get("dagster/backfill") or context.run_id


class LLMs(dg.ConfigurableResource):
    """Opens the language model that plays a part in a study, for the length of a step."""

    mode: Mode = Field(
        default="record",
        description="record: what the journal lacks is asked and kept; replay: nothing is sent.",
    )

    @contextmanager
    def explainer(
        self, context: dg.AssetExecutionContext, study: Study, store: Store
    ) -> Iterator[JournaledLLM]:
        """The model that writes explanations."""
        with self._open(budget_of(context), study, store, study.models.explainer) as llm:
            yield llm

    @contextmanager
    def judge(
        self, context: dg.AssetExecutionContext, study: Study, store: Store
    ) -> Iterator[JournaledLLM]:
        """The model that answers scorers."""
        config = study.models.judge or study.models.explainer
        with self._open(budget_of(context), study, store, config) as llm:
            yield llm

    @contextmanager
    def _open(
        self, budget: str, study: Study, store: Store, config: LLMConfig
    ) -> Iterator[JournaledLLM]:
        """A model that may spend what run and study have left; one in this process is free."""
        hours = study.budget.hours
        with (
            open_journal(store.root) as journal,
            Ledger(study.budget, SpendFile(store.root, study.name, budget)) as ledger,
            open_llm(
                config,
                journal=journal,
                ledger=ledger,
                deadline=None if hours is None else timedelta(hours=hours),
                mode=self.mode,
            ) as llm,
        ):
            yield llm
