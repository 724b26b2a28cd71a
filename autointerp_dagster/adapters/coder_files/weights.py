"""Tensors and settings from files; nothing that is read can run code."""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
import yaml
from torch import Tensor

from autointerp_dagster.core.errors import CoderError, told

_LFS = b"version https://git-lfs"


class Weights(NamedTuple):
    """What a file of weights holds."""

    file: str
    """For messages."""
    tensors: dict[str, Tensor]
    """By name, as they are in the file."""
    values: dict[str, Any]
    """What a ``.pt`` file holds beside tensors; nested as there."""


def read_weights(file: Path, shown: str) -> Weights:
    """Everything in a file of weights, on the CPU: safetensors, npz, or a pickle of plain tensors.

    Args:
        file: Its suffix says which.
        shown: Its name for messages.

    Raises:
        CoderError: If it is missing, unreadable, or a pickle of more than tensors and plain values.
    """
    if not file.is_file():
        raise CoderError(
            f"{shown}: no such file. Wanted the coder's weights there; fetch the whole folder, or "
            "name another coder in the study."
        )
    with file.open("rb") as content:
        is_pointer = content.read(len(_LFS)) == _LFS
    if is_pointer:
        raise CoderError(
            f"{shown}: unreadable (a pointer of Git LFS instead of the file). Fetch it with "
            "`git lfs pull`, or from the hub."
        )
    try:
        return _READERS.get(file.suffix, _read_torch)(file, shown)
    except (CoderError, MemoryError):
        raise
    except Exception as error:  # of damaged bytes the parsers raise anything
        raise CoderError(f"{shown}: unreadable ({told(error)}). Fetch the file again.") from error


def weights_digest(weights: Weights, about: object) -> str:
    """Hash of tensors, with their names, types and shapes, of values, and of what ``about`` says.

    Args:
        weights: Of one coder.
        about: JSON-ready.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(json.dumps(_plain(weights.values), sort_keys=True).encode())
    for name in sorted(weights.tensors):
        tensor = weights.tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(file: Path, shown: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CoderError: If there is no such file, or it holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CoderError(f"{shown}: no such file. Wanted it beside the coder's weights.") from error
    except (ValueError, RecursionError) as error:
        raise CoderError(f"{shown}: no JSON ({error}). Copy the file again.") from error
    return _mapping(content, shown)


def read_yaml(file: Path, shown: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        CoderError: If it holds none.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CoderError(f"{shown}: no YAML ({error}). Copy the file again.") from error
    return _mapping(content, shown)


def _mapping(content: object, shown: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CoderError(f"{shown}: holds a {type(content).__name__}, wanted an object.")
    return {str(key): value for key, value in content.items()}


def _read_safetensors(file: Path, shown: str) -> Weights:
    with safetensors.safe_open(file, framework="pt") as tensors:
        return Weights(
            shown, {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}, {}
        )


def _read_npz(file: Path, shown: str) -> Weights:
    arrays = np.load(file, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise TypeError("a single array, wanted an archive of named ones")
    with arrays:
        return Weights(shown, {name: torch.from_numpy(arrays[name]) for name in arrays.files}, {})


def _read_torch(file: Path, shown: str) -> Weights:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CoderError(
            f"{shown}: holds more than tensors and plain values, or is damaged "
            f"({told(error)}). Such a pickle can run code and is not read. Have the one who made "
            "it save its state dict."
        ) from error
    entries = _mapping(_detached(content), shown)
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    return Weights(shown, tensors, {k: v for k, v in entries.items() if k not in tensors})


def _detached(value: object) -> object:
    """The same without gradients: some save a module's parameters, not its state."""
    if isinstance(value, Mapping):
        return {name: _detached(item) for name, item in value.items()}
    return value.detach() if isinstance(value, Tensor) else value


_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz}


def _plain(value: object) -> Any:
    """JSON-ready; a tensor inside becomes the hash of its bytes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
