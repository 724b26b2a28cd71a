"""Language models that explain and judge, each with its journal and budget behind it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from autointerp_dagster.adapters.llm import Journal, JournaledLLM, open_llm
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.config import LLMConfig, Parameters
from autointerp_dagster.study import Study


class LLMs(dg.ConfigurableResource):
    """Opens the language model that plays a part in a study, for the length of a step."""

    wal_dir: str | None = None
    """Folder of this machine for the journal's write-ahead logs; needed if the store is remote."""

    @contextmanager
    def explainer(self, study: Study, store: Store) -> Iterator[JournaledLLM]:
        """The model that writes explanations."""
        with self._open(study, store, study.models.explainer) as llm:
            yield llm

    @contextmanager
    def judge(self, study: Study, store: Store) -> Iterator[JournaledLLM]:
        """The model that answers scorers."""
        with self._open(study, store, study.models.judge or study.models.explainer) as llm:
            yield llm

    @contextmanager
    def _open(self, study: Study, store: Store, config: LLMConfig) -> Iterator[JournaledLLM]:
        wal_dir = None if self.wal_dir is None else Path(self.wal_dir)
        with (
            Journal(store.root, wal_dir=wal_dir) as journal,
            open_llm(
                config,
                journal=journal,
                budget_usd=study.budget.usd,
                budget_tokens=study.budget.tokens,
            ) as llm,
        ):
            yield llm


def judging_parameters(llm: JournaledLLM, config: Parameters, version: str) -> dict[str, Any]:
    """What decides a judge's verdicts, for fingerprints."""
    return {**config.identity(), "judge": llm.identity, "scorer": version}


def paid(llm: JournaledLLM) -> Mapping[str, float]:
    """What a model was paid so far in this step."""
    return asdict(llm.usage)
