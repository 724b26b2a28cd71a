"""The sparse coders of a study."""

from pathlib import Path
from typing import ClassVar, Literal

from autointerp_dagster.core.config.base import Parameters


class SparsifyCoderConfig(Parameters, frozen=True):
    """SAEs on disk in sparsify's layout: one folder per hookpoint under ``path``."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"screen", "compiled"})

    format: Literal["sparsify"] = "sparsify"
    path: Path
    """Folder with ``<hookpoint>/cfg.json``; relative paths count from the study file."""
    screen: Literal["auto", "bfloat16", "float32"] = "auto"
    """On a CPU: what all latents are scored in before the few that may fire are computed in
    float32, which decides. ``auto``: bfloat16 where the CPU multiplies it in hardware and it pays.
    ``float32`` suits a coder with a few huge dimensions. A GPU's product is in float32 anyway.
    """
    compiled: bool = False
    """On a GPU: whether to encode with ``torch.compile``; on a CPU it changes nothing."""


CoderConfig = SparsifyCoderConfig
