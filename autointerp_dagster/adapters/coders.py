"""Sparse coders from disk, checked before they are used.

Format: sparsify (EleutherAI). ``<path>/<hookpoint>/cfg.json`` and ``sae.safetensors`` with
``encoder.weight [num_latents, d_in]``, ``encoder.bias``, ``W_dec [num_latents, d_in]``, ``b_dec``.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import safetensors
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.config import SparsifyCoderConfig
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.sparse_coders import Computing, LinearCoder, SparseCoder, TopK
from autointerp_dagster.core.types import LayerKey

_WEIGHTS = "sae.safetensors"
_CONFIG = "cfg.json"


@dataclass(frozen=True, slots=True)
class LoadedCoder:
    """A coder with the name of its content."""

    coder: LinearCoder
    identity: str
    """Hash over the tensors and ``cfg.json``; not over paths, so a copy is the same coder."""


def discover_hookpoints(config: SparsifyCoderConfig) -> list[str]:
    """The hookpoints that have a coder below the configured folder, in natural order.

    Raises:
        CoderError: If the folder does not exist or holds none.
    """
    root = config.path.expanduser()
    if not root.is_dir():
        raise CoderError(f"coders {root}: no such folder. Correct the coder's path.")
    found = [path.parent.name for path in root.glob(f"*/{_CONFIG}")]
    if not found:
        raise CoderError(
            f"coders {root}: no <hookpoint>/{_CONFIG} in this folder. "
            "Point the coder's path at the folder that holds one folder per hookpoint."
        )
    return sorted(found, key=_natural)


def open_coder(config: SparsifyCoderConfig, hookpoint: str) -> LoadedCoder:
    """Load and check the coder of one hookpoint; its tensors are on the CPU.

    Args:
        config: Where the coders are.
        hookpoint: Names the folder.

    Raises:
        CoderError: If a file is missing or unreadable, the coder is of a kind that is not
            supported, or a tensor is missing, unknown, of the wrong shape or not finite.
    """
    folder = _folder(config, hookpoint)
    content = _read_config(folder / _CONFIG)
    shape = _checked_config(folder / _CONFIG, content)
    _refuse_transcoder_run(folder.parent / "config.json")
    tensors = _read_tensors(folder / _WEIGHTS)
    _check_tensors(folder / _WEIGHTS, tensors, shape)
    b_dec = tensors["b_dec"].float()
    coder = LinearCoder(
        encoder=tensors["encoder.weight"].float(),
        bias=tensors["encoder.bias"].float(),
        decoder=tensors["W_dec"],
        b_dec=b_dec,
        activation=TopK(shape.k),
        centre=b_dec,
        computing=Computing(screen=config.screen, compiled=config.compiled),
    )
    return LoadedCoder(coder, _identity(folder, _stamp(folder)))


def coder_identity(config: SparsifyCoderConfig, hookpoint: str) -> str:
    """The identity that :func:`open_coder` gives, without keeping the coder.

    Reads the files once per process, and again after one has changed.

    Raises:
        CoderError: If a file is missing or unreadable; the coder is not checked further.
    """
    folder = _folder(config, hookpoint)
    return _identity(folder, _stamp(folder))


def check_fits(
    loaded: LoadedCoder,
    subject_model: SubjectModel,
    layer: LayerKey,
    max_num_latents: int | None = None,
) -> None:
    """Refuse a coder that cannot be run at its hookpoint or is wider than the study's grid.

    Args:
        loaded: The coder of ``layer``.
        subject_model: Runs one token up to the hookpoint.
        layer: For its hookpoint, and for the message.
        max_num_latents: Latents that the study's ranges cover; null: any number.

    Raises:
        CoderError: If its width is not the hookpoint's, or it has too many latents.
        ModelError: If the subject model has no such hookpoint.
    """
    check_width(loaded.coder, subject_model, layer)
    num_latents = loaded.coder.num_latents
    if max_num_latents is not None and num_latents > max_num_latents:
        raise CoderError(
            f"{layer}: the coder has {num_latents} latents, the study's ranges cover "
            f"{max_num_latents}. Raise max_num_latents in the study."
        )


def check_width(coder: SparseCoder, subject_model: SubjectModel, layer: LayerKey) -> None:
    """Refuse a coder that was trained on vectors of another width.

    Raises:
        CoderError: If the widths differ.
        ModelError: If the subject model has no such hookpoint.
    """
    width = subject_model.width_of(layer.hookpoint)
    if coder.d_in != width:
        raise CoderError(
            f"{layer}: the coder's d_in is {coder.d_in}, the vectors of "
            f"{subject_model.config.source} at {layer.hookpoint!r} have width {width}. "
            "Choose the coder's own model, or another hookpoint."
        )


class _SparsifyConfig(BaseModel, extra="ignore"):
    """The keys of ``cfg.json`` that decide how to encode, with sparsify's defaults."""

    d_in: int
    activation: str = "topk"
    num_latents: int = 0
    expansion_factor: int = 32
    k: int = 32
    signed: bool = False
    transcode: bool = False
    skip_connection: bool = False

    @property
    def n_latents(self) -> int:
        """In sparsify 0 means ``d_in * expansion_factor``."""
        return self.num_latents or self.d_in * self.expansion_factor


