"""Gemma Scope 1: ``layer_{L}/width_{W}/average_l0_{N}/params.npz``, without any settings.

Which vectors a coder encodes is said by the repository's name alone: ``-res``, ``-mlp``, ``-att``
or ``-transcoders``; without one of these in the path the study must say it (``reads``). Activations
are ``relu(x W_enc + b_enc)`` above a threshold; ``b_dec`` is not taken off the input.

Source: Lieberum et al. 2024, "Gemma Scope"; sites as in its section 3.1 and its repositories.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from autointerp_dagster.adapters.coder_files.checking import Axes, Wanted, checked_tensors
from autointerp_dagster.adapters.coder_files.description import (
    Description,
    Format,
    Unit,
    folder_of,
)
from autointerp_dagster.adapters.coder_files.files import CoderFiles
from autointerp_dagster.adapters.coder_files.weights import Weights
from autointerp_dagster.core.sparse_coders import LinearCoder, Threshold

_WEIGHTS = "params.npz"
_AXES: dict[str, Axes] = {
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_out"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
}
_BOS_NOTE = "not trained on BOS, where activations are huge and mean nothing"


class _Site(NamedTuple):
    reads: str
    writes: str | None = None


_SITES = {
    "res": _Site("layers.{layer}"),
    "mlp": _Site("layers.{layer}.post_feedforward_layernorm"),
    "att": _Site("layers.{layer}.self_attn.o_proj.input"),
    "transcoders": _Site(
        "layers.{layer}.pre_feedforward_layernorm.normalized",  # before the learned scale
        "layers.{layer}.post_feedforward_layernorm",
    ),
}


def _units(names: Iterable[str]) -> list[Unit]:
    return [Unit(folder_of(name), name) for name in names if name.rpartition("/")[2] == _WEIGHTS]


def _describe(files: CoderFiles, unit: Unit) -> Description:
    path = files.shown(unit.name)
    layer = _number(r"(?:^|/)layer_(\d+)(?:/|$)", path)
    l0 = _number(r"(?:^|/)average_l0_(\d+)(?:/|$)", path)
    is_embedding = re.search(r"(?:^|/)embedding(?:/|$)", path) is not None
    site = re.search(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)", path)
    reads = writes = None
    if is_embedding:
        reads = "embed_tokens"
    elif site is not None and layer is not None:
        reads, writes = (place and place.format(layer=layer) for place in _SITES[site.group(1)])
    return Description(
        build=_build_embedding if is_embedding else _build,
        settings={"is_embedding": is_embedding},
        reads=reads,
        writes=writes,
        layer=layer,
        expected_l0=l0,
        notes=(_BOS_NOTE,),
    )


def _number(pattern: str, path: str) -> int | None:
    found = re.search(pattern, path)
    return None if found is None else int(found.group(1))


def _checked(weights: Weights) -> dict[str, Tensor]:
    renamed = {re.sub(r"^w_", "W_", name): t for name, t in weights.tensors.items()}
    factor = renamed.get("scaling_factor")
    if factor is not None and torch.equal(factor, torch.ones_like(factor)):
        del renamed["scaling_factor"]
    return checked_tensors(weights._replace(tensors=renamed), Wanted(_AXES), {})


def _build(weights: Weights) -> LinearCoder:
    tensors = _checked(weights)
    return LinearCoder(
        encoder=tensors["W_enc"].float().T.contiguous(),
        bias=tensors["b_enc"].float(),
        decoder=tensors["W_dec"],
        b_dec=tensors["b_dec"].float(),
        activation=Threshold(tensors["threshold"].float().clamp(min=0)),
    )


def _build_embedding(weights: Weights) -> LinearCoder:
    """Trained on embeddings before the model multiplies them by ``sqrt(d_model)``; it reads after.

    Source: SAELens' ``gemma_2_sae_huggingface_loader`` makes the same of ``W_enc`` and ``W_dec``.
    """
    tensors = _checked(weights)
    scale = tensors["b_dec"].shape[0] ** 0.5
    return LinearCoder(
        encoder=(tensors["W_enc"].float() / scale).T.contiguous(),
        bias=tensors["b_enc"].float(),
        decoder=tensors["W_dec"].float() * scale,
        b_dec=tensors["b_dec"].float(),
        activation=Threshold(tensors["threshold"].float().clamp(min=0)),
    )


FORMAT = Format("gemma_scope", "layer_{L}/width_{W}/average_l0_{N}/params.npz", _units, _describe)
