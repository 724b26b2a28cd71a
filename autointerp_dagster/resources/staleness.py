"""Which places of a study are out of date, and why, from manifests and fingerprints alone.

The rule is the one by which a run decides to skip: a place is current if its head is complete, has
all of its files, and was made by the present code with the present parameters, models and inputs.
Only what differs is looked for here, so that it can be said in words. Nothing is loaded or asked;
files of models, coders and texts are hashed, as a run hashes them.

A place whose input will change is told apart from one that has itself a cause: it *follows*. If the
input turns out the same, a run finds it in the store and links it.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.heads import Heads, Name, read_heads
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import AutoInterpError
from autointerp_dagster.core.listing import first_few
from autointerp_dagster.core.types import Place
from autointerp_dagster.resources.identities import Identities
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import PROMPT_KEYS
from autointerp_dagster.study.stages import Stage, inputs_at, places_of, stages_of, upstream_of

Kind = Literal[
    "never_made",
    "cut_short",
    "lost",
    "damaged",
    "code",
    "parameter",
    "prompt",
    "model",
    "external",
    "input",
    "unreadable",
    "follows",
]
"""Of a cause. ``external``: weights, text or subject model changed. ``input``: an upstream place
holds something else, came to be an input, or is none any more. ``lost``: files of it are missing.
``damaged``: its manifest cannot be read. ``unreadable``: an external input cannot be read."""

_SHOWN = 3
"""Places that a cause names; all of them are in ``cells``."""
_SHOWN_CHARACTERS = 80
_ABSENT = object()
_EXTERNAL = {"subject_model": "subject model", "corpus": "corpus", "sparse_coders": "weights"}


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a place is out of date."""

    kind: Kind
    text: str
    """In words."""
    key: str | None = None
    """Of the parameter or model, dotted."""
    old: Any = None
    """What the place was made with; of an external input, the first of ``cells``."""
    new: Any = None
    asset: str | None = None
    """The input."""
    cells: tuple[str, ...] = ()
    """Places of the input."""


@dataclass(frozen=True, slots=True)
class OutOfDate:
    """A place that a run would not skip."""

    asset: str
    cell: str
    causes: tuple[Cause, ...]

    @property
    def is_direct(self) -> bool:
        """Whether it has itself a cause; else only an input of it will change."""
        return any(cause.kind != "follows" for cause in self.causes)

    @property
    def name(self) -> Name:
        """(asset, place)."""
        return self.asset, self.cell


@dataclass(frozen=True, slots=True)
class Alike:
    """Places of one stage that are out of date for the same reasons."""

    asset: str
    reasons: tuple[str, ...]
    cells: tuple[str, ...]


