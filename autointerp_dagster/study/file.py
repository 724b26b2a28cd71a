"""Reading a study file: YAML with line numbers, ``extends:``, and errors that say where.

Relative paths count from the file that writes them, so a study that extends another finds the
other's folders. Mappings are merged key by key, but one that describes another kind of thing (a
server where the other study has a folder, another ``kind``) takes the other's place.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from autointerp_dagster.core.errors import StudyError

MAY_HOLD_SECRETS = ("base_url", "store")
"""Keys whose value is not repeated in a message."""

Keys = tuple[str | int, ...]
"""The way from the top of a file to a value."""

_WHERE = frozenset({"source", "base_url", "serve", "path", "repo"})
"""Keys of which a model or a coder has one: where it is."""


@dataclass(frozen=True, slots=True)
class StudyFile:
    """The merged content of a study file and of those it extends."""

    path: Path
    content: dict[str, Any]
    places: Mapping[Keys, str]
    """``file:line`` of every key."""

    @classmethod
    def read(cls, path: Path, seen: tuple[Path, ...] = ()) -> "StudyFile":
        """Reads ``path`` over the file that it extends, if any.

        Raises:
            StudyError: If a file is missing, is no YAML mapping, repeats a key, or extends itself.
        """
        if path.resolve() in seen:
            raise StudyError(f"{path}: extends itself, by way of {seen[-1]}.")
        content, places = _parse(path)
        base_name = content.pop("extends", None)
        if base_name is None:
            return cls(path, content, places)
        if not isinstance(base_name, str):
            raise StudyError(f"{places[('extends',)]}: extends: wanted a file name.")
        base_path = path.parent / base_name
        if not base_path.is_file():
            raise StudyError(f"{places[('extends',)]}: extends: no such study file {base_path}.")
        base = cls.read(base_path, (*seen, path.resolve()))
        inherited = {key: value for key, value in base.content.items() if key != "name"}
        return cls(path, _merge(inherited, content), {**base.places, **places})

    def explain(self, problem: ErrorDetails, model: type[BaseModel]) -> str:
        """One line about a validation error: place, key, value, remedy."""
        keys = self._keys_of(problem["loc"])
        place = next(
            (self.places[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.places),
            str(self.path),
        )
        name = ".".join(str(key) for key in keys)
        if problem["type"] == "extra_forbidden":
            known = sorted(set(_known_keys(model, keys[:-1])))
            near = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."
            return f"{place}: {name}: unknown key. {remedy}"
        if problem["type"] == "missing":
            return f"{place}: {name}: missing. Add it.{_meaning(model, keys)}"
        message = problem["msg"].removeprefix("Value error, ")
        if not name:
            return f"{place}: {message}"
        got = "" if keys[-1] in MAY_HOLD_SECRETS else f" (got {problem['input']!r})"
        return f"{place}: {name}: {message}{got}."

    def _keys_of(self, location: tuple[str | int, ...]) -> Keys:
        """The location without the tags that pydantic adds for unions."""
        keys: Keys = ()
        for item in location:
            is_tag = str(item).startswith("<")
            is_last = item is location[-1]
            if not is_tag and ((*keys, item) in self.places or is_last):
                keys = (*keys, item)
        return keys


def _meaning(model: type[BaseModel], keys: Keys) -> str:
    """What a key of the file's top level means, as its declaration says."""
    field = model.model_fields.get(str(keys[0])) if len(keys) == 1 else None
    return "" if field is None or not field.description else f" It is: {field.description}"


def _parse(path: Path) -> tuple[dict[str, Any], dict[Keys, str]]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError as error:
        raise StudyError(f"{path}: no such study file.") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise StudyError(f"{path}: wanted a mapping of keys such as models, corpus, coders.")
    places: dict[Keys, str] = {}
    try:
        return _value(root, (), path, places), places
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: a value cannot be read: {error}") from error


def _value(node: yaml.Node, keys: Keys, path: Path, places: dict[Keys, str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = f"{path}:{key_node.start_mark.line + 1}"
            if key in mapping:
                raise StudyError(f"{place}: {'.'.join(map(str, (*keys, key)))}: given twice.")
            places[(*keys, key)] = place
            mapping[key] = _anchored(key, _value(value_node, (*keys, key), path, places), path)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*keys, index)] = f"{path}:{item.start_mark.line + 1}"
        return [_value(v, (*keys, i), path, places) for i, v in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node)


def _anchored(key: str, value: Any, path: Path) -> Any:
    """Local paths made absolute: every ``path``, and a ``source`` that starts with a dot."""
    is_local = key == "path" or (key == "source" and str(value).startswith("."))
    return str((path.parent / value).resolve()) if is_local and isinstance(value, str) else value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and not _is_other(below, value):
            merged[key] = _merge(below, value)
        elif isinstance(below, dict) and value is None:  # e.g. an explainer that is not wanted here
            del merged[key]
        else:
            merged[key] = value
    return merged


def _is_other(below: dict[str, Any], over: dict[str, Any]) -> bool:
    """Whether ``over`` describes another kind of thing, of which nothing below can hold."""
    named_below, named = _WHERE & below.keys(), _WHERE & over.keys()
    moves = bool(named_below) and bool(named - named_below)
    return moves or ("kind" in over and over["kind"] != below.get("kind", over["kind"]))


def _known_keys(model: object, keys: Keys) -> Iterator[str]:
    """The keys that may stand at a place: of every parameter model the way may lead to."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        for inner in typing.get_args(model):
            is_mapping = typing.get_origin(model) in (dict, Mapping)
            yield from _known_keys(inner, keys[1:] if is_mapping else keys)
    elif not keys:
        yield from model.model_fields
    elif keys[0] in model.model_fields:
        field = model.model_fields[str(keys[0])]
        yield from _known_keys(field.rebuild_annotation(), keys[1:])
