"""Sparse coders from files: every published layout, from a local folder or the hub alike.

Each format's module tells its coders by the names of files, describes one from its settings, and
builds it from its tensors; nothing else knows the format.
"""

from autointerp_dagster.adapters.coder_files.candidates import Candidate, list_candidates
from autointerp_dagster.adapters.coder_files.files import NotFetchedError, look_again
from autointerp_dagster.adapters.coder_files.opening import (
    LoadedCoder,
    check_fits,
    check_width,
    coder_identity,
    discover_hookpoints,
    open_coder,
    published_l0,
)
from autointerp_dagster.adapters.coder_files.public import load_sparse_coder

__all__ = [
    "Candidate",
    "LoadedCoder",
    "NotFetchedError",
    "check_fits",
    "check_width",
    "coder_identity",
    "discover_hookpoints",
    "list_candidates",
    "load_sparse_coder",
    "look_again",
    "open_coder",
    "published_l0",
]
