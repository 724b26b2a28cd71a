"""Where a coder's files lie: a local folder, one file, or a repository of the hub at one commit."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from autointerp_dagster.adapters.hookpoints import natural_order
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError, told

_MAX_DEPTH = 8
"""Folders below a coder's path that are looked into."""
_BESIDE = ("cfg.json", "config.json", "config.yaml", "hyperparams.json")
"""What may lie beside a single file of weights."""
_RUN_CONFIG = "../config.json"
"""Of the run that a single coder's folder belongs to."""

logger = logging.getLogger(__name__)


class NotFetchedError(CoderError):
    """The hub does not give a file or a listing now; later it may."""


@dataclass(frozen=True, slots=True)
class CoderFiles:
    """Files by name, without reading them."""

    label: str
    """For messages: the folder, or ``repo@commit``."""
    names: tuple[str, ...]
    """Paths relative to it with forward slashes, in natural order."""
    fetch: Callable[[str], Path] = field(repr=False)
    """Where one of them is on the disk; fetches it from the hub if need be."""

    def shown(self, name: str) -> str:
        """A file's name for messages."""
        return f"{self.label}/{name}"


def open_files(config: FileCoderConfig) -> CoderFiles:
    """The files that a study's coder names; of a hub repository their names only.

    A repository's branch is looked up once per process, so that all stages see one commit.

    Raises:
        CoderError: If the folder does not exist, or the repository cannot be reached and is not in
            the hub's cache either.
    """
    if config.repo is not None:
        return _open_repo(config.repo, config.revision, constants.ENDPOINT, constants.HF_HUB_CACHE)
    assert config.path is not None  # checked by the configuration
    return _open_path(config.path.expanduser())


def look_again() -> None:
    """Forget at which commits repositories stood: the next look asks the hub."""
    _open_repo.cache_clear()


def _open_path(path: Path) -> CoderFiles:
    if path.is_dir():
        folder, names = path, sorted(_names_below(path), key=natural_order)
    elif path.is_file():
        folder = path.parent
        names = [path.name, *(name for name in _BESIDE if (folder / name).is_file())]
    else:
        raise CoderError(
            f"coders {path}: no such folder or file. Correct the coder's path, or write repo: for "
            "a repository of the hub."
        )
    if "cfg.json" in names and (folder / _RUN_CONFIG).is_file():
        names.append(_RUN_CONFIG)
    return CoderFiles(str(folder), tuple(names), partial(_existing, folder))


def _names_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        below = Path(folder).relative_to(root)
        is_deep = len(below.parts) >= _MAX_DEPTH
        folders[:] = [] if is_deep else [name for name in folders if not name.startswith(".")]
        yield from ((below / name).as_posix() for name in files if not name.startswith("."))


def _existing(root: Path, name: str) -> Path:
    return root / name


@cache
def _open_repo(repo: str, revision: str | None, endpoint: str, cache_dir: str) -> CoderFiles:
    del endpoint, cache_dir  # part of the cache key alone
    try:
        info = HfApi().model_info(repo, revision=revision)
    except (HfHubHTTPError, ValueError) as error:
        raise _unreachable(repo, revision, error) from error
    except (OfflineModeIsEnabled, OSError, httpx2.HTTPError) as error:
        return _open_cached(repo, revision, error)
    commit = info.sha or "main"
    names = sorted((sibling.rfilename for sibling in info.siblings or ()), key=natural_order)
    return CoderFiles(f"{repo}@{commit}", tuple(names), partial(_fetch, repo, commit))


def _open_cached(repo: str, revision: str | None, error: Exception) -> CoderFiles:
    """What the hub's cache holds of a repository, where the hub itself cannot be asked."""
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError) as missing:
        raise _unreachable(repo, revision, error) from missing
    logger.info("coders %s: the hub was not asked, its cache is used", repo)
    names = sorted(_names_below(folder), key=natural_order)
    return CoderFiles(f"{repo}@{folder.name}", tuple(names), partial(_fetch, repo, folder.name))


def _fetch(repo: str, commit: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repo, name, revision=commit))
    except (OSError, ValueError, EntryNotFoundError, httpx2.HTTPError) as error:
        raise NotFetchedError(
            f"{repo}@{commit}/{name}: cannot be fetched ({told(error)}). Check the network, log "
            "in for a gated repository, unset HF_HUB_OFFLINE, or give a local folder as path."
        ) from error


def _unreachable(repo: str, revision: str | None, error: Exception) -> CoderError:
    return NotFetchedError(
        f"coders {repo} (revision {revision or 'default'}): the hub's repository cannot be read "
        f"({told(error)}), and its cache does not hold it. Check repo and revision and the "
        "network, log in for a gated repository, unset HF_HUB_OFFLINE, or give a local folder as "
        "path."
    )
