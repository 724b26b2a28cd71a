"""Language models that explain and judge, each with its journal and the run's budget behind it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import dagster as dg
from pydantic import PrivateAttr

from autointerp_dagster.adapters.llm import JournaledLLM, open_journal, open_llm
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.config import LLMConfig, LocalLLMConfig
from autointerp_dagster.core.llm import Usage
from autointerp_dagster.study import Study


class LLMs(dg.ConfigurableResource):
    """Opens the language model that plays a part in a study, for the length of a step."""

    _paid: dict[str, Usage] = PrivateAttr(default_factory=dict)
    """By run: what its finished steps paid remote models."""

    @contextmanager
    def explainer(
        self, context: dg.AssetExecutionContext, study: Study, store: Store
    ) -> Iterator[JournaledLLM]:
        """The model that writes explanations."""
        with self._open(context.run_id, study, store, study.models.explainer) as llm:
            yield llm

    @contextmanager
    def judge(
        self, context: dg.AssetExecutionContext, study: Study, store: Store
    ) -> Iterator[JournaledLLM]:
        """The model that answers scorers."""
        config = study.models.judge or study.models.explainer
        with self._open(context.run_id, study, store, config) as llm:
            yield llm

    @contextmanager
    def _open(
        self, run_id: str, study: Study, store: Store, config: LLMConfig
    ) -> Iterator[JournaledLLM]:
        """A model that may spend what the run has left; a model in this process costs nothing."""
        before = self._paid.get(run_id, Usage())
        is_local = isinstance(config, LocalLLMConfig)
        usd, tokens = study.budget.usd, study.budget.tokens
        with (
            open_journal(store.root) as journal,
            open_llm(
                config,
                journal=journal,
                budget_usd=None if usd is None or is_local else max(0.0, usd - before.usd),
                budget_tokens=(
                    None if tokens is None or is_local else max(0, tokens - before.n_tokens)
                ),
            ) as llm,
        ):
            try:
                yield llm
            finally:
                if not is_local:
                    self._paid[run_id] = before + llm.usage


def paid(llm: JournaledLLM) -> Mapping[str, float]:
    """What a model was paid so far in this step."""
    return asdict(llm.usage)
