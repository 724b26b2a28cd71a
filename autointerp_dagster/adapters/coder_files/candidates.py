"""The coders that lie at a place, each with a stamp of its files and whether they are all there.

Nothing but settings is read here, and of a local file of weights its two ends: enough to tell an
upload that is still under way from a coder that can be loaded.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from autointerp_dagster.adapters.coder_files.description import (
    Format,
    Unit,
    folder_of,
    in_folder,
)
from autointerp_dagster.adapters.coder_files.files import CoderFiles, NotFetchedError
from autointerp_dagster.adapters.coder_files.finding import (
    ModelType,
    finished_coders,
    place_coder,
)
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import AutoInterpError

_INDEX = ".index.json"
_HEADER_LEN = 8
"""Bytes of a safetensors file that say how long its header is."""
_MAX_HEADER = 100_000_000
"""As the safetensors library has it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One coder among the files, before its tensors are read."""

    address: str
    """Where it lies below the source: what ``open_coder`` takes for a hookpoint."""
    stamp: str
    """Changes when its files do."""
    hookpoint: str | None = None
    """What a study writes to ask for the coder of this place; null if that is not known."""
    waits_for: str | None = None
    """Why its files are not all there yet; null: they are."""
    fault: str | None = None
    """Why it cannot be used although they are; null: nothing is known against it."""


def list_candidates(
    config: FileCoderConfig, model_type: ModelType, now: float, settle_s: float
) -> list[Candidate]:
    """Every finished coder at the place that a study's coder names, in natural order.

    Args:
        config: Where to look.
        model_type: For names of other libraries in the files.
        now: Seconds since 1970.
        settle_s: Seconds for which local files must not have changed to count as whole. A hub's
            commit is whole by itself.

    Raises:
        CoderError: If there is no such folder or repository, or it holds none yet.
    """
    files, coders = finished_coders(config)
    found = []
    for item in coders:
        names = _names_of(files, item[1])
        if config.repo is not None:
            stamp, waits_for = files.label, _not_there(files, names)
        else:
            stamp, waits_for = _local_stamp(files, names), _unsettled(files, names, now, settle_s)
        one = Candidate(item[1].name, stamp, waits_for=waits_for)
        found.append(one if waits_for else _described(one, files, config, item, model_type))
    return found


def _described(
    candidate: Candidate,
    files: CoderFiles,
    config: FileCoderConfig,
    item: tuple[Format, Unit],
    model_type: ModelType,
) -> Candidate:
    """With what its settings say, and whether its weights are whole."""
    try:
        waits_for = None if config.repo else _truncated(files, _names_of(files, item[1]))
        placed = place_coder(files, config, item, model_type)
    except (OSError, NotFetchedError) as error:
        return replace(candidate, waits_for=f"{files.shown(candidate.address)}: {error}")
    except AutoInterpError as error:
        return replace(candidate, fault=str(error))
    fault = None
    if placed.reads is None:
        fault = (
            f"{files.shown(candidate.address)}: its files do not say where it reads. Say it in "
            "the study (coders.<name>.reads), or name its folder after the hookpoint."
        )
    return replace(candidate, hookpoint=placed.hookpoint, waits_for=waits_for, fault=fault)


def _names_of(files: CoderFiles, unit: Unit) -> list[str]:
    """The files that a coder is read from, and indices that name further ones."""
    folder = folder_of(unit.weights)
    beside = [n for n in files.names if folder_of(n) == folder and n.endswith(_INDEX)]
    return [name for name in (unit.config, unit.weights) if name is not None] + beside


def _not_there(files: CoderFiles, names: Iterable[str]) -> str | None:
    """Which file is named and missing; null if none is."""
    for name in names:
        if name not in files.names:
            return f"{files.shown(name)} is not there yet"
        if name.endswith(_INDEX):
            for part in _parts_of(files.fetch(name)):
                whole = in_folder(folder_of(name), part)
                if whole not in files.names:
                    return f"{files.shown(whole)}, which {name} names, is not there yet"
    return None


def _parts_of(index: Path) -> Iterator[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # cut short itself: its size says so soon enough
    named = content.get("weight_map") if isinstance(content, dict) else None
    yield from sorted(set(map(str, named.values()))) if isinstance(named, dict) else ()


def _local_stamp(files: CoderFiles, names: Iterable[str]) -> str:
    seen = [(name, *_size_and_times(files.fetch(name))) for name in names]
    return hashlib.sha256(json.dumps([files.label, seen]).encode()).hexdigest()[:32]


def _size_and_times(file: Path) -> tuple[int, int, int]:
    try:
        stat = file.stat()
    except OSError:
        return -1, 0, 0
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _unsettled(files: CoderFiles, names: Iterable[str], now: float, settle_s: float) -> str | None:
    """What is missing or was touched a moment ago; null if all is quiet.

    The change time counts, too: copying tools set the time of writing back to the original's.
    """
    names = list(names)
    missing = _not_there(files, names)
    if missing is not None:
        return missing
    for name in names:
        try:
            stat = os.stat(files.fetch(name))
        except OSError:
            return f"{files.shown(name)} is not there any more"
        age = now - max(stat.st_mtime, stat.st_ctime)
        if age < settle_s:
            return f"{files.shown(name)} was written to in the last {settle_s:g} s"
    return None


def _truncated(files: CoderFiles, names: Iterable[str]) -> str | None:
    """Which local file of weights ends too early; null if none does, as far as can be told."""
    for name in names:
        file = files.fetch(name)
        is_cut = _is_cut_safetensors(file) if file.suffix == ".safetensors" else _is_cut_zip(file)
        if is_cut:
            return f"{files.shown(name)} is cut off: it ends before its tensors do"
    return None


def _is_cut_safetensors(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(_HEADER_LEN)
        header_len = int.from_bytes(start, "little")
        if len(start) < _HEADER_LEN:
            return True
        if header_len > _MAX_HEADER:
            return False  # no such file: whoever loads it says so
        header = opened.read(header_len)
    if len(header) < header_len:
        return True
    try:
        tensors = json.loads(header)
        ends = [about["data_offsets"][1] for name, about in tensors.items() if name[:2] != "__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
    return file.stat().st_size < _HEADER_LEN + header_len + max(ends, default=0)


def _is_cut_zip(file: Path) -> bool:
    """Of ``.npz`` and ``.pt``: their table of contents stands at the end."""
    if file.suffix not in (".npz", ".pt"):
        return False
    with file.open("rb") as opened:
        begins = opened.read(2)
    return len(begins) < 2 or (begins == b"PK" and not zipfile.is_zipfile(file))
