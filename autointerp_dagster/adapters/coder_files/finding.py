"""Which of the files that lie there are the coder of a hookpoint."""

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from autointerp_dagster.adapters.coder_files import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    openai,
    saelens,
    sparsify,
)
from autointerp_dagster.adapters.coder_files.description import Description, Format, Unit
from autointerp_dagster.adapters.coder_files.files import CoderFiles, open_files
from autointerp_dagster.adapters.hookpoints import natural_order, translate, writes_of
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import AutoInterpError, CoderError, ModelError
from autointerp_dagster.core.listing import first_few

FORMATS: tuple[Format, ...] = (
    sparsify.FORMAT,
    saelens.FORMAT,
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    dictionary_learning.FORMAT,
    openai.FORMAT,
    llama_scope.FORMAT,
    circuit_tracer.FORMAT,
)

ModelType = Callable[[], str] | None
"""The subject model's, asked for only if a name depends on it; null: names stay as they are."""

_LAYER_IN_NAME = re.compile(r"(?:^|[/._-])(?:(?:layers?|blocks)[._]?|h[._])(\d+)")
"""``h100`` is a machine, no layer."""
_SHOWN = 20
"""Names in a message."""


class Found(NamedTuple):
    """A coder's files, with its place."""

    files: CoderFiles
    unit: Unit
    format: Format
    description: Description
    reads: str | None
    """Hookpoint that is encoded; null: nobody says."""
    writes: str | None
    """Hookpoint that decoder rows are added to; null: nobody says."""

    @property
    def hookpoint(self) -> str:
        """What a study writes to ask for it: its module, or where it reads."""
        return self.unit.module or self.reads or self.unit.name

    @property
    def name(self) -> str:
        """For messages."""
        return self.unit.name or "."


def find_coder(config: FileCoderConfig, hookpoint: str | None, model_type: ModelType) -> Found:
    """The one coder that a hookpoint asks for.

    Args:
        config: Where to look, and how to choose.
        hookpoint: What the study's layer says: a coder's folder, where it reads, or where it
            writes; null: the only one there.
        model_type: For sites of TransformerLens in the files or the study.

    Returns:
        With its place; where neither files nor study say it, the study's layer is.

    Raises:
        CoderError: If there is none, or more than one (lists what is there), or nobody says where
            a transcoder writes.
        ModelError: If a name in the files is not known for the subject model.
    """
    found = _find(config, hookpoint, model_type)
    if found.reads is not None or hookpoint is None:
        return found
    reads = _hookpoint(hookpoint, model_type)
    if found.description.io != "out" and not reads.endswith((".input", ".normalized")):
        reads = f"{reads}.input"
    shown = found.files.shown(found.unit.weights)
    return found._replace(reads=reads, writes=_writes(shown, found.description, reads, model_type))


def hookpoints_of(config: FileCoderConfig, model_type: ModelType) -> list[str]:
    """What a study may write to ask for the finished coders that lie there, in natural order.

    Raises:
        CoderError: If there is none.
        ModelError: If a name in the files is not known for the subject model.
    """
    files = open_files(config)
    units = _finished(_selected(files, config))
    named = {unit.module for _, unit in units if unit.module is not None}
    others = [item for item in units if item[1].module is None]
    placed, refused = _placed(files, config, others, model_type)
    names = named | {found.hookpoint for found in placed}
    if not names:
        raise refused[0]
    return sorted(names, key=natural_order)


def finished_coders(config: FileCoderConfig) -> tuple[CoderFiles, list[tuple[Format, Unit]]]:
    """The coders that lie there, spare checkpoints left out, in natural order of their paths.

    They are told by names alone, so files of one may still be missing.

    Raises:
        CoderError: If there is none.
    """
    files = open_files(config)
    return files, _finished(_selected(files, config))


def place_coder(
    files: CoderFiles, config: FileCoderConfig, item: tuple[Format, Unit], model_type: ModelType
) -> Found:
    """One of the coders that lie there with its place, from its settings.

    Raises:
        CoderError: If its settings are missing, damaged, or of a kind that is not supported.
        ModelError: If a name in them is not known for the subject model.
    """
    return _place(files, config, *item, model_type)