def _folder(config: SparsifyCoderConfig, hookpoint: str) -> Path:
    folder = config.path.expanduser() / hookpoint
    if not (folder / _CONFIG).is_file():
        known = ", ".join(discover_hookpoints(config))
        raise CoderError(f"{folder}: no {_CONFIG}. Hookpoints with a coder here: {known}.")
    return folder


def _read_config(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CoderError(f"{file}: no JSON ({error}). Copy the file again.") from error
    if not isinstance(content, dict):
        raise CoderError(f"{file}: holds a {type(content).__name__}, wanted an object.")
    return content


def _checked_config(file: Path, content: Mapping[str, object]) -> _SparsifyConfig:
    try:
        shape = _SparsifyConfig.model_validate(content, strict=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise CoderError(f"{file}: {'; '.join(faults)}. Is this sparsify's format?") from error
    refused = {
        f"activation {shape.activation!r}": shape.activation != "topk",
        "transcode (a transcoder reads the module's input)": shape.transcode,
        "skip_connection (a transcoder reads the module's input)": shape.skip_connection,
        "signed (negative activations)": shape.signed,
    }
    for what, is_so in refused.items():
        if is_so:
            raise CoderError(f"{file}: {what} is not supported yet. Wanted a TopK autoencoder.")
    if shape.d_in < 1 or shape.n_latents < 1 or not 1 <= shape.k <= shape.n_latents:
        raise CoderError(
            f"{file}: d_in {shape.d_in}, num_latents {shape.n_latents}, k {shape.k}; wanted "
            "d_in >= 1 and 1 <= k <= num_latents. The file is damaged."
        )
    return shape


def _refuse_transcoder_run(file: Path) -> None:
    """Runs until February 2025 said ``transcode`` for all coders at once, in the run's file."""
    if file.is_file() and _read_config(file).get("transcode") is True:
        raise CoderError(
            f"{file}: transcode (transcoders read the module's input) is not supported yet. "
            "Wanted TopK autoencoders."
        )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CoderError(f"{file}: no such file. Only safetensors weights are read, never pickle.")
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}
    except safetensors.SafetensorError as error:
        raise CoderError(f"{file}: unreadable ({error}). Fetch the file again.") from error


def _check_tensors(file: Path, tensors: Mapping[str, Tensor], shape: _SparsifyConfig) -> None:
    wanted = {
        "encoder.weight": (shape.n_latents, shape.d_in),
        "encoder.bias": (shape.n_latents,),
        "W_dec": (shape.n_latents, shape.d_in),
        "b_dec": (shape.d_in,),
    }
    missing, unknown = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unknown:
        raise CoderError(
            f"{file}: missing tensors {missing}, unknown tensors {unknown}. Is this a sparsify SAE?"
        )
    for name, tensor in tensors.items():
        seen = tuple(tensor.shape)
        if seen != wanted[name]:
            hint = " It is transposed." if seen == wanted[name][::-1] and len(seen) > 1 else ""
            raise CoderError(
                f"{file}: tensor {name} has shape {list(seen)}, {_CONFIG} says "
                f"{list(wanted[name])}.{hint} Use weights and {_CONFIG} of the same coder."
            )
        n_bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else tensor.numel()
        if n_bad:
            raise CoderError(
                f"{file}: tensor {name} ({tensor.dtype}) has {n_bad} values that are not finite "
                "floats. The training diverged or the file is damaged; use another checkpoint."
            )


_Stamp = tuple[tuple[int, int], ...]


def _stamp(folder: Path) -> _Stamp:
    """Size and time of the coder's files; a missing one is noticed when it is read."""
    files = [folder / name for name in (_CONFIG, _WEIGHTS)]
    return tuple((s.st_size, s.st_mtime_ns) for s in (f.stat() for f in files if f.is_file()))


@lru_cache(maxsize=4096)
def _identity(folder: Path, stamp: _Stamp) -> str:
    del stamp  # part of the cache key alone
    content = _read_config(folder / _CONFIG)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in _read_tensors(folder / _WEIGHTS).items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``layers.9`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