def alike(found: Sequence[OutOfDate]) -> list[Alike]:
    """Places with the same reasons put together, in the order of the data."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for one in found:
        reasons = tuple(_reason(one, cause) for cause in one.causes)
        groups.setdefault((one.asset, reasons), []).append(one.cell)
    return [Alike(asset, reasons, tuple(cells)) for (asset, reasons), cells in groups.items()]


def _reason(one: OutOfDate, cause: Cause) -> str:
    """In words that are the same for the places of a stage."""
    if cause.kind == "follows":
        return f"follows {cause.asset}"
    is_own = cause.kind == "input" and cause.cells == (one.cell,)
    return cause.text.replace(f" {one.cell}", "") if is_own else cause.text


def n_places(study: Study) -> int:
    """Places of all stages, external inputs not counted."""
    made = [stage for stage in stages_of(study) if not stage.is_external]
    return sum(1 for stage in made for _ in places_of(study, stage.scope))


def summary_of(study: Study, found: Sequence[OutOfDate]) -> str:
    """How much is out of date, and what makes it anew, in a sentence or two."""
    if not found:
        return f"{study.name}: nothing is out of date ({n_places(study)} places)."
    n_direct = sum(one.is_direct for one in found)
    return (
        f"{len(found)} of {n_places(study)} places: {n_direct} by themselves, "
        f"{len(found) - n_direct} because an input will change. "
        f"`autointerp run {study.name} --stale` makes these and nothing else."
    )


def out_of_date(
    study: Study, store: Store, identities: Identities | None = None
) -> list[OutOfDate]:
    """Every place of a study that a run would not skip, in the order of the data.

    Args:
        study: The study.
        store: Its store; only read.
        identities: What it would be made with; null: what the study names.

    Raises:
        StoreError: If the store does not answer.
        AutoInterpError: If a model that a stage asks cannot be found.
    """
    return Staleness(study, store, identities or Identities.of(study)).found()


class Staleness:
    """What the store holds of a study, against what a run would make now."""

    def __init__(self, study: Study, store: Store, identities: Identities) -> None:
        """Reads every head and lists the blobs.

        Raises:
            StoreError: If the store does not answer.
        """
        self._study = study
        self._store = store
        self._heads: Heads = read_heads(store, study.name)
        self._blobs: Collection[str] = list_files(store.root, "blobs").keys()
        self._identities = identities
        self._found: dict[Name, OutOfDate] = {}

    def found(self) -> list[OutOfDate]:
        """See :func:`out_of_date`."""
        for stage in stages_of(self._study):
            if not stage.is_external:
                self._look_at(stage)
        return list(self._found.values())

    def _look_at(self, stage: Stage) -> None:
        inputs = StageInputs.of(
            self._store,
            self._study,
            stage.name,
            models=self._identities.models(stage.name),
            external=self._identities.external,
        )
        upstream = upstream_of(self._study, stage)
        for place in places_of(self._study, stage.scope):
            causes = tuple(self._causes(inputs, upstream, place))
            if causes:
                name = stage.name, str(place)
                self._found[name] = OutOfDate(*name, causes)

    def _causes(
        self, inputs: StageInputs, upstream: Sequence[Stage], place: Place
    ) -> Iterator[Cause]:
        name = inputs.stage.name, str(place)
        sources = {up: inputs_at(self._study, inputs.stage, place, up) for up in upstream}
        if name in self._heads.damaged:
            yield Cause("damaged", f"damaged: {self._heads.damaged[name]}")
        elif name not in self._heads.manifests:
            yield Cause("never_made", "never made")
        else:
            yield from self._changes(inputs, place, sources)
        for up, places in sources.items():
            cells = tuple(str(p) for p in places if (up.name, str(p)) in self._found)
            if cells:
                text = f"follows {up.name} {first_few(cells, _SHOWN)}, which is out of date"
                yield Cause("follows", text, asset=up.name, cells=cells)

    def _changes(
        self, inputs: StageInputs, place: Place, sources: Mapping[Stage, Sequence[Place]]
    ) -> Iterator[Cause]:
        """Why a run would not take the head of a place as it is; nothing if it would."""
        head = self._heads.manifests[inputs.stage.name, str(place)]
        if not head.complete:
            yield Cause("cut_short", "cut short: by a budget, a time limit or a replay")
        missing = [blob.name for blob in head.blobs if blob.path not in self._blobs]
        if missing:
            yield Cause("lost", f"lost: no longer in the store: {', '.join(missing)}")
        now: dict[Stage, dict[str, str]] = {}
        unreadable: list[Cause] = []
        for stage, places in sources.items():
            now[stage] = {}
            for source in places:
                try:
                    version = self._version(inputs, stage, source)
                except AutoInterpError as error:
                    text = f"unreadable: {stage.name} {source}: {error}"
                    cells = (str(source),)
                    unreadable.append(Cause("unreadable", text, asset=stage.name, cells=cells))
                else:
                    if version is not None:
                        now[stage][str(source)] = version
        yield from unreadable
        is_known = all(len(now[stage]) == len(places) for stage, places in sources.items())
        if is_known and inputs.fingerprint(place) == head.input_fingerprint:
            return
        differences = [
            *_code_changes(head, inputs.stage),
            *parameter_changes(
                head.parameters, inputs.parameters, self._identities.models(inputs.stage.name)
            ),
            *_input_changes(head, now, sources),
        ]
        if is_known and not differences:
            text = "code: inputs were fingerprinted in another way then"
            differences = [Cause("code", text, old=head.input_fingerprint)]
        yield from differences

    def _version(self, inputs: StageInputs, stage: Stage, source: Place) -> str | None:
        """The version that a place of an input has now; null if there is none."""
        if stage.is_external:
            return inputs.external_version(stage, source)
        head = self._heads.manifests.get((stage.name, str(source)))
        if head is None:
            return None
        inputs.take(stage.name, source, head)
        return head.content_hash


def _code_changes(head: Manifest, stage: Stage) -> Iterator[Cause]:
    old, new = head.stage_version, stage.version
    if old != new:
        yield Cause("code", f"code: version {old} -> {new}", old=old, new=new)


def parameter_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], models: Mapping[str, Any]
) -> Iterator[Cause]:
    """Which parameters differ, each by its dotted key.

    Args:
        before: Those in a manifest.
        now: The present ones; JSON-ready.
        models: Those of them that are identities of models.
    """
    for keys, old, new in _differences(before, json.loads(json.dumps(now)), ()):
        kind: Kind = "prompt" if keys[-1] in PROMPT_KEYS else "parameter"
        kind = "model" if keys[0] in models else kind
        key = ".".join(keys)
        shown = " -> ".join("absent" if v is _ABSENT else _value(v) for v in (old, new))
        yield Cause(
            kind,
            f"{kind}: {key} {shown}",
            key=key,
            old=None if old is _ABSENT else old,
            new=None if new is _ABSENT else new,
        )


def _differences(
    old: Any, new: Any, keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """The smallest parts that differ; what is on one side alone is one part."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), (*keys, key))
    elif old is _ABSENT or new is _ABSENT or _canonical(old) != _canonical(new):
        yield keys, old, new


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _input_changes(
    head: Manifest,
    now: Mapping[Stage, Mapping[str, str]],
    sources: Mapping[Stage, Sequence[Place]],
) -> Iterator[Cause]:
    """What differs between the inputs that a head was made from and the present ones."""
    before: dict[str, dict[str, str]] = {}
    for up in head.upstream:
        before.setdefault(up.asset, {})[up.cell] = up.content_hash
    for stage, places in sources.items():
        old, new = before.pop(stage.name, {}), now[stage]
        changed = tuple(cell for cell in new if cell in old and new[cell] != old[cell])
        added = tuple(cell for cell in new if cell not in old)
        if changed and stage.is_external:
            first = changed[0]
            yield Cause(
                "external",
                f"{_EXTERNAL[stage.name]}: {stage.name} {first_few(changed, _SHOWN)} changed, "
                f"{old[first][:12]} -> {new[first][:12]}",
                old=old[first],
                new=new[first],
                asset=stage.name,
                cells=changed,
            )
        elif changed:
            text = f"input: {stage.name} {first_few(changed, _SHOWN)} was replaced"
            yield Cause("input", text, asset=stage.name, cells=changed)
        if added:
            text = f"input: {stage.name} {first_few(added, _SHOWN)} is a new one"
            yield Cause("input", text, asset=stage.name, cells=added)
        gone = old.keys() - {str(place) for place in places}
        if gone:
            before[stage.name] = dict.fromkeys(sorted(gone), "")
    for asset, cells in before.items():
        text = f"input: {asset} {first_few(tuple(cells), _SHOWN)} is none any more"
        yield Cause("input", text, asset=asset, cells=tuple(cells))


def _value(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
