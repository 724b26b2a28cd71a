"""OpenAI's sparse autoencoders of GPT-2 small: ``{location}[_v4|_v5_32k]/autoencoders/{L}.pt``.

The file holds a state dict with the activation's class and settings; there is no configuration, so
where it was trained is said by the location's name in the path alone.

Source: openai/sparse_autoencoder ``model.py``, ``paths.py``.
"""

import re
from collections.abc import Iterable
from functools import partial

from autointerp_dagster.adapters.coder_files.checking import (
    Axes,
    Wanted,
    checked_tensors,
    refuse,
    unknown_choice,
)
from autointerp_dagster.adapters.coder_files.description import Description, Format, Unit
from autointerp_dagster.adapters.coder_files.files import CoderFiles
from autointerp_dagster.adapters.coder_files.weights import Weights
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.sparse_coders import Activation, LinearCoder, ReLU, TopK

_AXES: dict[str, Axes] = {
    "encoder.weight": ("n_latents", "n_inputs"),
    "latent_bias": ("n_latents",),
    "decoder.weight": ("n_inputs", "n_latents"),
    "pre_bias": ("n_inputs",),
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_SITES = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}
"""TransformerLens' names of the locations."""


def _units(names: Iterable[str]) -> list[Unit]:
    return [Unit(name, name) for name in names if re.fullmatch(r"(?:.*/)?\d+\.pt", name)]


def _describe(files: CoderFiles, unit: Unit) -> Description:
    path = files.shown(unit.name)
    layer = int(unit.name.rpartition("/")[2].removesuffix(".pt"))
    found = re.search(rf"(?:^|/)({'|'.join(_SITES)})(?:_v\d\w*)?/", path)
    reads = None if found is None else f"blocks.{layer}.{_SITES[found.group(1)]}"
    return Description(build=partial(_build), settings={}, reads=reads, layer=layer)


def _build(weights: Weights) -> LinearCoder:
    tensors = checked_tensors(weights, Wanted(_AXES, ignored=_STATISTICS), {})
    name = weights.values.get("activation", "ReLU")
    pre_bias = tensors["pre_bias"].float()
    return LinearCoder(
        encoder=tensors["encoder.weight"].float(),
        bias=tensors["latent_bias"].float(),
        decoder=tensors["decoder.weight"].T.contiguous(),
        b_dec=pre_bias,
        activation=_activation(weights, str(name), len(tensors["latent_bias"])),
        centre=pre_bias,
        input_norm="layer_norm" if name == "TopK" else "none",  # so their own loader tells, too
    )


def _activation(weights: Weights, name: str, n_latents: int) -> Activation:
    if name == "ReLU":
        return ReLU()
    if name != "TopK":
        raise unknown_choice(weights.file, "activation", name, ("ReLU", "TopK"))
    state = weights.values.get("activation_state_dict")
    state = state if isinstance(state, dict) else {}
    if state.get("postact_fn", "ReLU") != "ReLU":
        what = f"TopK with {state['postact_fn']}"
        raise refuse(weights.file, what, "its activations may be negative")
    k = state.get("k")
    if not isinstance(k, int) or not 1 <= k <= n_latents:
        raise CoderError(
            f"{weights.file}: activation_state_dict.k is {k!r}, wanted 1 to {n_latents}. The file "
            "is damaged; name another checkpoint in the study."
        )
    return TopK(k)


FORMAT = Format("openai", "{location}/autoencoders/{layer}.pt", _units, _describe)
