"""saprmarks/dictionary_learning: ``config.json`` and ``ae.pt`` (or ``checkpoints/ae_{step}.pt``).

Source: dictionary_learning ``dictionary.py``, ``trainers/*top_k.py`` and their ``from_pretrained``,
whose defaults are followed; ``training.py`` for backups.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from autointerp_dagster.adapters.coder_files.checking import (
    Axes,
    Wanted,
    checked_config,
    checked_tensors,
    refuse,
    unknown_choice,
)
from autointerp_dagster.adapters.coder_files.description import (
    IO,
    Description,
    Format,
    Unit,
    folder_of,
    in_folder,
)
from autointerp_dagster.adapters.coder_files.files import CoderFiles
from autointerp_dagster.adapters.coder_files.weights import Weights, read_json
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.sparse_coders import (
    Activation,
    Gated,
    LinearCoder,
    ReLU,
    Threshold,
    TopK,
)

_LINEAR: dict[str, Axes] = {
    "encoder.weight": ("dict_size", "d"),
    "decoder.weight": ("d", "dict_size"),
}
_PARAMETERS: dict[str, Axes] = {
    "W_enc": ("d", "dict_size"),
    "W_dec": ("dict_size", "d"),
    "b_enc": ("dict_size",),
    "b_dec": ("d",),
}
_TOP_K = _LINEAR | {"encoder.bias": ("dict_size",), "b_dec": ("d",)}


class _Kind(NamedTuple):
    """Where one class of the library keeps what."""

    axes: Mapping[str, Axes]
    bias: str
    """Of the encoder; of a gated one, of its gate."""
    b_dec: str
    is_centred: bool
    """Whether ``b_dec`` is taken off the input."""
    scaled: tuple[str, ...]
    """What a norm factor that is not folded in yet multiplies."""


_KINDS = {
    "AutoEncoder": _Kind(
        _LINEAR | {"encoder.bias": ("dict_size",), "bias": ("d",)},
        "encoder.bias", "bias", True, ("encoder.bias", "bias"),
    ),
    "AutoEncoderNew": _Kind(
        _LINEAR | {"encoder.bias": ("dict_size",), "decoder.bias": ("d",)},
        "encoder.bias", "decoder.bias", False, ("encoder.bias", "decoder.bias"),
    ),
    "GatedAutoEncoder": _Kind(
        _LINEAR | {
            "decoder_bias": ("d",), "r_mag": ("dict_size",), "gate_bias": ("dict_size",),
            "mag_bias": ("dict_size",),
        },
        "gate_bias", "decoder_bias", True, ("decoder_bias", "mag_bias", "gate_bias"),
    ),
    "JumpReluAutoEncoder": _Kind(
        _PARAMETERS | {"threshold": ("dict_size",)},
        "b_enc", "b_dec", False, ("b_enc", "b_dec", "threshold"),
    ),
    "AutoEncoderTopK": _Kind(_TOP_K, "encoder.bias", "b_dec", True, ("encoder.bias", "b_dec")),
    "BatchTopKSAE": _Kind(
        _TOP_K | {"threshold": ()}, "encoder.bias", "b_dec", True,
        ("encoder.bias", "b_dec", "threshold"),
    ),
    "MatryoshkaBatchTopKSAE": _Kind(
        _PARAMETERS | {"threshold": ()}, "b_enc", "b_dec", True, ("b_enc", "b_dec", "threshold"),
    ),
}  # fmt: skip
_SITES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
}
"""TransformerLens' names of what submodule names begin with."""


class _Trainer(BaseModel):
    """The keys of ``trainer`` that decide how to encode, and where."""

    model_config = ConfigDict(extra="ignore")

    dict_class: str
    activation_dim: int = Field(ge=1)
    dict_size: int = Field(ge=1)
    k: int | None = Field(default=None, ge=1)
    layer: int | str | None = None
    submodule_name: str | None = None


class _Buffer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    io: IO = "out"


class _Config(BaseModel):
    """``config.json``."""

    model_config = ConfigDict(extra="ignore")

    trainer: _Trainer
    buffer: _Buffer = _Buffer()


def _units(names: Iterable[str]) -> list[Unit]:
    units: list[Unit] = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if file == "ae.pt":
            units.append(Unit(folder, name, in_folder(folder, "config.json")))
        elif re.fullmatch(r"ae_\w+\.pt", file):
            above = folder_of(folder) if folder.rpartition("/")[2] == "checkpoints" else folder
            config = in_folder(above, "config.json")
            units.append(Unit(name, name, config, is_spare=True))
    return units


