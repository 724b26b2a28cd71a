"""circuit-tracer's per-layer transcoders: ``config.yaml`` and ``layer_{L}.safetensors``.

There a TopK transcoder keeps negative values where fewer than k are positive; here none fires.

Source: circuit-tracer ``transcoder/single_layer_transcoder.py``, ``utils/hf_utils.py``.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from autointerp_dagster.adapters.coder_files.checking import (
    Axes,
    Wanted,
    checked_config,
    checked_tensors,
    refuse,
    unknown_choice,
)
from autointerp_dagster.adapters.coder_files.description import (
    Description,
    Format,
    Unit,
    in_folder,
)
from autointerp_dagster.adapters.coder_files.files import CoderFiles
from autointerp_dagster.adapters.coder_files.weights import Weights, read_yaml
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.sparse_coders import Activation, LinearCoder, ReLU, Threshold, TopK

_CONFIG = "config.yaml"
_THRESHOLD = "activation_function.threshold"
_AXES: dict[str, Axes] = {
    "W_enc": ("d_transcoder", "d_in"),
    "W_dec": ("d_transcoder", "d_out"),
    "b_enc": ("d_transcoder",),
    "b_dec": ("d_out",),
    "W_skip": ("d_out", "d_in"),
    _THRESHOLD: ("d_transcoder",),
}
_OPTIONAL = frozenset({"W_skip", _THRESHOLD})


class _Config(BaseModel):
    """``config.yaml``."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_kind: str = "transcoder_set"
    feature_input_hook: str | None = None
    feature_output_hook: str | None = None
    activation: str | None = None
    k: int | None = Field(default=None, ge=1)
    transcoders: Any = None


def _units(names: Iterable[str]) -> list[Unit]:
    known = set(names)
    units: list[Unit] = []
    for name in known:
        folder, _, file = name.rpartition("/")
        if re.fullmatch(r"layer_\d+\.safetensors|W_enc_\d+\.safetensors", file):
            config = in_folder(folder, _CONFIG)
            units.append(Unit(name, name, config if config in known else None))
    return units


def _describe(files: CoderFiles, unit: Unit) -> Description:
    path = files.shown(unit.name)
    config = _Config()
    if unit.config is not None:
        file = files.shown(unit.config)
        config = checked_config(file, read_yaml(files.fetch(unit.config), file), _Config)
    is_cross = "W_enc_" in unit.name.rpartition("/")[2]
    if is_cross or config.model_kind != "transcoder_set":
        kind = "cross_layer_transcoder" if is_cross else config.model_kind
        raise refuse(path, kind, "a latent writes to many layers; one that it adds to is asked for")
    if config.activation not in (None, "relu", "topk", "jumprelu"):
        choices = ("relu", "topk", "jumprelu")
        raise unknown_choice(
            files.shown(unit.config or ""), "activation", config.activation, choices
        )
    number = re.search(r"layer_(\d+)\.safetensors$", unit.name)
    assert number is not None  # so it was found
    layer = int(number.group(1))
    reads = writes = None
    if config.feature_input_hook is not None:
        reads = f"blocks.{layer}.{config.feature_input_hook}"
        writes = f"blocks.{layer}.{config.feature_output_hook or config.feature_input_hook}"
    return Description(
        build=partial(_build, config),
        settings={"activation": config.activation, "k": config.k},
        reads=reads,
        writes=writes,
        io="in_and_out",
        layer=layer,
    )


def _build(config: _Config, weights: Weights) -> LinearCoder:
    wanted = Wanted(_AXES, _OPTIONAL, ignored=("k",))
    tensors = checked_tensors(weights, wanted, {})
    return LinearCoder(
        encoder=tensors["W_enc"].float(),
        bias=tensors["b_enc"].float(),
        decoder=tensors["W_dec"],
        b_dec=tensors["b_dec"].float(),
        activation=_activation(config, weights, len(tensors["b_enc"])),
        skip=tensors.get("W_skip"),
    )


def _activation(config: _Config, weights: Weights, n_latents: int) -> Activation:
    if config.activation == "relu":
        return ReLU()
    k = int(weights.tensors["k"]) if "k" in weights.tensors else config.k
    if config.activation == "topk" or (config.activation is None and "k" in weights.tensors):
        if k is None or not 1 <= k <= n_latents:
            raise CoderError(
                f"{weights.file}: activation topk with k {k}, wanted 1 to {n_latents}, in "
                f"{_CONFIG}. Add it there."
            )
        return TopK(k)
    if _THRESHOLD not in weights.tensors:
        return ReLU()
    threshold = weights.tensors[_THRESHOLD].float()
    if bool((threshold < 0).any()):
        raise refuse(
            weights.file, f"a negative {_THRESHOLD}", "its activations may be negative, too"
        )
    return Threshold(threshold)


FORMAT = Format("circuit_tracer", "config.yaml with layer_{L}.safetensors", _units, _describe)
