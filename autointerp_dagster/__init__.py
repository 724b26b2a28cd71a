"""Explain and score the latents of sparse autoencoders, as a declarative Dagster pipeline.

For notebooks and scripts: ``from autointerp_dagster import load_sparse_coder``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autointerp_dagster.adapters.coder_files import load_sparse_coder

__all__ = ["load_sparse_coder"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: they bring torch and transformers along."""
    if name == "load_sparse_coder":
        from autointerp_dagster.adapters.coder_files import load_sparse_coder

        return load_sparse_coder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
