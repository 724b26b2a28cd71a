"""Files of a hub dataset at one commit: found once, and read by ranges or downloaded as needed.

1. The revision is resolved to a commit.
2. The dataset's card, or what its files are called, tells which files are meant.
3. Only the folders that these can be in are listed. What was found is kept beside the hub's cache:
   a commit does not change, so a later run knows the corpus' identity without a network.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import httpx2
import huggingface_hub
import yaml
from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from autointerp_dagster.adapters.corpora.card import (
    NoSuchDataError,
    choice_of,
    files_matching,
    files_of_split,
    fixed_folder,
)
from autointerp_dagster.adapters.corpora.files import CorpusFile, ends_in, is_data
from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.core.config import HubFilesConfig
from autointerp_dagster.core.errors import CorpusError, told

_CHOOSING = 1
"""Raised when the same card and names mean other files; what was kept is looked for anew."""

BLOCK_BYTES = 4 << 20
"""Asked for at once of a file that is read by ranges."""


class Listed(NamedTuple):
    """A file of a repository, as its listing tells it."""

    path: str
    size: int
    etag: str
    """Hash of the content: sha256 of large files, git's of others."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a dataset at one commit."""

    repo: str
    commit: str
    listed: Listed
    streaming: bool

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return self.listed.path

    @property
    def where(self) -> str:
        """Its address, with the commit's first digits."""
        return f"hf://datasets/{self.repo}@{self.commit[:8]}/{self.listed.path}"

    def open(self) -> BinaryIO:
        """By ranges if streaming; else from the hub's cache, downloaded if it is not there."""
        if not self.streaming:
            return self.path().open("rb")
        with asking(self.where):
            address = f"datasets/{self.repo}@{self.commit}/{self.listed.path}"
            opened = HfFileSystem().open(
                address, "rb", block_size=BLOCK_BYTES, size=self.listed.size
            )
            return cast("BinaryIO", opened)

    def path(self) -> Path:
        """In the hub's cache, downloaded if it is not there."""
        with asking(self.where):
            return Path(
                hf_hub_download(
                    self.repo, self.listed.path, repo_type="dataset", revision=self.commit
                )
            )


@dataclass(frozen=True)
class HubFiles:
    """The files that a study means by a hub dataset."""

    repo: str
    config: HubFilesConfig
    suffixes: tuple[str, ...]
    """What files that can be read end in."""

    @cached_property
    def commit(self) -> str:
        """What the revision names now; without a network what it named when last asked for."""
        with asking(self._where, self.config.revision):
            found = HfApi().resolve_revision(
                self.repo, repo_type="dataset", revision=self.config.revision
            )
            return found.resolved

    @cached_property
    def listed(self) -> tuple[Listed, ...]:
        """The files in order; from the cache if they were looked for before."""
        asked = self.config.model_dump(mode="json", include={"name", "split", "files"})
        kept = self._kept(json_hash([_CHOOSING, asked, self.suffixes]))
        if kept.is_file():
            return tuple(Listed(*entry) for entry in json.loads(kept.read_text(encoding="utf-8")))
        try:
            with asking(self._where, self.config.revision):
                found = self._find()
        except NoSuchDataError as error:
            raise CorpusError(f"{self._where} at commit {self.commit}: {error}.") from error
        _write(kept, json.dumps(found))
        return tuple(found)

    def files(self) -> list[CorpusFile]:
        """In the order of the patterns, by name within one."""
        streaming = self.config.streaming
        return [HubFile(self.repo, self.commit, listed, streaming) for listed in self.listed]

    def samples(self) -> list[CorpusFile]:
        """The first file; none if the hub is switched off, for what is made needs no text."""
        return [] if huggingface_hub.is_offline_mode() else self.files()[:1]

    def version(self) -> object:
        """Repository, commit, and path, size and hash of each file."""
        return [self.repo, self.commit, [list(listed) for listed in self.listed]]

    def about(self) -> dict[str, object]:
        """Repository, commit, which part of it, number and size of the files."""
        asked = self.config.model_dump(mode="json", include={"revision", "name", "split", "files"})
        return {
            "dataset": self.repo,
            "commit": self.commit,
            **{key: value for key, value in asked.items() if value is not None},
            "n_files": len(self.listed),
            "n_bytes": sum(listed.size for listed in self.listed),
        }

    @property
    def _where(self) -> str:
        return f"corpus {self.repo}"

    def _kept(self, name: str) -> Path:
        folder = huggingface_hub.cached_assets_path(
            "autointerp_dagster", self.repo, self.commit, assets_dir=constants.HF_ASSETS_CACHE
        )
        return folder / f"{name}.json"

    def _find(self) -> list[Listed]:
        config = self.config
        patterns, folder = config.files, ""
        if patterns is None:
            patterns, folder = choice_of(self._card(), config.name, config.split)
        if patterns is None:
            below = self._below([(folder, True)])
            if not below:
                self._refuse_folder(folder)
            data = [path for path in below if is_data(path, self.suffixes)]
            chosen = files_of_split(data, folder, config.split)
            _refuse_mixture(chosen, self.suffixes)
        else:
            below = self._below([_folder_of(pattern) for pattern in patterns])
            chosen = files_matching(below, patterns)
            self._refuse_unreadable(chosen, patterns)
        return [below[path] for path in chosen]

    def _card(self) -> Mapping[str, Any]:
        """The head of ``README.md``; empty if there is none."""
        try:
            path = hf_hub_download(
                self.repo, "README.md", repo_type="dataset", revision=self.commit
            )
            head = huggingface_hub.metadata_load(path)
        except LocalEntryNotFoundError:
            raise  # no network is not no card
        except EntryNotFoundError:
            return {}
        except (yaml.YAMLError, ValueError) as error:
            raise CorpusError(
                f"{self._where} at commit {self.commit}: the card's YAML cannot be read "
                f"({told(error)}). Name the files by corpus.files."
            ) from error
        return head if isinstance(head, Mapping) else {}

    def _below(self, folders: Iterable[tuple[str, bool]]) -> dict[str, Listed]:
        """Files of some folders, with or without those of folders in them, by path."""
        found: dict[str, Listed] = {}
        for folder, recursive in dict.fromkeys(folders):
            try:
                for entry in HfApi().list_repo_tree(
                    self.repo,
                    folder or None,
                    recursive=recursive,
                    revision=self.commit,
                    repo_type="dataset",
                ):
                    if isinstance(entry, RepoFile):
                        etag = entry.blob_id if entry.lfs is None else entry.lfs.sha256
                        found[entry.path] = Listed(entry.path, entry.size, etag)
            except EntryNotFoundError:
                continue  # no such folder
        return found

    def _refuse_folder(self, folder: str) -> None:
        entries = HfApi().list_repo_tree(self.repo, revision=self.commit, repo_type="dataset")
        folders = sorted(entry.path for entry in entries if isinstance(entry, RepoFolder))
        raise NoSuchDataError(
            f"folders {', '.join(folders) or 'none'}, wanted {folder!r}. Set corpus.name"
        )

    def _refuse_unreadable(self, chosen: list[str], patterns: Iterable[str]) -> None:
        readable = f"that end in {', '.join(self.suffixes)}"
        if not chosen:
            raise NoSuchDataError(
                f"no file matches {', '.join(patterns)}; wanted files {readable}. Correct "
                "corpus.files, or set it"
            )
        others = [path for path in chosen if not ends_in(path, self.suffixes)]
        if others:
            raise NoSuchDataError(
                f"{others[0]} cannot be read, wanted files {readable}. Set corpus.files to such "
                "files; of most public datasets the hub keeps Parquet files at corpus.revision "
                "refs/convert/parquet"
            )