def _describe(files: CoderFiles, unit: Unit) -> Description:
    name = unit.config or ""
    file = files.shown(name)
    config = checked_config(file, read_json(files.fetch(name), file), _Config)
    trainer = config.trainer
    if trainer.dict_class == "CrossCoder":
        raise refuse(file, "CrossCoder", "a latent reads and writes many layers at once")
    if trainer.dict_class not in _KINDS:
        raise unknown_choice(file, "trainer.dict_class", trainer.dict_class, tuple(_KINDS))
    site = _site(trainer.submodule_name or "", files.shown(unit.name))
    layer = trainer.layer if isinstance(trainer.layer, int) else None
    return Description(
        build=partial(_build, trainer),
        settings=trainer.model_dump(include={"dict_class", "activation_dim", "dict_size", "k"}),
        reads=site if config.buffer.io == "out" else None,
        io=config.buffer.io,
        layer=layer,
        expected_l0=trainer.k,
    )


def _site(submodule_name: str, path: str) -> str | None:
    """Where ``resid_post_layer_8`` is, as a submodule's name or a folder's, or null."""
    kinds = "|".join(_SITES)
    for text in (submodule_name, path):
        found = re.search(rf"({kinds})_layer_(\d+)", text)
        if found is not None:
            return f"blocks.{found.group(2)}.{_SITES[found.group(1)]}"
    return None


def _build(trainer: _Trainer, weights: Weights) -> LinearCoder:
    kind = _KINDS[trainer.dict_class]
    sizes = {"d": trainer.activation_dim, "dict_size": trainer.dict_size}
    state, factor = _state(weights)
    wanted = Wanted(kind.axes, ignored=("k", "group_sizes", "threshold"))
    tensors = checked_tensors(weights._replace(tensors=state), wanted, sizes, "config.json")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name in kind.scaled:
        if name != "threshold" or bool((tensors[name] >= 0).all()):
            tensors[name] = tensors[name] * factor
    is_linear = "encoder.weight" in tensors
    encoder = tensors["encoder.weight"] if is_linear else tensors["W_enc"].T
    decoder = tensors["decoder.weight"].T if is_linear else tensors["W_dec"]
    bias, b_dec = tensors[kind.bias], tensors[kind.b_dec]
    if trainer.dict_class == "AutoEncoder":
        encoder, bias, decoder = _with_unit_rows(encoder, bias, decoder)
    return LinearCoder(
        encoder=encoder.contiguous(),
        bias=bias,
        decoder=decoder.contiguous(),
        b_dec=b_dec,
        activation=_activation(trainer, weights.file, tensors, state),
        centre=b_dec if kind.is_centred else None,
    )


def _state(weights: Weights) -> tuple[dict[str, Tensor], float]:
    """The coder's tensors, and what its biases are still to be multiplied by.

    A backup made during the training holds them under ``ae``, for normalised activations.
    """
    backup = weights.values.get("ae")
    if not isinstance(backup, Mapping):
        return weights.tensors, 1.0
    tensors = {str(name): t for name, t in backup.items() if isinstance(t, Tensor)}
    factor = {**weights.tensors, **weights.values}.get("norm_factor")
    return tensors, 1.0 if factor is None else float(factor)


def _with_unit_rows(encoder: Tensor, bias: Tensor, decoder: Tensor) -> tuple[Tensor, ...]:
    """As ``AutoEncoder.from_pretrained`` does unless the rows are of unit length already."""
    norm = decoder.norm(dim=1)
    if torch.allclose(norm, torch.ones_like(norm)):
        return encoder, bias, decoder
    scale = norm.where(norm > 0, 1.0)
    return encoder * norm[:, None], bias * norm, decoder / scale[:, None]


def _activation(
    trainer: _Trainer, file: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Activation:
    kind = trainer.dict_class
    if kind == "GatedAutoEncoder":
        return Gated(tensors["r_mag"].exp(), tensors["mag_bias"])
    if kind == "AutoEncoderTopK":
        k = int(state["k"]) if "k" in state else trainer.k
        if k is None or not 1 <= k <= trainer.dict_size or trainer.k not in (None, k):
            raise CoderError(
                f"{file}: k is {k}, config.json says {trainer.k}; wanted the same, 1 to "
                f"{trainer.dict_size}. Use weights and config.json of the same coder."
            )
        return TopK(k)
    if "threshold" in tensors:  # -1 before it is trained: then everything above zero fires
        threshold = tensors["threshold"].clamp(min=0)
        return Threshold(threshold.expand(trainer.dict_size).clone())
    return ReLU()


FORMAT = Format(
    "dictionary_learning", "config.json with ae.pt or checkpoints/ae_{step}.pt", _units, _describe
)
