"""Llama Scope (OpenMOSS): ``hyperparams.json`` and ``checkpoints/final.safetensors``.

And the one trained on R1 distillates, ``config.json`` and ``sae_weights.safetensors``.

The order of operations is the authors': settings are folded into the weights so that they encode
the model's own vectors, then, where sparsity counts decoder norms, these are folded into the
encoder, and only then pre-activations are compared with the threshold. SAELens folds no norms.

Source: Language-Model-SAEs ``src/lm_saes/sae.py``: at 16ca67a6 (November 2024) for the first
layout, at 00366e29 for the second, which compares scores with the norm and keeps values without.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

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
    InputNorm,
    LinearCoder,
    ReLU,
    Threshold,
    TopK,
)

_WEIGHTS = "checkpoints/final.safetensors"
_WEIGHTS_R1 = "sae_weights.safetensors"
_AXES: dict[str, Axes] = {
    "encoder.weight": ("d_sae", "d_model"),
    "encoder.bias": ("d_sae",),
    "decoder.weight": ("d_model", "d_sae"),
}
_LOG_THRESHOLD = "log_jumprelu_threshold"
_NORM_TENSOR = "dataset_average_activation_norm."
_ACTIVATIONS = ("relu", "jumprelu", "topk")
_NORMS = ("dataset-wise", "inference", "token-wise")


class _Config(BaseModel):
    """The keys of either file that decide how to encode."""

    model_config = ConfigDict(extra="ignore")

    d_model: int = Field(ge=1)
    d_sae: int | None = Field(default=None, ge=1)
    expansion_factor: float | None = None
    hook_point_in: str | None = None
    hook_point_out: str | None = None
    act_fn: str = "jumprelu"
    jump_relu_threshold: float | None = None
    top_k: int | None = None
    norm_activation: str = "dataset-wise"
    dataset_average_activation_norm: dict[str, float] | None = None
    sparsity_include_decoder_norm: bool = True
    use_decoder_bias: bool = True
    apply_decoder_bias_to_pre_encoder: bool = False
    use_glu_encoder: bool = False

    @property
    def n_latents(self) -> int:
        """Said directly, or as a multiple of the width; 0: not at all."""
        return self.d_sae or int(self.d_model * (self.expansion_factor or 0))


class _Parts(NamedTuple):
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    b_dec: Tensor


def _units(names: Iterable[str]) -> list[Unit]:
    known = set(names)
    units: list[Unit] = []
    for name in known:
        folder, _, file = name.rpartition("/")
        if file == "hyperparams.json":
            units.append(Unit(folder, in_folder(folder, _WEIGHTS), name))
        elif file == _WEIGHTS_R1 and in_folder(folder, "cfg.json") not in known:
            config = in_folder(folder_of(name), "config.json")
            units += [Unit(folder, name, config)] if config in known else []
    return units


def _describe(files: CoderFiles, unit: Unit) -> Description:
    name = unit.config or ""
    file = files.shown(name)
    config = checked_config(file, read_json(files.fetch(name), file), _Config)
    is_r1 = unit.weights.endswith(_WEIGHTS_R1)
    _refuse_unfit(file, config, is_r1)
    is_transcoder = config.hook_point_out not in (None, config.hook_point_in)
    k = config.top_k if config.act_fn == "topk" else None
    return Description(
        build=partial(_build_r1 if is_r1 else _build, config),
        settings=config.model_dump(exclude={"hook_point_in", "hook_point_out"}),
        reads=config.hook_point_in,
        writes=config.hook_point_out if is_transcoder else None,
        expected_l0=k,
        notes=(
            "activations are in the units of the authors' inference code, which folds decoder "
            "norms first; SAELens' copies of these coders do not, and find other latents",
        ),
    )


def _refuse_unfit(file: str, config: _Config, is_r1: bool) -> None:
    if config.use_glu_encoder:
        raise refuse(file, "use_glu_encoder", "its encoder is no linear map")
    if config.act_fn not in _ACTIVATIONS:
        raise unknown_choice(file, "act_fn", config.act_fn, _ACTIVATIONS)
    if config.norm_activation not in _NORMS:
        raise unknown_choice(file, "norm_activation", config.norm_activation, _NORMS)
    if config.n_latents < 1:
        raise CoderError(
            f"{file}: neither d_sae nor expansion_factor, wanted one. The file is damaged; name "
            "another checkpoint in the study."
        )
    if is_r1 and config.act_fn == "topk" and config.sparsity_include_decoder_norm:
        raise refuse(file, "topk with sparsity_include_decoder_norm", "scores are not the values")
    if config.act_fn == "topk" and not 1 <= (config.top_k or 0) <= config.n_latents:
        raise CoderError(
            f"{file}: top_k {config.top_k}, wanted 1 to {config.n_latents}. The file is damaged; "
            "name another checkpoint in the study."
        )
    if config.act_fn == "jumprelu" and config.jump_relu_threshold is None and not is_r1:
        raise CoderError(
            f"{file}: jumprelu without jump_relu_threshold. The file is damaged; name another "
            "checkpoint in the study."
        )


def _build(config: _Config, weights: Weights) -> LinearCoder:
    parts, dtype_of = _parts(config, weights, {})
    norms = config.dataset_average_activation_norm
    if config.norm_activation == "dataset-wise":
        parts = _for_raw_inputs(parts, *_factors(config, norms or {}, weights.file))
    if config.sparsity_include_decoder_norm:
        norm = parts.decoder.norm(dim=1)
        scale = norm.where(norm > 0, 1.0)
        parts = parts._replace(
            encoder=parts.encoder * norm[:, None],
            bias=parts.bias * norm,
            decoder=parts.decoder / scale[:, None],
        )
    threshold = parts.bias.new_full((len(parts.bias),), config.jump_relu_threshold or 0.0)
    return _coder(config, parts, threshold, dtype_of)


def _build_r1(config: _Config, weights: Weights) -> LinearCoder:
    is_jump = config.act_fn == "jumprelu"
    parts, dtype_of = _parts(config, weights, {_LOG_THRESHOLD: ("d_sae",)} if is_jump else {})
    threshold = weights.tensors[_LOG_THRESHOLD].float().exp() if is_jump else parts.bias * 0
    if config.sparsity_include_decoder_norm:
        norm = parts.decoder.norm(dim=1)
        threshold = threshold / norm.where(norm > 0, 1.0)
    coder = _coder(config, parts, threshold, dtype_of)
    if config.norm_activation != "dataset-wise":
        return coder
    norms = dict(config.dataset_average_activation_norm or {}) | {
        name.removeprefix(_NORM_TENSOR): float(tensor)
        for name, tensor in weights.tensors.items()
        if name.startswith(_NORM_TENSOR)
    }
    factor_in, factor_out = _factors(config, norms, weights.file)
    ratio = factor_in / factor_out
    return replace(
        coder, input_scale=factor_in, decoder=coder.decoder * ratio, b_dec=coder.b_dec * ratio
    )


def _parts(config: _Config, weights: Weights, more: Mapping[str, Axes]) -> tuple[_Parts, Tensor]:
    """The checked tensors in float32, and one that tells their type."""
    axes = {**_AXES, **({"decoder.bias": ("d_model",)} if config.use_decoder_bias else {}), **more}
    sizes = {"d_model": config.d_model, "d_sae": config.n_latents}
    wanted = Wanted(axes, ignored=(f"{_NORM_TENSOR}*", _LOG_THRESHOLD))
    tensors = checked_tensors(weights, wanted, sizes, "the coder's configuration")
    encoder = tensors["encoder.weight"]
    b_dec = tensors.get("decoder.bias", encoder.new_zeros(config.d_model))
    parts = _Parts(
        encoder.float(),
        tensors["encoder.bias"].float(),
        tensors["decoder.weight"].T.float(),
        b_dec.float(),
    )
    return parts, encoder


def _factors(config: _Config, norms: Mapping[str, float], file: str) -> tuple[float, float]:
    """What vectors are multiplied by, going in and coming out, for a mean length of sqrt(d)."""
    found = [
        norms.get(side) or norms.get(hook or "")
        for side, hook in (("in", config.hook_point_in), ("out", config.hook_point_out))
    ]
    if not found[0] or found[0] <= 0:
        raise CoderError(
            f"{file}: norm_activation is 'dataset-wise' without dataset_average_activation_norm. "
            "Wanted the mean length of the vectors it was trained on; name another checkpoint in "
            "the study."
        )
    size = math.sqrt(config.d_model)
    return size / found[0], size / (found[1] or found[0])


def _for_raw_inputs(parts: _Parts, factor_in: float, factor_out: float) -> _Parts:
    """The same coder for vectors that are not multiplied first; its activations are smaller."""
    return parts._replace(
        bias=parts.bias / factor_in,
        decoder=parts.decoder * (factor_in / factor_out),
        b_dec=parts.b_dec / factor_out,
    )


def _coder(config: _Config, parts: _Parts, threshold: Tensor, dtype_of: Tensor) -> LinearCoder:
    activation: Activation = ReLU()
    if config.act_fn == "topk":
        activation = TopK(config.top_k or 1)
    elif config.act_fn == "jumprelu":
        activation = Threshold(threshold.clamp(min=0))
    norm: InputNorm = "constant_norm_rescale" if config.norm_activation == "token-wise" else "none"
    return LinearCoder(
        encoder=parts.encoder,
        bias=parts.bias,
        decoder=parts.decoder.contiguous(),
        b_dec=parts.b_dec,
        activation=activation,
        centre=parts.b_dec if config.apply_decoder_bias_to_pre_encoder else None,
        input_norm=norm,
        dtype=dtype_of.dtype,
    )


FORMAT = Format(
    "llama_scope", "hyperparams.json with checkpoints/final.safetensors", _units, _describe
)
