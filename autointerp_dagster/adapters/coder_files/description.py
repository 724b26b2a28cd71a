"""What a format's module says of a coder's files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from autointerp_dagster.adapters.coder_files.files import CoderFiles
from autointerp_dagster.adapters.coder_files.weights import Weights
from autointerp_dagster.core.sparse_coders import LinearCoder

IO = Literal["out", "in", "in_and_out"]
"""What of a module a coder was trained on: its output, its input, or the way from one to the other.
"""


@dataclass(frozen=True, slots=True)
class Unit:
    """The files of one coder, told by their names alone."""

    name: str
    """Path of its folder or file below the source; empty: the source's own folder."""
    weights: str
    """File with the tensors."""
    config: str | None = None
    """File with the settings; null for formats without one."""
    module: str | None = None
    """Hookpoint that its folder is named after."""
    is_spare: bool = False
    """A checkpoint beside a finished coder: taken only if it is selected by name."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the names and the settings say, before any tensor is read."""

    build: Callable[[Weights], LinearCoder] = field(repr=False)
    """The coder, from its checked tensors; raises CoderError."""
    settings: Mapping[str, Any]
    """What decides, beside the tensors, how to encode; JSON-ready."""
    reads: str | None = None
    """Hookpoint that is encoded, in the subject model's names or TransformerLens'; null: the files
    do not say."""
    writes: str | None = None
    """Hookpoint that decoder rows are added to; null: ``reads``."""
    io: IO = "out"
    """Of its module, wherever that is."""
    layer: int | None = None
    """Layer of the subject model that the names say, whatever else is known."""
    expected_l0: float | None = None
    """Latents that fire on a token, on average, as published."""
    notes: Sequence[str] = ()
    """Warnings for whoever uses the coder."""

    @property
    def is_transcoder(self) -> bool:
        """Whether it was trained to give another vector than it reads."""
        return self.io == "in_and_out" or self.writes not in (None, self.reads)


class Format(NamedTuple):
    """One layout of files."""

    name: str
    """As a study writes it."""
    layout: str
    """Its files, for messages."""
    units: Callable[[Iterable[str]], list[Unit]]
    """The coders among files of these names."""
    describe: Callable[[CoderFiles, Unit], Description]
    """What is known of a coder before its tensors are read; fetches its settings."""


def in_folder(folder: str, name: str) -> str:
    """Path of a file in a folder below the source; the source's own folder is empty."""
    return f"{folder}/{name}" if folder else name


def folder_of(name: str) -> str:
    """Path of the folder that a file lies in; empty for the source's own."""
    return name.rpartition("/")[0]