@contextmanager
def asking(where: str, revision: str = "main") -> Iterator[None]:
    """Says what is wrong and what to do when the hub does not give what it is asked for.

    Args:
        where: What is asked for, for messages.
        revision: The revision that is asked for.

    Raises:
        CorpusError: In place of the hub's errors.
    """
    try:
        yield
    except GatedRepoError as error:
        raise CorpusError(
            f"{where}: the dataset is gated, and this user may not read it. Ask for access on its "
            "page on the hub, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise CorpusError(
            f"{where}: the hub has no such dataset, or it is private. Correct corpus.repo; for a "
            "private one log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise CorpusError(
            f"{where}: the dataset has no revision {revision!r}. Correct corpus.revision to a "
            "branch, a tag or a whole commit hash."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError) as error:
        raise CorpusError(_unreachable(where, error)) from error
    except (httpx2.HTTPError, FileNotFoundError) as error:
        raise CorpusError(
            f"{where}: the hub does not give it ({told(error)}). Check the network and run again."
        ) from error


def _unreachable(where: str, error: Exception) -> str:
    if huggingface_hub.is_offline_mode():
        return (
            f"{where}: not in the hub's cache, and the hub is switched off. Unset HF_HUB_OFFLINE, "
            "or download the dataset elsewhere (`hf download --repo-type dataset`) and read it "
            "with corpus.kind `files`."
        )
    cause = error.__cause__ or error
    return (
        f"{where}: the hub cannot be reached ({told(cause)}). Check the network and run again; "
        "with HF_HUB_OFFLINE=1 what is already made can be used without it."
    )


def _folder_of(pattern: str) -> tuple[str, bool]:
    """The folder of what a pattern matches, and whether in folders below it."""
    folder = fixed_folder(pattern)
    rest = pattern.removeprefix("./").removeprefix(folder).removeprefix("/")
    return folder, "/" in rest or "**" in rest


def _refuse_mixture(paths: Iterable[str], suffixes: Iterable[str]) -> None:
    kinds = {next(suffix for suffix in suffixes if path.lower().endswith(suffix)) for path in paths}
    if len(kinds) > 1:
        raise NoSuchDataError(
            f"files of several formats ({', '.join(sorted(kinds))}), which may hold the same "
            "documents. Set corpus.files to patterns of those to read"
        )


def _write(path: Path, content: str) -> None:
    """All at once, so that a run that is killed leaves no half of it."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
    ) as file:
        file.write(content)
    os.replace(file.name, path)
