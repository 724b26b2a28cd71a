"""What a study with ``layers: discover`` has found, kept in its store, one small file each.

    discovery/<study>/layers/<layer>.json     a layer of the study, from then on
    discovery/<study>/refused/<coder>.json    a coder that cannot be used, and why
    discovery/<study>/looks/<name>.json       what the last look by sensor, schedule or hand found
    discovery/<study>/claims/<kind>/*.json    what a look is about to register, or asks a run for

Several may look at the same time: one registers a layer, and one asks for its run. Whoever reads a
study's layers, with or without Dagster, reads them here.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from autointerp_dagster.adapters.bulk import list_files, look_at, read_files, remove
from autointerp_dagster.adapters.claims import Claim
from autointerp_dagster.adapters.durable import deleting, write_durably, writing
from autointerp_dagster.adapters.heads import is_temporary
from autointerp_dagster.adapters.hookpoints import natural_order
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.types import LayerKey

By = Literal["sensor", "schedule", "command"]
"""Who looked."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class FoundLayer(_Record):
    """A coder that was checked and is a layer of the study."""

    layer: str
    """Its key."""
    address: str
    """Where it lies among its coder's files; of a baseline: the hookpoint."""
    found: str
    """When, in UTC."""
    hookpoint: str
    """Its place in the subject model; several layers may have one."""
    stamp: str = ""
    """Of its files, and of what else the last check rested on."""
    identity: str | None = None
    """Of its content then; null for a baseline, which is made when it is run."""
    changed: str | None = None
    """When its content was last seen to be another one."""
    num_latents: int | None = None
    about: str = ""
    """What was found, for people."""

    @property
    def key(self) -> LayerKey:
        """Its key."""
        return LayerKey.parse(self.layer)


class Refused(_Record):
    """A coder that is all there and cannot be used."""

    name: str
    """``<coder>@<address>``."""
    stamp: str
    """Likewise: when it is another one, the coder is checked again."""
    reason: str
    since: str
    """In UTC."""


class Look(_Record):
    """What one look found; everything by name, with a reason where there is one."""

    by: By
    time: str
    """In UTC."""
    n_layers: int = 0
    """Of the study, after it."""
    found: tuple[str, ...] = ()
    """New layers."""
    changed: tuple[str, ...] = ()
    """Layers whose coder is another one now."""
    launched: tuple[str, ...] = ()
    """Layers for which a run was asked for."""
    waiting: dict[str, str] = {}
    broken: dict[str, str] = {}

    @property
    def is_news(self) -> bool:
        """Whether anything came of it."""
        return bool(self.found or self.changed or self.launched)

    @property
    def line(self) -> str:
        """In a few words."""
        counts = {
            "new": self.found,
            "changed": self.changed,
            "launched": self.launched,
            "waiting": self.waiting,
            "broken": self.broken,
        }
        said = [f"{len(names)} {what}" for what, names in counts.items() if names]
        return f"{self.n_layers} layers; " + (", ".join(said) or "nothing new")


R = TypeVar("R", bound=_Record)


class FoundLayers:
    """The records of one study. Every call reads or writes the store."""

    def __init__(self, store: Store, study: str) -> None:
        """Nothing is read or written yet."""
        self._root = store.root
        self._folder = f"discovery/{study}"

    def layers(self) -> list[FoundLayer]:
        """The study's layers, in the order in which they were found.

        Raises:
            StoreError: If the store does not answer, or a record cannot be read.
        """
        found = self._read("layers", FoundLayer)
        return sorted(found, key=lambda one: (one.found, natural_order(one.layer)))

    def add(self, found: FoundLayer) -> FoundLayer | None:
        """Registers a layer that is new.

        Returns:
            What is on record then: of another look, if that was first. Null: another look is just
            registering it.

        Raises:
            StoreError: If the store cannot be read or written.
        """
        claim = Claim(self._root, f"{self._folder}/claims/registering", [found.layer])
        if not claim.granted:
            return None
        there = next(self._parsed([self._path("layers", found.layer)], FoundLayer), None)
        if there is None:
            self.put(found)
        claim.release()
        return there or found

    def claim_launches(self, findings: Collection[str]) -> set[str]:
        """Those of some findings of layers that nobody else is just asking a run for.

        Raises:
            StoreError: If the store cannot be read or written.
        """
        return Claim(self._root, f"{self._folder}/claims/launching", findings).granted

    def put(self, found: FoundLayer) -> None:
        """Says what is now known of a layer that is registered.

        Raises:
            StoreError: If the store cannot be written.
        """
        self._write("layers", found.layer, found)

    def refused(self) -> list[Refused]:
        """The coders that cannot be used.

        Raises:
            StoreError: As for :meth:`layers`.
        """
        return list(self._read("refused", Refused))

    def refuse(self, refused: Refused) -> None:
        """Remembers why a coder cannot be used, so that it is said once.

        Raises:
            StoreError: If the store cannot be written.
        """
        self._write("refused", refused.name, refused)

    def accept(self, refused: Refused) -> None:
        """Forgets that a coder could not be used.

        Raises:
            StoreError: If the store cannot be written.
        """
        self._remove("refused", refused.name)

    def forget(self, found: FoundLayer) -> None:
        """Takes a layer out of the study; its results stay.

        Raises:
            StoreError: If the store cannot be written.
        """
        self._remove("layers", found.layer)

    def looks(self) -> list[Look]:
        """The last look of each kind, the newest first.

        Raises:
            StoreError: As for :meth:`layers`.
        """
        return sorted(self._read("looks", Look), key=lambda look: look.time, reverse=True)

    def put_look(self, look: Look) -> None:
        """Keeps a look in place of the last one of its kind.

        Raises:
            StoreError: If the store cannot be written.
        """
        self._write("looks", look.by, look)

    def _read(self, kind: str, model: type[R]) -> Iterator[R]:
        folder = f"{self._folder}/{kind}"
        paths = sorted(path for path in list_files(self._root, folder) if not is_temporary(path))
        return self._parsed(paths, model)

    def _parsed(self, paths: Iterable[str], model: type[R]) -> Iterator[R]:
        for path, data in read_files(self._root, paths):
            if data is None:  # there is none, or it was removed meanwhile
                continue
            try:
                yield model.model_validate_json(data)
            except ValidationError as error:
                raise StoreError(
                    f"{self._root}/{path}: damaged. Delete it: what it says is found again."
                ) from error

    def _write(self, kind: str, name: str, record: _Record) -> None:
        path = self._path(kind, name)
        with writing(self._root, path):
            write_durably(self._root / path, record.model_dump_json(indent=1).encode())

    def _remove(self, kind: str, name: str) -> None:
        path = self._path(kind, name)
        seen = look_at(self._root, path)
        if seen is not None:
            with deleting(self._root, path):
                remove(self._root, {path: seen})

    def _path(self, kind: str, name: str) -> str:
        return f"{self._folder}/{kind}/{quote(name, safe='@')}.json"
