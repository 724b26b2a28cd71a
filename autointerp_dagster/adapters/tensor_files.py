"""Where the arrays of a safetensors file lie, and reading them from there when they are used."""

import json
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

_TYPES = {
    "BOOL": "|b1",
    "I8": "|i1",
    "U8": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
"""What numpy calls them; bfloat16 and the types below one byte are not numpy's."""


class TensorPlace(NamedTuple):
    """One array of a file."""

    dtype: str
    """As ``numpy.dtype.str`` has it."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """Behind its last byte."""


def tensor_places(file: BinaryIO) -> dict[str, TensorPlace]:
    """The arrays of a safetensors file, by name; only its header is read.

    Args:
        file: Open for reading, at its beginning.

    Raises:
        ValueError: If it is no safetensors file, or has arrays of a type that numpy lacks.
    """
    n_header = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(n_header))
    places = {}
    for name in header.keys() - {"__metadata__"}:
        about = header[name]
        if about["dtype"] not in _TYPES:
            raise ValueError(f"tensor {name}: type {about['dtype']}, wanted one that numpy has.")
        start, stop = (8 + n_header + offset for offset in about["data_offsets"])
        places[name] = TensorPlace(_TYPES[about["dtype"]], tuple(about["shape"]), start, stop)
    return places


def mapped_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a local safetensors file, read-only, which take memory only as a file cache.

    The operating system reads what is used and may forget it again. The file must stay as it is;
    it may be removed meanwhile.

    Raises:
        ValueError: As :func:`tensor_places`.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        places = tensor_places(file)
    return {name: _mapped(path, place) for name, place in places.items()}


def _mapped(path: Path, place: TensorPlace) -> np.ndarray:
    if place.start == place.stop:  # of which there is nothing to map
        return np.empty(place.shape, dtype=place.dtype)
    n_items = (place.stop - place.start) // np.dtype(place.dtype).itemsize
    mapped = np.memmap(path, place.dtype, mode="r", offset=place.start, shape=(n_items,))
    return np.asarray(mapped).reshape(place.shape)
