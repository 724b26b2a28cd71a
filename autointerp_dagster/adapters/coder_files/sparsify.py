"""EleutherAI sparsify, since July 2024: ``<run>/<hookpoint>/{cfg.json, sae.safetensors}``.

Source: eai-sparsify 1.3.3 ``sparse_coder.py``, ``trainer.py``; for runs before February 2025
``sae/sae.py`` at da0e080, where transcoders, too, took ``b_dec`` off their input.
"""

import re
from collections.abc import Iterable
from functools import partial

from pydantic import BaseModel, ConfigDict

from autointerp_dagster.adapters.coder_files.checking import (
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
from autointerp_dagster.core.sparse_coders import GroupMax, LinearCoder, TopK

_CONFIG = "cfg.json"
_WEIGHTS = "sae.safetensors"
_AXES = {
    "encoder.weight": ("num_latents", "d_in"),
    "encoder.bias": ("num_latents",),
    "W_dec": ("num_latents", "d_in"),
    "b_dec": ("d_in",),
}


class _Config(BaseModel):
    """The keys of ``cfg.json`` that decide how to encode, with sparsify's defaults."""

    model_config = ConfigDict(extra="ignore", strict=True)

    d_in: int
    activation: str = "topk"
    num_latents: int = 0
    expansion_factor: int = 32
    k: int = 32
    signed: bool = False
    transcode: bool | None = None
    skip_connection: bool = False

    @property
    def n_latents(self) -> int:
        """In sparsify 0 means ``d_in * expansion_factor``."""
        return self.num_latents or self.d_in * self.expansion_factor


def _units(names: Iterable[str]) -> list[Unit]:
    known = set(names)
    folders = dict.fromkeys(
        folder_of(name)
        for name in known
        if name.rpartition("/")[2] in (_CONFIG, _WEIGHTS) and not name.startswith("../")
    )
    return [
        Unit(
            folder,
            in_folder(folder, _WEIGHTS),
            in_folder(folder, _CONFIG),
            _module_of(folder),
            is_spare=folder.startswith("best/") or "/best/" in folder,
        )
        for folder in folders
        if in_folder(folder, "sae_weights.safetensors") not in known  # SAELens' layout
    ]


def _module_of(folder: str) -> str | None:
    """The hookpoint a folder is named after: ``layers.5/seed1`` and ``best/layers.5/layers.5``."""
    parts = [part for part in folder.split("/") if part]
    while parts and re.fullmatch(r"seed\d+", parts[-1]):
        parts.pop()
    return parts[-1] if parts else None


def _describe(files: CoderFiles, unit: Unit) -> Description:
    name = unit.config or ""
    file = files.shown(name)
    config = checked_config(file, read_json(files.fetch(name), file), _Config)
    _refuse_unfit(file, config)
    is_old = config.transcode is None
    reads_input = config.transcode or (
        is_old and (config.skip_connection or _is_transcoder_run(files, unit))
    )
    takes_b_dec = is_old or not config.transcode
    module = unit.module or _named_root(files)
    return Description(
        build=partial(_build, config, takes_b_dec),
        settings=config.model_dump() | {"reads_input": reads_input, "takes_b_dec": takes_b_dec},
        reads=f"{module}.input" if reads_input and module else module,
        writes=module if reads_input else None,
        io="in_and_out" if reads_input else "out",
    )


def _named_root(files: CoderFiles) -> str | None:
    """The hookpoint that the source's own folder is named after, if it looks like one."""
    name = files.label.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name if re.fullmatch(r"\w+\.\d+(\.\w+)*", name) else None


def _refuse_unfit(file: str, config: _Config) -> None:
    if config.activation not in ("topk", "groupmax"):
        raise unknown_choice(file, "activation", config.activation, ("topk", "groupmax"))
    if config.signed:
        raise refuse(file, "signed", "its activations may be negative")
    n_latents, k = config.n_latents, config.k
    if config.d_in < 1 or n_latents < 1 or not 1 <= k <= n_latents:
        raise CoderError(
            f"{file}: d_in {config.d_in}, num_latents {n_latents}, k {k}; wanted d_in >= 1 and "
            "1 <= k <= num_latents (0 latents mean d_in * expansion_factor). The file is damaged; "
            "name another checkpoint in the study."
        )
    if config.activation == "groupmax" and n_latents % k:
        raise CoderError(
            f"{file}: groupmax with k {k} of {n_latents} latents, wanted a divisor. The file is "
            "damaged; name another checkpoint in the study."
        )


def _is_transcoder_run(files: CoderFiles, unit: Unit) -> bool:
    """Runs until February 2025 said ``transcode`` for all coders at once, in the run's file."""
    folders = unit.name.split("/")
    above = ["../config.json"] if not unit.name else []
    above += [in_folder("/".join(folders[:n]), "config.json") for n in range(len(folders))]
    for name in above:
        if name in files.names:
            run = read_json(files.fetch(name), files.shown(name))
            nested = run.get("sae")
            nested = nested if isinstance(nested, dict) else {}
            if run.get("transcode") is True or nested.get("transcode") is True:
                return True
    return False


def _build(config: _Config, takes_b_dec: bool, weights: Weights) -> LinearCoder:
    axes = _AXES | ({"W_skip": ("d_in", "d_in")} if config.skip_connection else {})
    sizes = {"num_latents": config.n_latents, "d_in": config.d_in}
    tensors = checked_tensors(weights, Wanted(axes), sizes, _CONFIG)
    b_dec = tensors["b_dec"].float()
    return LinearCoder(
        encoder=tensors["encoder.weight"].float(),
        bias=tensors["encoder.bias"].float(),
        decoder=tensors["W_dec"],
        b_dec=b_dec,
        activation=TopK(config.k) if config.activation == "topk" else GroupMax(config.k),
        centre=b_dec if takes_b_dec else None,
        skip=tensors.get("W_skip"),
        dtype=tensors["encoder.weight"].dtype,
    )


FORMAT = Format("sparsify", f"<hookpoint>/{{{_CONFIG}, {_WEIGHTS}}}", _units, _describe)
