"""The activation cache of many layers in one pass, with non-zeros spooled to disk.

``running`` runs the subject model and keeps checkpoints, ``spool`` appends packed non-zeros
(``packing``) to files in a locked folder (``folders``, ``plan``), ``merging`` sorts them cell by
cell. Memory is bounded, however many tokens, layers and ranges there are.
"""

from autointerp_dagster.adapters.cache.folders import SPOOL_VARIABLE, default_spool_dir
from autointerp_dagster.adapters.cache.plan import PassIdentity
from autointerp_dagster.adapters.cache.running import CachedLayers, SpoolSettings, cache_layers

__all__ = [
    "SPOOL_VARIABLE",
    "CachedLayers",
    "PassIdentity",
    "SpoolSettings",
    "cache_layers",
    "default_spool_dir",
]
