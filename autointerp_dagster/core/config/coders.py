"""The sparse coders of a study."""

from pathlib import Path
from typing import Literal

from autointerp_dagster.core.config.base import Parameters


class SparsifyCoderConfig(Parameters, frozen=True):
    """SAEs on disk in sparsify's layout: one folder per hookpoint under ``path``."""

    format: Literal["sparsify"] = "sparsify"
    path: Path
    """Folder with ``<hookpoint>/cfg.json``; relative paths count from the study file."""


CoderConfig = SparsifyCoderConfig