def _find(config: FileCoderConfig, hookpoint: str | None, model_type: ModelType) -> Found:
    files = open_files(config)
    units = _selected(files, config)
    if hookpoint is None:
        return _only(files, config, _finished(units), model_type, "any hookpoint")
    exact = [item for item in units if item[1].name == hookpoint]
    named = exact or _finished([item for item in units if item[1].module == hookpoint])
    if named:
        return _only(files, config, named, model_type, hookpoint)
    wanted = {hookpoint, _hookpoint(hookpoint, model_type)}
    is_told = config.reads is not None  # then no folder's name says where it is
    near = [item for item in _finished(units) if is_told or _may_be_at(item[1], wanted)]
    placed, refused = _placed(files, config, near, model_type)
    matching = [found for found in placed if _is_at(found, hookpoint, wanted)]
    if matching:
        return _one(files, config, matching, hookpoint)
    if refused and not placed:
        raise refused[0]
    there = [unit.module for _, unit in units if unit.module is not None]
    there += [found.hookpoint for found in placed]
    raise _nothing(files, there or _names(units), hookpoint, refused)


_Item = tuple[Format, Unit]


def _selected(files: CoderFiles, config: FileCoderConfig) -> list[_Item]:
    """The coders of the study's format among the files, those that ``select`` names."""
    formats = [f for f in FORMATS if config.format in ("auto", f.name)]
    every = [(f, unit) for f in formats for unit in f.units(files.names)]
    every.sort(key=lambda item: natural_order(item[1].name))
    if not every:
        layouts = "; ".join(f"{f.name}: {f.layout}" for f in formats)
        raise CoderError(
            f"coders {files.label}: no coder here. Files: {_listed(files.names)}. Wanted "
            f"({layouts}). Point the coder's path or repo at its folder, or say its format."
        )
    if config.select is None:
        return every
    pattern = f"*/{config.select.strip('/')}/*"
    kept = [item for item in every if fnmatch.fnmatchcase(f"/{item[1].name}/", pattern)]
    if not kept:
        raise CoderError(
            f"coders {files.label}: select {config.select!r} names none of the coders here: "
            f"{_listed(_names(every))}. Correct select in the study."
        )
    return kept


def _finished(units: Sequence[_Item]) -> list[_Item]:
    """Those that are no spare checkpoints, unless all are."""
    return [item for item in units if not item[1].is_spare] or list(units)


def _only(
    files: CoderFiles,
    config: FileCoderConfig,
    units: Sequence[_Item],
    model_type: ModelType,
    hookpoint: str,
) -> Found:
    if len(units) > 1 and config.l0 is None:
        raise _several(files, _names(units), hookpoint)
    return _one(files, config, [_place(files, config, *u, model_type) for u in units], hookpoint)


def _one(
    files: CoderFiles, config: FileCoderConfig, found: Sequence[Found], hookpoint: str
) -> Found:
    """The one there is, or the one whose published L0 is nearest to the study's."""
    if len(found) == 1:
        return found[0]
    known = [(one, one.description.expected_l0) for one in found]
    if config.l0 is not None:
        distances = [(abs(l0 - config.l0), one) for one, l0 in known if l0 is not None]
        least = min((distance for distance, _ in distances), default=None)
        found = [one for distance, one in distances if distance == least] or found
        if len(found) == 1:
            return found[0]
    raise _several(files, [one.name for one in found], hookpoint)


def _placed(
    files: CoderFiles, config: FileCoderConfig, units: Sequence[_Item], model_type: ModelType
) -> tuple[list[Found], list[AutoInterpError]]:
    """Those that can be used, and why the others cannot: these need not be what is asked for."""
    placed: list[Found] = []
    refused: list[AutoInterpError] = []
    for format_, unit in units:
        try:
            placed.append(_place(files, config, format_, unit, model_type))
        except (CoderError, ModelError) as error:
            refused.append(error)
    return placed, refused


