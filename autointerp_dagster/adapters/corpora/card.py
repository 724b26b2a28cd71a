"""Which files of a hub dataset are a split: by its card, or else by what the files are called.

1. The card (the YAML head of ``README.md``) lists configurations, each with patterns of files.
2. Without it, a configuration is a folder, and the split stands in the name of a file or folder.

Source: the conventions that the hub documents, https://huggingface.co/docs/hub, pages
``datasets-manual-configuration`` and ``datasets-file-names-and-splits``. Where no name tells a
split, all files are ``train``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD = re.compile(r"(?P<split>[^/]+?)-\d{5}-of-\d{5}")


class Choice(NamedTuple):
    """What a card says of a split."""

    patterns: tuple[str, ...] | None
    """Of its files, in order; null: by their names, see :func:`files_of_split`."""
    folder: str
    """Where they are; empty: the whole repository."""


class NoSuchDataError(Exception):
    """There is no such configuration or split; says which there are and which key to set."""


def choice_of(card: Mapping[str, Any], name: str | None, split: str) -> Choice:
    """Where the card says that a split's files are.

    Args:
        card: The head of the dataset's ``README.md``; empty if there is none.
        name: A configuration; null: the default, or the only one.
        split: A split.

    Raises:
        NoSuchDataError: If the card has configurations, and none is this one or has this split.
    """
    configs = _configs_of(card)
    if not configs:
        return Choice(None, name or "")
    config = _config_named(configs, name)
    folder = str(config.get("data_dir") or "").strip("/")
    data_files = config.get("data_files")
    if data_files is None:
        return Choice(None, folder)
    by_split = _patterns_by_split(data_files)
    found = by_split.get(split) or by_split.get(_SPLIT_WORDS.get(split, split))
    if found is None:
        raise NoSuchDataError(f"splits {', '.join(by_split)}, wanted {split!r}. Set corpus.split")
    return Choice(tuple(f"{folder}/{p}" if folder else p for p in found), folder)


def files_matching(paths: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The paths that match a pattern: in the order of the patterns, those of one by name.

    ``*`` matches within a folder, ``**`` across folders.
    """
    known = sorted(paths)
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = re.compile(glob_translate(pattern.removeprefix("./"))).match
        found.update((path, None) for path in known if matches(path))
    return list(found)


def files_of_split(paths: Iterable[str], folder: str, split: str) -> list[str]:
    """The paths of a split by what files and folders are called, by name.

    Args:
        paths: Of all data files; hidden ones (``.`` or ``_`` before a name) are left out.
        folder: Look below it.
        split: A split.

    Raises:
        NoSuchDataError: If nothing is below the folder, no file is of this split, or the folder
            holds several configurations.
    """
    inside = f"{folder}/" if folder else ""
    below = sorted(path for path in paths if path.startswith(inside) and not _is_hidden(path))
    if not below:
        raise NoSuchDataError("no files that can be read")
    configs = {p.removeprefix(inside).split("/")[0] for p in below if "/" in p.removeprefix(inside)}
    is_named = [part for part in configs if part == "data" or _word_of(part) is not None]
    if not folder and len(configs) > 1 and not is_named:
        raise NoSuchDataError(
            f"no card, and folders {', '.join(sorted(configs))}, which may be configurations. Set "
            "corpus.name to one of them, or corpus.files to patterns of paths"
        )
    split_of = {path: _split_of(path.removeprefix(inside)) for path in below}
    if not any(split_of.values()):
        split_of = dict.fromkeys(below, "train")
    wanted = _SPLIT_WORDS.get(split, split)
    found = [path for path, its in split_of.items() if its == wanted]
    if not found:
        splits = sorted({its for its in split_of.values() if its is not None})
        raise NoSuchDataError(f"splits {', '.join(splits)}, wanted {split!r}. Set corpus.split")
    return found


def fixed_folder(pattern: str) -> str:
    """The folder that everything a pattern matches is in; empty: the whole repository."""
    fixed = re.split(r"[*?\[]", pattern.removeprefix("./"), maxsplit=1)[0]
    return fixed.rpartition("/")[0]


def _configs_of(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    configs = card.get("configs")
    if not isinstance(configs, list):
        return []
    return [config for config in configs if isinstance(config, Mapping)]


def _config_named(configs: Sequence[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    if name is not None:
        found = by_name.get(name)
    elif len(by_name) == 1:
        (found,) = by_name.values()
    else:
        default = [config for config in configs if config.get("default") is True]
        found = default[0] if default else by_name.get("default")
    if found is None:
        got = "none is the default" if name is None else f"wanted {name!r}"
        raise NoSuchDataError(f"configurations {', '.join(by_name)}, {got}. Set corpus.name")
    return found


def _patterns_by_split(data_files: Any) -> dict[str, list[str]]:
    """Patterns of each split, however the card writes them."""
    if isinstance(data_files, Mapping):
        return {str(split): _strings(paths) for split, paths in data_files.items()}
    entries = data_files if isinstance(data_files, list) else [data_files]
    by_split: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, Mapping):
            paths, split = _strings(entry.get("path")), str(entry.get("split", "train"))
        else:
            paths, split = _strings(entry), "train"
        by_split.setdefault(split, []).extend(paths)
    return by_split


def _strings(paths: Any) -> list[str]:
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])]


def _split_of(path: str) -> str | None:
    """The split that a path names: the nearest word of a split, from the file's name outwards."""
    for part in reversed(path.split("/")):
        word = _word_of(part)
        if word is not None:
            return word
    shard = _SHARD.match(path.rsplit("/", 1)[-1])
    return None if shard is None else shard["split"]


def _word_of(part: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", part.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))
