"""Corpora by the study that names them."""

import dagster as dg

from autointerp_dagster.adapters.corpora import Corpus, open_corpus
from autointerp_dagster.study import Study


class Corpora(dg.ConfigurableResource):
    """Where the text comes from."""

    def of(self, study: Study) -> Corpus:
        """The study's corpus.

        Raises:
            CorpusError: If it cannot be found.
        """
        return open_corpus(study.corpus)
