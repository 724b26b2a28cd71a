"""Gemma Scope 2: ``{site}/layer_{L}_width_{W}_l0_{size}/{config.json, params.safetensors}``.

The settings name the hookpoints; where they are missing, the name of the site's folder does. Unlike
in Gemma Scope 1, transcoders read what the norm gives after its learned scale.

Source: the files of google/gemma-scope-2-* as the loaders of SAELens and circuit-tracer read them.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

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
from autointerp_dagster.core.sparse_coders import LinearCoder, Threshold

_CONFIG = "config.json"
_WEIGHTS = "params.safetensors"
_SUFFIX = ".safetensors"
_ACROSS = re.compile(r"(?:^|/)(clt|crosscoder)[^/]*/")
"""Folders of coders that are not one layer's."""
_AXES: dict[str, Axes] = {
    "w_enc": ("d_in", "d_sae"),
    "w_dec": ("d_sae", "d_out"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
}
_SKIP: dict[str, Axes] = {"affine_skip_connection": ("d_in", "d_out")}


class _Site(NamedTuple):
    reads: str
    writes: str | None = None


_SITES = {
    "resid_post": _Site("layers.{layer}"),
    "attn_out": _Site("layers.{layer}.self_attn.o_proj.input"),
    "mlp_out": _Site("layers.{layer}.post_feedforward_layernorm"),
    "transcoder": _Site(
        "layers.{layer}.pre_feedforward_layernorm", "layers.{layer}.post_feedforward_layernorm"
    ),
}


class _Config(BaseModel):
    """The keys that decide how and where to encode."""

    model_config = ConfigDict(extra="ignore")

    architecture: str = "jump_relu"
    hf_hook_point_in: str | None = None
    hf_hook_point_out: str | None = None
    affine_connection: bool | None = None
    l0: float | None = None


def _units(names: Iterable[str]) -> list[Unit]:
    known = set(names)
    folders = [folder_of(name) for name in known if name.rpartition("/")[2] == _WEIGHTS]
    configs = {folder: in_folder(folder, _CONFIG) for folder in folders}
    units = [
        Unit(folder, in_folder(folder, _WEIGHTS), config if config in known else None)
        for folder, config in configs.items()
    ]
    across = sorted(name for name in known if _ACROSS.search(name) and name.endswith(_SUFFIX))
    return units + [Unit(name, name) for name in across if folder_of(name) not in configs]


def _describe(files: CoderFiles, unit: Unit) -> Description:
    path = files.shown(unit.name)
    across = _ACROSS.search(unit.name)
    if across is not None:
        reason = "one latent reads or writes many layers, and a layer's coder is asked for"
        raise refuse(path, across.group(1), reason)
    config = _Config()
    if unit.config is not None:
        file = files.shown(unit.config)
        config = checked_config(file, read_json(files.fetch(unit.config), file), _Config)
        if config.architecture != "jump_relu":
            raise unknown_choice(file, "architecture", config.architecture, ("jump_relu",))
    site = re.search(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder)(?:_all)?(?:/|$)", path)
    number = re.search(r"(?:^|/)layer_(\d+)_", path)
    layer = None if number is None else int(number.group(1))
    reads, writes = config.hf_hook_point_in, config.hf_hook_point_out
    if reads is None and site is not None and layer is not None:
        reads, writes = (place and place.format(layer=layer) for place in _SITES[site.group(1)])
    return Description(
        build=partial(_build, config.affine_connection),
        settings={"architecture": config.architecture, "affine": config.affine_connection},
        reads=reads,
        writes=writes,
        layer=layer,
        expected_l0=config.l0,
    )


def _build(affine: bool | None, weights: Weights) -> LinearCoder:
    optional = frozenset() if affine else frozenset(_SKIP)
    axes = _AXES if affine is False else _AXES | _SKIP
    tensors = checked_tensors(weights, Wanted(axes, optional), {})
    skip = tensors.get("affine_skip_connection")
    return LinearCoder(
        encoder=tensors["w_enc"].float().T.contiguous(),
        bias=tensors["b_enc"].float(),
        decoder=tensors["w_dec"],
        b_dec=tensors["b_dec"].float(),
        activation=Threshold(tensors["threshold"].float().clamp(min=0)),
        skip=None if skip is None else skip.T.contiguous(),
    )


FORMAT = Format(
    "gemma_scope_2",
    "{site}/layer_{L}_width_{W}_l0_{size}/{config.json, params.safetensors}",
    _units,
    _describe,
)
