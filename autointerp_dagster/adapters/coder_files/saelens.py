"""SAELens, 6.x and before: ``cfg.json`` and ``sae_weights.safetensors`` in a coder's folder.

Training checkpoints of BatchTopK kinds are read as SAELens saves them for use: with one threshold.

Source: sae-lens 6 ``saes/*.py`` and ``loading/pretrained_sae_loaders.py``, with its rules for files
from before 6.0.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
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
    Gated,
    InputNorm,
    LinearCoder,
    ReLU,
    Threshold,
    TopK,
)

_CONFIG = "cfg.json"
_WEIGHTS = "sae_weights.safetensors"

_UNSUPPORTED = {
    "temporal": "its encoder attends over positions, so a token's activations are no function of "
    "its own vector",
    "matching_pursuit": "its encoder goes on from what it found before, so it is not linear",
    "abstopk": "its activations may be negative",
}
_SAES = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
_TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
_NORMS: dict[str, InputNorm] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
    "expected_average_only_in": "none",  # folded into the weights before they are saved
    "covariance_whitening": "none",
}
_FOLDED = ("expected_average_only_in", "covariance_whitening")
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Keys from before 6.0."""
_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


class _Metadata(BaseModel):
    """What the coder was trained on."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    hook_name: str | None = None
    hook_name_out: str | None = None
    hook_head_index: int | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    is_before_6: bool = False
    """Set here: files of SAELens do not have it."""
    training_architecture: str | None = None
    training_architecture_details: dict[str, Any] | None = None


class _Config(BaseModel):
    """The keys of ``cfg.json`` that decide how to encode, as of 6.0."""

    model_config = ConfigDict(extra="ignore")

    architecture: str
    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    d_out: int | None = None
    dtype: str = "float32"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    k: float | None = Field(default=None, gt=0)
    rescale_acts_by_decoder_norm: bool = False
    finetuning_scaling_factor: bool = False
    metadata: _Metadata = _Metadata()

    @field_validator("dtype")
    @classmethod
    def _short(cls, dtype: str) -> str:
        return dtype.removeprefix("torch.")

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.architecture in _TRANSCODERS


def _units(names: Iterable[str]) -> list[Unit]:
    known = set(names)
    folders = [folder_of(name) for name in known if name.rpartition("/")[2] == _WEIGHTS]
    return [
        Unit(folder, in_folder(folder, _WEIGHTS), in_folder(folder, _CONFIG))
        for folder in folders
        if in_folder(folder, _CONFIG) in known or in_folder(folder, "config.json") not in known
    ]


def _describe(files: CoderFiles, unit: Unit) -> Description:
    name = unit.config or ""
    file = files.shown(name)
    content = read_json(files.fetch(name), file)
    config = checked_config(file, _since_6(content), _Config)
    _refuse_unfit(file, config)
    metadata = config.metadata
    settings = config.model_dump(exclude={"metadata"})
    return Description(
        build=partial(_build, config),
        settings=settings,
        reads=metadata.hook_name,
        writes=metadata.hook_name_out if config.is_transcoder else None,
        expected_l0=_expected_l0(config),
        notes=_notes(config),
    )


def _since_6(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys as 6.0 names and defaults them, whichever version wrote them."""
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    version = content.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version and int(str(version).split(".", maxsplit=1)[0]) >= 6:
        return dict(content)
    found = {_RENAMED.get(key, key): value for key, value in content.items()}
    activation, kwargs = found.get("activation_fn"), found.get("activation_fn_kwargs") or {}
    found.setdefault("architecture", "standard")
    if activation == "topk" and kwargs.get("k") is not None:
        found |= {"architecture": "topk", "k": kwargs["k"]}
    elif activation not in (None, "relu", "topk"):
        found["architecture"] = f"{found['architecture']} with {activation}"
    normalised = found.get("normalize_activations")
    if normalised is None or normalised is False:
        found["normalize_activations"] = "none"
    elif normalised is True:
        found["normalize_activations"] = "expected_average_only_in"
    if found["architecture"] in _TRANSCODERS:
        found.setdefault("apply_b_dec_to_input", False)
    return found | {"metadata": {**found, **metadata, "is_before_6": True}}


def _refuse_unfit(file: str, config: _Config) -> None:
    if config.architecture in _UNSUPPORTED:
        raise refuse(file, config.architecture, _UNSUPPORTED[config.architecture])
    if config.architecture not in (*_SAES, *_TRANSCODERS):
        raise unknown_choice(file, "architecture", config.architecture, (*_SAES, *_TRANSCODERS))
    if config.normalize_activations not in _NORMS:
        norms = tuple(_NORMS)
        raise unknown_choice(file, "normalize_activations", config.normalize_activations, norms)
    if config.dtype not in _DTYPES:
        raise unknown_choice(file, "dtype", config.dtype, tuple(_DTYPES))
    if config.metadata.hook_head_index is not None:
        raise refuse(
            file,
            f"hook_head_index {config.metadata.hook_head_index}",
            "it reads one head of many, which is a slice of a hookpoint",
        )
    if config.is_transcoder and _NORMS[config.normalize_activations] != "none":
        raise refuse(
            file,
            f"a transcoder with normalize_activations {config.normalize_activations!r}",
            "its output is in units of its own, not of the hookpoint that it writes to",
        )
    if config.is_transcoder and config.apply_b_dec_to_input:
        raise CoderError(
            f"{file}: a transcoder with apply_b_dec_to_input, whose b_dec is of the output. Wanted "
            "false. The file is damaged; name another checkpoint in the study."
        )
    if config.architecture == "topk" and (config.k is None or config.k != int(config.k)):
        raise CoderError(
            f"{file}: topk with k {config.k!r}, wanted a whole number of latents. The file is "
            "damaged; name another checkpoint in the study."
        )


