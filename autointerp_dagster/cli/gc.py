"""What a store does not need any more, as a table or as JSON, and deleting it."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autointerp_dagster.adapters.cache.folders import (
    SWEPT_AFTER_S,
    default_spool_dir,
    forgotten,
    sweep,
)
from autointerp_dagster.adapters.pruning.deleting import clock_of, prune
from autointerp_dagster.adapters.pruning.survey import DAY_S, Survey
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.resources.progress import on_terminal
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study

_NAMES: dict[str, str] = {
    "manifest": "superseded manifests",
    "piece": "unused pieces of cells",
    "blob": "unused tables and tensors",
    "journal": "answers of language models",
    "temporary": "temporary files",
    "spool": "spools of killed passes",
}


@dataclass(frozen=True, slots=True)
class Going:
    """One file, or one folder of a spool, that may go or has gone."""

    kind: str
    path: str
    """Relative to the store; of a spool absolute."""
    n_bytes: int
    age_days: float
    why: str


@dataclass(frozen=True, slots=True)
class Pruned:
    """One store after a look, or after pruning."""

    store: str
    is_deleted: bool
    """False: nothing was touched."""
    files: tuple[Going, ...]
    n_kept: int
    """Files of the store that stay."""
    n_bytes_kept: int
    lost: tuple[str, ...]
    """Manifests that are needed and missing."""


def stores_of(studies: Iterable[Study]) -> list[Store]:
    """The stores of some studies, each once."""
    stores = [StoreResource().of(study) for study in studies]
    return list({str(store.root): store for store in stores}.values())


def named_studies(
    names: Sequence[str] | None, every: bool, folder: Path, study_of: Callable[[str], Study]
) -> list[Study]:
    """The studies whose stores are meant.

    Raises:
        StudyError: If none is named, some are beside ``--all``, or one has a mistake.
    """
    if bool(names) == every:
        raise StudyError(
            f"gc: got {'both studies and --all' if every else 'no study'}, wanted one or more "
            "studies, or --all for every study of the folder."
        )
    paths = sorted(folder.glob("*.yaml")) if every else []
    return [study_of(name) for name in [*(names or ()), *map(str, paths)]]


def pruned(store: Store, superseded_days: float, is_deleted: bool) -> Pruned:
    """What may go from a store; if ``is_deleted``, it goes.

    Raises:
        StoreError: If the store does not answer, or what it needs cannot be told.
    """
    ahead_s = clock_of(store) if is_deleted else 0.0
    survey = Survey(
        store,
        superseded_s=superseded_days * DAY_S,
        clock=lambda: time.time() + ahead_s,
        progress=on_terminal,
    )
    found = survey.look()
    chosen = prune(survey, found, on_terminal) if is_deleted else list(found.doomed.values())
    n_left = [found.doomed[path].n_bytes for path in found.doomed.keys() - {d.path for d in chosen}]
    return Pruned(
        store=str(store.root),
        is_deleted=is_deleted,
        files=tuple(Going(d.kind, d.path, d.n_bytes, d.age_s / DAY_S, d.why) for d in chosen),
        n_kept=found.n_kept + len(n_left),
        n_bytes_kept=found.n_bytes_kept + sum(n_left),
        lost=found.lost,
    )


def pruned_spools(is_deleted: bool) -> list[Going]:
    """Spools of passes that were killed and never taken up again, on this machine.

    Raises:
        StoreError: If the folder of spools is another user's.
    """
    root = default_spool_dir()
    found = {path: _spool(path) for path in forgotten(root)}
    if is_deleted:
        gone = set(sweep(root))
        return [going for path, going in found.items() if path in gone]
    return list(found.values())


def _spool(path: Path) -> Going:
    files = [file.stat() for file in path.glob("*")]
    newest = max((file.st_mtime for file in files), default=0.0)
    n_bytes = sum(file.st_size for file in files)
    why = f"nobody took the pass up for {SWEPT_AFTER_S / DAY_S:.0f} days"
    return Going("spool", str(path), n_bytes, (time.time() - newest) / DAY_S, why)


def print_pruned(stores: Sequence[Pruned], spools: Sequence[Going], console: Console) -> None:
    """Prints how much of each kind goes and why, and one line that sums it up."""
    files = [going for store in stores for going in store.files] + list(spools)
    is_deleted = any(store.is_deleted for store in stores)
    if files:
        console.print(_table(files))
    for store in stores:
        if store.lost:
            console.print(
                f"{store.store}: {len(store.lost)} manifests that are needed are missing, e.g. "
                f"{store.lost[0]}. `autointerp verify` says what makes them again.",
                markup=False,
                soft_wrap=True,
            )
    n_kept, kept = sum(s.n_kept for s in stores), sum(s.n_bytes_kept for s in stores)
    verb = "deleted" if is_deleted else "would delete"
    console.print(
        f"{', '.join(store.store for store in stores)}: {verb} {len(files):,} files of "
        f"{_size(sum(going.n_bytes for going in files))}; {'kept' if is_deleted else 'would keep'} "
        f"{n_kept:,} files of {_size(kept)}."
        + ("" if is_deleted or not files else " With --delete they go."),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def pruned_as_json(stores: Sequence[Pruned], spools: Sequence[Going]) -> str:
    """The same as JSON, file by file."""
    content = {
        "deleted": any(store.is_deleted for store in stores),
        "stores": [
            {
                "store": store.store,
                "n_kept": store.n_kept,
                "n_bytes_kept": store.n_bytes_kept,
                "lost": list(store.lost),
                "totals": _totals(store.files),
                "files": [asdict(going) for going in store.files],
            }
            for store in stores
        ],
        "spools": [asdict(going) for going in spools],
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _totals(files: Sequence[Going]) -> dict[str, Any]:
    totals: dict[str, dict[str, int]] = {}
    for going in files:
        total = totals.setdefault(going.kind, {"n_files": 0, "n_bytes": 0})
        total["n_files"] += 1
        total["n_bytes"] += going.n_bytes
    return totals


def _table(files: Sequence[Going]) -> Table:
    table = Table("what", "of", "files", "size", "days old", "why")
    groups: dict[tuple[str, str, str], list[Going]] = {}
    for going in files:
        groups.setdefault((going.kind, _of(going), going.why), []).append(going)
    order = list(_NAMES)
    for kind, of, why in sorted(groups, key=lambda group: (order.index(group[0]), group)):
        group = groups[kind, of, why]
        ages = [going.age_days for going in group]
        table.add_row(
            _NAMES[kind],
            escape(of),
            f"{len(group):,}",
            _size(sum(going.n_bytes for going in group)),
            f"{min(ages):.0f} to {max(ages):.0f}",
            escape(why),
        )
    return table


def _of(going: Going) -> str:
    """The stage that made a file, where its path says so."""
    folders = going.path.split("/")
    if going.kind == "manifest":
        return folders[0]
    return folders[1] if going.kind in ("piece", "journal") else ""


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
