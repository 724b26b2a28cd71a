"""The sparse coders of a study."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from autointerp_dagster.core.config.baseline_coders import (
    NeuronsCoderConfig,
    PCACoderConfig,
    RandomCoderConfig,
)
from autointerp_dagster.core.config.computing import ComputingConfig

CoderFormat = Literal[
    "auto",
    "sparsify",
    "saelens",
    "gemma_scope",
    "gemma_scope_2",
    "dictionary_learning",
    "openai",
    "llama_scope",
    "circuit_tracer",
]
"""Layouts of files that sparse coders are published in."""


class FileCoderConfig(ComputingConfig, frozen=True):
    """Sparse coders from files, in a local folder or a repository of the Hugging Face Hub."""

    format: CoderFormat = "auto"
    """``auto`` tells by the names of the files."""
    path: Path | None = None
    """Folder with one coder or many, or a coder's file; relative paths count from the study file.
    """
    repo: str | None = Field(default=None, pattern=r"^[^/\s]+/[^/\s]+$")
    """Instead of ``path``: a hub repository, e.g. ``google/gemma-scope-2b-pt-res``. Only the files
    of the coders in use are fetched; ``HF_HUB_OFFLINE=1`` takes them from the hub's cache."""
    revision: str | None = None
    """Commit, tag or branch of ``repo``."""
    select: str | None = None
    """Where several coders lie at one place: a Unix pattern of folders in the coder's path, e.g.
    ``width_16k/average_l0_82`` or ``seed0``."""
    l0: float | None = Field(default=None, gt=0)
    """Where several coders lie at one place: the one whose published average L0 is nearest."""
    reads: str | None = None
    """Hookpoint that is encoded, where the files do not say or mean another model's names; in it
    ``{layer}`` is the coder's layer, e.g. ``layers.{layer}.mlp.input``."""
    writes: str | None = None
    """Hookpoint that a transcoder's decoder adds to, likewise; null: as the files say. Of an
    autoencoder: where it reads."""

    @model_validator(mode="after")
    def _check_where(self) -> "FileCoderConfig":
        if (self.path is None) == (self.repo is None):
            raise ValueError(
                "wanted either path (a folder or file) or repo (a repository of the hub)."
            )
        if self.revision is not None and self.repo is None:
            raise ValueError("revision: only a repo has revisions; a path has none.")
        if self.writes is not None and self.reads is None:
            raise ValueError("writes: wanted reads, too: the hookpoint that is encoded.")
        return self


def _made_from(value: object) -> str:
    found = value.get("format") if isinstance(value, Mapping) else getattr(value, "format", None)
    return f"<{found}>" if found in ("neurons", "random", "pca") else "<files>"


CoderConfig = Annotated[
    Annotated[FileCoderConfig, Tag("<files>")]
    | Annotated[NeuronsCoderConfig, Tag("<neurons>")]
    | Annotated[RandomCoderConfig, Tag("<random>")]
    | Annotated[PCACoderConfig, Tag("<pca>")],
    Discriminator(_made_from),
]
"""By ``format``: a baseline, or else files."""
