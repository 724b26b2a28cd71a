"""Refusing, by file, key, tensor and shape, what cannot be the coder that its files claim."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from autointerp_dagster.adapters.coder_files.weights import Weights
from autointerp_dagster.core.errors import CoderError

M = TypeVar("M", bound=BaseModel)

Axes = tuple[str, ...]
"""Names of a tensor's axes; equal names are equal sizes."""

_ROWS = 65_536
"""Rows of a tensor that are looked at at once."""

_REMEDY = (
    "In the study, name a whole checkpoint of one coder (path or repo, select), or say its format."
)


class Wanted(NamedTuple):
    """The tensors that a coder's file must hold."""

    axes: Mapping[str, Axes]
    """Of each tensor."""
    optional: frozenset[str] = frozenset()
    """Those of ``axes`` that may be missing."""
    ignored: Sequence[str] = ()
    """Unix patterns of tensors that may be there and do not matter."""


def checked_config(file: str, content: Mapping[str, Any], model: type[M]) -> M:
    """A file's keys as a model of them; keys that it does not know are ignored.

    Raises:
        CoderError: If a key is missing or of the wrong type; names all of them.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise CoderError(
            f"{file}: {'; '.join(faults)}. The file is damaged or of another format. {_REMEDY}"
        ) from error


def checked_tensors(
    weights: Weights, wanted: Wanted, sizes: Mapping[str, int], source: str = ""
) -> dict[str, Tensor]:
    """The wanted tensors, each as wanted.

    Args:
        weights: Of the coder.
        wanted: By name.
        sizes: Of those axes that are known; the others are as the tensors say, those of one axis
            first, and must agree.
        source: What says the sizes, for messages; empty: the other tensors.

    Raises:
        CoderError: If one is missing, unknown, of another shape, transposed, no floats, or not
            finite; one message names all of them.
    """
    tensors = weights.tensors
    missing = sorted(wanted.axes.keys() - tensors - wanted.optional)
    unknown = sorted(
        name
        for name in tensors.keys() - wanted.axes
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted.ignored)
    )
    faults = [f"missing tensors {missing}"] if missing else []
    faults += [f"unknown tensors {unknown}"] if unknown else []
    found = {name: tensors[name] for name in wanted.axes if name in tensors}
    known = _sizes_in(found, wanted.axes, sizes)
    for name, tensor in found.items():
        shape = tuple(known.get(axis, -1) for axis in wanted.axes[name])
        if tuple(tensor.shape) != shape:
            faults.append(_of_shape(name, tensor, shape, wanted.axes[name], source))
        elif (bad := _n_bad(tensor)) > 0:
            faults.append(
                f"tensor {name} ({tensor.dtype}) has {bad} values that are not finite floats"
            )
    if faults:
        raise CoderError(f"{weights.file}: {'; '.join(faults)}. {_REMEDY}")
    return found


def size_of(tensors: Mapping[str, Tensor], name: str) -> int:
    """Length of a tensor of one axis that is checked already."""
    return tensors[name].shape[0]


def refuse(file: str, what: str, reason: str) -> CoderError:
    """The error for what is known and not supported."""
    return CoderError(
        f"{file}: {what} is not supported: {reason}. In the study, name another coder."
    )


def unknown_choice(file: str, key: str, got: object, choices: Sequence[str]) -> CoderError:
    """The error for a setting that is none of those known."""
    return CoderError(
        f"{file}: {key} is {got!r}, wanted one of {', '.join(choices)}. In the study, name another "
        "coder, or say its format."
    )


def _sizes_in(
    tensors: Mapping[str, Tensor], axes: Mapping[str, Axes], known: Mapping[str, int]
) -> dict[str, int]:
    """Sizes of axes that only the tensors say: vectors first, as a matrix may be transposed."""
    sizes = dict(known)
    for name, tensor in sorted(tensors.items(), key=lambda item: (len(axes[item[0]]), item[0])):
        shape, names = tuple(tensor.shape), axes[name]
        if len(shape) != len(names):
            continue
        if not _fits(shape, names, sizes) and _fits(shape[::-1], names, sizes):
            shape = shape[::-1]
        for axis, size in zip(names, shape, strict=True):
            sizes.setdefault(axis, size)
    return sizes


def _fits(shape: tuple[int, ...], names: Axes, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(axis, size) == size for axis, size in zip(names, shape, strict=True))


def _of_shape(name: str, tensor: Tensor, shape: Sequence[int], axes: Axes, source: str) -> str:
    seen = list(tensor.shape)
    whence = f" as {source} says" if source else ""
    is_turned = len(seen) > 1 and seen == list(shape)[::-1]
    named = ", ".join(axes)
    hint = "; it is transposed" if is_turned else ""
    return f"tensor {name} has shape {seen}, wanted {list(shape)} ({named}){whence}{hint}"


def _n_bad(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return tensor.numel()
    parts = tensor.split(_ROWS) if tensor.ndim else (tensor,)  # no mask as large as the tensor
    return sum(int((~torch.isfinite(part)).sum()) for part in parts)
