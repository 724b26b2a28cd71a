"""Identities that every stage shares: which latent, which layer, which cell of the grid."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class LayerKey:
    """One sparse coder at one place of the subject model; a key of the ``layer`` dimension."""

    coder: str
    """The coder's name in the study, e.g. ``sae``."""
    hookpoint: str
    """Dotted module path in the subject model's base model, e.g. ``layers.9``."""

    def __str__(self) -> str:
        """The partition key, e.g. ``sae@layers.9``."""
        return f"{self.coder}@{self.hookpoint}"

    @classmethod
    def parse(cls, key: str) -> "LayerKey":
        """The layer that a partition key names.

        Raises:
            ValueError: If ``key`` is not ``<coder>@<hookpoint>``.
        """
        coder, separator, hookpoint = key.partition("@")
        if not (coder and separator and hookpoint):
            raise ValueError(f"layer key {key!r}: wanted <coder>@<hookpoint>, e.g. 'sae@layers.9'.")
        return cls(coder, hookpoint)


@dataclass(frozen=True, slots=True, order=True)
class LatentRange:
    """A block of consecutive latents; a key of the ``range`` dimension."""

    start: int
    """First latent of the block."""
    stop: int
    """One past the last latent of the block."""

    def __str__(self) -> str:
        """The partition key: first and last latent, e.g. ``0000000-0004095``."""
        return f"{self.start:07d}-{self.stop - 1:07d}"

    @classmethod
    def parse(cls, key: str) -> "LatentRange":
        """The range that a partition key names.

        Raises:
            ValueError: If ``key`` is not ``<first>-<last>``.
        """
        first, separator, last = key.partition("-")
        if not (separator and first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise ValueError(f"range key {key!r}: wanted <first>-<last>, e.g. '0000000-0004095'.")
        return cls(int(first), int(last) + 1)


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One partition: a range of latents of one layer."""

    layer: LayerKey
    range: LatentRange

    def __str__(self) -> str:
        """The cell's path in the store, e.g. ``sae@layers.9/0000000-0004095``."""
        return f"{self.layer}/{self.range}"


@dataclass(frozen=True, slots=True, order=True)
class WholeStudy:
    """The only place of an asset without partitions."""

    def __str__(self) -> str:
        """The place's path in the store."""
        return "all"


Place = Cell | LayerKey | WholeStudy
"""Where one commit of a stage belongs."""


@dataclass(frozen=True, slots=True, order=True)
class LatentId:
    """One unit of one sparse coder: what is explained and scored."""

    coder: str
    hookpoint: str
    index: int
    """``0 <= index < num_latents``."""

    def __str__(self) -> str:
        """For messages, e.g. ``sae@layers.9 latent 17``."""
        return f"{self.coder}@{self.hookpoint} latent {self.index}"


@runtime_checkable
class Progress(Protocol):
    """Something that shows how far a long loop is."""

    def __call__(
        self,
        items: Iterable[T],
        *,
        total: int,
        description: str,
        unit: str = "it",
        note: Callable[[], str] | None = None,
    ) -> Iterator[T]:
        """The items of ``items``, unchanged and in order, while a bar with an ETA moves on.

        Args:
            items: What is gone through.
            total: How many there will be.
            description: What is being done, a word or two.
            unit: What an item is.
            note: Asked now and then for a short text to show beside, e.g. what was spent.
        """
        ...


def silent(
    items: Iterable[T],
    *,
    total: int,
    description: str,
    unit: str = "it",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """The :class:`Progress` that shows nothing."""
    del total, description, unit, note
    yield from items