def _expected_l0(config: _Config) -> float | None:
    """The k of a BatchTopK training, also where it is saved for use as a JumpReLU."""
    if config.architecture.endswith("batchtopk"):
        return config.k
    if (config.metadata.training_architecture or "").endswith("batchtopk"):
        k = (config.metadata.training_architecture_details or {}).get("k")
        return float(k) if isinstance(k, int | float) else None
    return None


def _notes(config: _Config) -> list[str]:
    notes: list[str] = []
    kwargs = config.metadata.model_from_pretrained_kwargs
    if kwargs is None and config.metadata.is_before_6:
        notes.append(
            "the file does not say how TransformerLens loaded the model that it was trained on. By "
            "default it centres the residual stream and folds norms, as for the first SAEs of "
            "GPT-2: then the subject model's own vectors differ"
        )
    changed = [name for name in _PROCESSING if (kwargs or {}).get(name) is True]
    if changed:
        notes.append(
            f"trained on TransformerLens activations with {', '.join(changed)}: the subject "
            "model's own differ (centred residual streams, folded norms)"
        )
    if config.normalize_activations in _FOLDED:
        notes.append(
            f"normalize_activations is {config.normalize_activations}: taken as folded into the "
            "weights, as SAELens does; a scaling factor that only its catalogue knows is missing"
        )
    return notes


def _axes(config: _Config) -> dict[str, Axes]:
    out = "d_out" if config.is_transcoder else "d_in"
    axes: dict[str, Axes] = {
        "W_enc": ("d_in", "d_sae"),
        "W_dec": ("d_sae", out),
        "b_dec": (out,),
    }
    if config.architecture == "gated":
        return axes | {"b_gate": ("d_sae",), "b_mag": ("d_sae",), "r_mag": ("d_sae",)}
    axes["b_enc"] = ("d_sae",)
    if "skip" in config.architecture:
        axes["W_skip"] = ("d_out", "d_in")
    if config.architecture.startswith("jumprelu"):
        axes["threshold"] = ("d_sae",)
    if config.architecture.endswith("batchtopk"):
        axes["topk_threshold"] = ()
    return axes


def _build(config: _Config, weights: Weights) -> LinearCoder:
    weights = _with_threshold(weights)
    axes = _axes(config) | {"scaling_factor": ("d_sae",)}
    sizes = {"d_in": config.d_in, "d_sae": config.d_sae}
    if config.is_transcoder and config.d_out is not None:
        sizes["d_out"] = config.d_out
    wanted = Wanted(axes, optional=frozenset({"scaling_factor"}))
    tensors = checked_tensors(weights, wanted, sizes, _CONFIG)
    dtype = _DTYPES[config.dtype]
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.ndim > 0}
    encoder, decoder = cast["W_enc"].float().T.contiguous(), cast["W_dec"]
    bias = cast["b_gate" if config.architecture == "gated" else "b_enc"].float()
    if config.rescale_acts_by_decoder_norm:
        encoder, bias, decoder = _rescaled(encoder, bias, decoder)
    b_dec = cast["b_dec"].float()
    return LinearCoder(
        encoder=encoder,
        bias=bias,
        decoder=_finetuned(weights.file, config, cast, decoder),
        b_dec=b_dec,
        activation=_activation(config, tensors, cast),
        centre=b_dec if config.apply_b_dec_to_input else None,
        input_norm=_NORMS[config.normalize_activations],
        skip=cast.get("W_skip"),
        dtype=dtype,
    )


def _with_threshold(weights: Weights) -> Weights:
    """Training checkpoints of JumpReLU kinds hold the thresholds' logarithm."""
    tensors = dict(weights.tensors)
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    return weights._replace(tensors=tensors)


def _rescaled(encoder: Tensor, bias: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations times the norm of their decoder row; a row without length stays silent."""
    norm = decoder.float().norm(dim=-1)
    scale = norm.where(norm > 0, 1.0)
    return encoder * norm[:, None], bias * norm, decoder.float() / scale[:, None]


def _finetuned(
    file: str, config: _Config, tensors: Mapping[str, Tensor], decoder: Tensor
) -> Tensor:
    """The decoder with the factors that were found for its rows after the training, if any."""
    factor = tensors.get("scaling_factor")
    if factor is None or torch.allclose(factor, torch.ones_like(factor)):
        return decoder
    if not config.finetuning_scaling_factor:
        raise CoderError(
            f"{file}: tensor scaling_factor is not all ones, and cfg.json does not say "
            "finetuning_scaling_factor: true. Wanted both or none; name another checkpoint in the "
            "study."
        )
    return decoder * factor[:, None]


def _activation(
    config: _Config, tensors: Mapping[str, Tensor], cast: Mapping[str, Tensor]
) -> Activation:
    kind: Literal["gated", "topk"] | str = config.architecture
    if kind == "gated":
        return Gated(cast["r_mag"].exp().float(), cast["b_mag"].float())
    if kind == "topk":
        return TopK(int(config.k or 0))
    if "topk_threshold" in tensors:
        threshold = tensors["topk_threshold"].to(_DTYPES[config.dtype]).float()
        return Threshold(threshold.clamp(min=0).expand(config.d_sae).clone())
    if "threshold" in cast:
        return Threshold(cast["threshold"].float().clamp(min=0))
    return ReLU()


FORMAT = Format("saelens", f"{_CONFIG} with {_WEIGHTS}", _units, _describe)
