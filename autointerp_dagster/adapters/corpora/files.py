"""Files of a corpus: those below a folder, and what goes wrong when one is read."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx2
import pyarrow as pa

from autointerp_dagster.core.errors import CorpusError, told


class CorpusFile(Protocol):
    """A file of a corpus, wherever it is."""

    @property
    def name(self) -> str:
        """Its path in the corpus, with slashes; document ids begin with it."""
        ...

    @property
    def where(self) -> str:
        """Its place, for messages."""
        ...

    def open(self) -> BinaryIO:
        """Its content, read as it is needed; can seek."""
        ...

    def path(self) -> Path:
        """A copy on this machine, fetched whole if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this machine."""

    name: str
    place: Path

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.place)

    def open(self) -> BinaryIO:
        """As of a :class:`CorpusFile`."""
        return self.place.open("rb")

    def path(self) -> Path:
        """Itself."""
        return self.place


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files below a folder, by relative path; or one file."""

    root: Path
    found: tuple[LocalFile, ...]

    @classmethod
    def below(cls, root: Path, suffixes: Sequence[str]) -> "LocalFiles":
        """The data files below a folder (:func:`is_data`), without hidden files and folders.

        Args:
            root: A folder, or one file.
            suffixes: What files that can be read end in.

        Raises:
            CorpusError: If there is no such path, or no such file below it.
        """
        root = root.expanduser()
        if not root.exists():
            raise CorpusError(f"corpus {root}: no such file or folder. Correct corpus.path.")
        base = root if root.is_dir() else root.parent
        paths = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]
        files = [LocalFile(path.relative_to(base).as_posix(), path) for path in paths]
        seen = [file for file in files if not any(p.startswith(".") for p in file.name.split("/"))]
        is_readable = ends_in if root.is_file() else is_data
        found = sorted((f for f in seen if is_readable(f.name, suffixes)), key=lambda f: f.name)
        if not found:
            raise CorpusError(
                f"corpus {root}: {len(seen)} files, none ends in {', '.join(suffixes)}. "
                "Point corpus.path at such files."
            )
        return cls(root, tuple(found))

    def files(self) -> list[CorpusFile]:
        """By relative path."""
        return list(self.found)

    def samples(self) -> list[CorpusFile]:
        """All of them."""
        return self.files()

    def version(self) -> object:
        """Each file's name and the hash of its bytes; reads one again only after it has changed."""
        return [[file.name, _bytes_hash(file.place, _stamp(file.place))] for file in self.found]

    def about(self) -> dict[str, object]:
        """Path, number and size."""
        n_bytes = sum(file.place.stat().st_size for file in self.found)
        return {"path": str(self.root), "n_files": len(self.found), "n_bytes": n_bytes}


def ends_in(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a file has one of these suffixes, in small or capital letters."""
    return name.lower().endswith(tuple(suffixes))


def is_data(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a file that nobody named is meant: a ``.json`` is more often about the data."""
    return ends_in(name, suffixes) and not ends_in(name, (".json",))


def stem_of(file: CorpusFile) -> str:
    """The file's name without folders and suffixes: a title for people."""
    return file.name.rsplit("/", 1)[-1].split(".", 1)[0] or file.name


@contextmanager
def reading(file: CorpusFile, content: str) -> Iterator[None]:
    """Says which file it was when one cannot be read.

    Args:
        file: The file.
        content: What it should be, e.g. ``a Parquet file``.

    Raises:
        CorpusError: In place of what pyarrow, the hub or the operating system raised.
    """
    try:
        yield
    except httpx2.HTTPError as error:
        raise CorpusError(
            f"{file.where}: the hub does not give the file ({told(error)}). Check the "
            "network and run again."
        ) from error
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        raise CorpusError(
            f"{file.where}: cannot be read as {content} ({told(error)}). Repair the file, "
            "fetch it again, or take it out of the corpus."
        ) from error


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@lru_cache(maxsize=1 << 16)
def _bytes_hash(path: Path, stamp: tuple[int, int, int]) -> str:
    del stamp  # part of the cache key alone
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
