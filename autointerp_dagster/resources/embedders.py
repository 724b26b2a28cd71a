"""Sentence embedders, loaded when first asked for and once per process."""

import dagster as dg

from autointerp_dagster.adapters.embedders import SentenceEmbedder, open_embedder
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.study import Study


class Embedders(dg.ConfigurableResource):
    """Models that turn a text into a vector."""

    def of(self, study: Study) -> SentenceEmbedder:
        """The study's embedder.

        Raises:
            StudyError: If the study names none.
        """
        if study.models.embedder is None:
            raise StudyError(f"study {study.name}: models.embedder: missing. Name an embedder.")
        return open_embedder(study.models.embedder)