def _place(
    files: CoderFiles,
    config: FileCoderConfig,
    format_: Format,
    unit: Unit,
    model_type: ModelType,
) -> Found:
    description = format_.describe(files, unit)
    reads, writes = description.reads, description.writes
    if config.reads is not None:
        shown, layer = files.shown(unit.weights), _layer_of(unit, description)
        reads = _filled(config.reads, layer, shown)
        writes = None if config.writes is None else _filled(config.writes, layer, shown)
    elif unit.module is not None:  # trained on modules of these names
        return Found(files, unit, format_, description, reads, writes)
    reads = None if reads is None else _hookpoint(reads, model_type)
    if writes is not None:
        writes = _hookpoint(writes, model_type)
    elif reads is not None:
        writes = _writes(files.shown(unit.weights), description, reads, model_type)
    return Found(files, unit, format_, description, reads, writes)


def _filled(name: str, layer: int | None, shown: str) -> str:
    """A hookpoint of the study with the layer's number in it."""
    if "{layer}" not in name:
        return name
    if layer is None:
        raise CoderError(
            f"{shown}: its layer is not known, and the study says {name!r}. Write the layer's "
            "number in the study, for one coder at a time."
        )
    return name.replace("{layer}", str(layer))


def _layer_of(unit: Unit, description: Description) -> int | None:
    """The layer that the files name in any way."""
    if description.layer is not None:
        return description.layer
    return next(iter(_numbers(unit.module or description.reads or "")), None)


def _writes(shown: str, description: Description, reads: str, model_type: ModelType) -> str | None:
    """Where a coder writes that the study does not say; null: where it reads.

    Raises:
        CoderError: If it is a transcoder whose files do not say it either.
        ModelError: If its files name a place that the subject model does not have.
    """
    if not description.is_transcoder:
        return None if model_type is None else writes_of(reads, model_type())
    if description.writes is not None:
        return _hookpoint(description.writes, model_type)
    if reads.endswith(".input"):
        return reads.removesuffix(".input")
    raise CoderError(
        f"{shown}: a transcoder that reads {reads!r}, and nobody says where it writes. In the "
        "study, write reads and writes, e.g. reads: layers.9.mlp.input, writes: layers.9.mlp."
    )


def _hookpoint(name: str, model_type: ModelType) -> str:
    """A name in the files or the study, as a hookpoint of the subject model."""
    return name.removesuffix(".output") if model_type is None else translate(name, model_type())


def _is_at(found: Found, hookpoint: str, wanted: set[str]) -> bool:
    if found.reads is not None:
        raw = (found.description.reads, found.description.writes)
        return bool(wanted & {found.reads, found.writes}) or hookpoint in raw
    layer = found.description.layer
    return layer is None or layer in _numbers(hookpoint)


def _may_be_at(unit: Unit, wanted: set[str]) -> bool:
    """Whether a folder is not clearly another place's, whose settings then need not be read.

    A number in a folder's name is taken for the layer's, or for that of a layer beside it: names
    count layers from either side.
    """
    if unit.module is not None:
        return unit.module in {name.removesuffix(".input") for name in wanted} | wanted
    layers = [int(n) for n in re.findall(_LAYER_IN_NAME, unit.name)]
    numbers = [n for name in wanted for n in _numbers(name)]
    return not layers or not numbers or any(abs(a - b) <= 1 for a in layers for b in numbers)


def _numbers(hookpoint: str) -> list[int]:
    return [int(part) for part in hookpoint.split(".") if part.isdigit()]


def _names(units: Sequence[_Item]) -> list[str]:
    return [unit.name or "." for _, unit in units]


def _listed(names: Sequence[str]) -> str:
    return first_few(names, _SHOWN) or "none"


def _nothing(
    files: CoderFiles, there: Sequence[str], hookpoint: str, refused: Sequence[AutoInterpError]
) -> CoderError:
    more = f" Beside these, {len(refused)} that cannot be read: {refused[0]}" if refused else ""
    known = _listed(sorted(set(there), key=natural_order))
    return CoderError(
        f"coders {files.label}: no coder of {hookpoint!r}. There are coders of: {known}. "
        f"Correct the study's layers, or say where it reads (reads).{more}"
    )


def _several(files: CoderFiles, names: Sequence[str], hookpoint: str) -> CoderError:
    return CoderError(
        f"coders {files.label}: {len(names)} coders for {hookpoint}: {_listed(names)}. Name one: a "
        "hookpoint, or in the study select (a pattern of its folders) or l0."
    )
