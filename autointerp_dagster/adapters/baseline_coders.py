"""Baselines as sparse coders: an MLP's neurons, random directions, principal components.

What is dear to make again (principal components, a rotation of neurons) is kept in the cache folder
(``AUTOINTERP_CACHE``) under a hash of all that it is made of, and made again where it is missing.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autointerp_dagster.adapters.coder_files import LoadedCoder
from autointerp_dagster.adapters.embedded.packages import build_once, cache_folder
from autointerp_dagster.adapters.hookpoints import translate, writes_of
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.config import (
    BaselineCoderConfig,
    NeuronsCoderConfig,
    PCACoderConfig,
    RandomCoderConfig,
)
from autointerp_dagster.core.errors import CoderError, ModelError
from autointerp_dagster.core.hooks import captured, parse_hookpoint
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.sparse_coders import (
    Computing,
    LinearCoder,
    NeuronCoder,
    PlacedCoder,
)
from autointerp_dagster.core.sparse_coders.baselines import (
    Moments,
    PrincipalComponents,
    pca_coder,
    random_coder,
    random_rotation,
    rotated_neurons,
)
from autointerp_dagster.core.tokens import TokenDataset, context_batches
from autointerp_dagster.core.types import LayerKey

VERSION = 1
"""Of how baselines are made; part of their identities."""
_FILE = "tensors.safetensors"
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Materials:
    """What the baselines of a study are made of; each is asked for only where it is needed."""

    subject_model: SubjectModel
    coder: Callable[[str], LoadedCoder]
    """Another coder of the study, by name, at the same layer."""
    coder_identity: Callable[[str], str]
    """The identity of that coder."""
    published_l0: Callable[[str], float | None]
    """Latents of that coder that fire on a token, on average, where its files say it beside what
    its identity covers (a folder's name, settings that decide nothing else)."""
    dataset: Callable[[int], TokenDataset]
    """The study's first so many tokens, BOS not counted."""
    dataset_identity: Callable[[], str]
    """Hash over what decides these: the corpus, and how it is cut into contexts."""


def open_baseline(config: BaselineCoderConfig, hookpoint: str, materials: Materials) -> LoadedCoder:
    """Make the baseline of one layer; its tensors are on the CPU.

    Principal components that are not in the cache folder need a pass of the subject model.

    Args:
        config: Which baseline.
        hookpoint: What the study's layer says. Neurons: any hookpoint of their layer, or the input
            of their down projection. Random directions: as the coder that they are compared with.
            Principal components: what is read.
        materials: What it is made of.

    Raises:
        CoderError: If it cannot be made as the study says, or a kept file is damaged.
        ModelError: If the subject model has no such hookpoint, or gives NaN or infinity there.
    """
    try:
        made = _made(config, hookpoint, materials)
    except ValueError as error:
        raise CoderError(f"{config.format} coder at {hookpoint}: {error}") from error
    coder = made.placed.coder
    if isinstance(coder, LinearCoder):
        computing = Computing(
            screen=config.screen, compiled=config.compiled, precision=config.precision
        )
        coder = replace(coder, computing=computing)
    return LoadedCoder(
        made.placed._replace(coder=coder),
        baseline_identity(config, hookpoint, materials),
        config.format,
        f"{config.format}: {made.about}",
        float(made.k),
    )


def baseline_identity(config: BaselineCoderConfig, hookpoint: str, materials: Materials) -> str:
    """The identity that :func:`open_baseline` gives, without making anything or running a model.

    It is a hash over what the baseline is made of.

    Raises:
        CoderError: If ``hookpoint`` does not name an MLP, for neurons.
    """
    about, model = config.identity(), materials.subject_model
    match config:
        case NeuronsCoderConfig():
            return _hash(about, model.identity(), mlp_of(hookpoint, model.model_type))
        case RandomCoderConfig():
            del about["like"]  # by what it is, not by its name
            about["k"] = config.k or _k_of(materials.published_l0(config.like))
            return _hash(about, materials.coder_identity(config.like))
        case PCACoderConfig():
            reads = translate(hookpoint, model.model_type)
            return _hash(about, _fit_identity(config, reads, materials))


def mlp_of(hookpoint: str, model_type: str) -> tuple[str, str]:
    """Where the hidden neurons of a layer's MLP are read, and where they write.

    Args:
        hookpoint: Any of the layer's; in a model of a type without names here, the input of the
            down projection, e.g. ``layers.9.mlp.down_proj.input``.
        model_type: As in the model's ``config.json``.

    Raises:
        CoderError: If the hookpoint is of no layer, or of a model without names and no input.
    """
    layer = _LAYER.search(hookpoint)
    if layer is None:
        raise CoderError(
            f"neurons coder at {hookpoint}: no number of a layer in it. Write a layer with an MLP, "
            "e.g. 'layers.9'."
        )
    mlp = f"blocks.{layer[1]}.mlp"
    try:
        return translate(f"{mlp}.hook_post", model_type), translate(f"{mlp}.hook_out", model_type)
    except ModelError as error:
        if hookpoint.endswith(".input"):
            return hookpoint, hookpoint.removesuffix(".input").rpartition(".")[0]
        raise CoderError(
            f"neurons coder at {hookpoint}: where the MLPs of models of type {model_type!r} are is "
            "not known here. Write the input of the down projection as the layer, e.g. "
            "'layers.9.mlp.down_proj.input'."
        ) from error


class _Made(NamedTuple):
    """A baseline without its name."""

    placed: PlacedCoder
    about: str
    k: int
    """Latents that fire on a token, at most."""


def _made(config: BaselineCoderConfig, hookpoint: str, materials: Materials) -> _Made:
    match config:
        case NeuronsCoderConfig():
            return _neurons(config, hookpoint, materials.subject_model)
        case RandomCoderConfig():
            return _random(config, hookpoint, materials)
        case PCACoderConfig():
            return _pca(config, hookpoint, materials)


def _neurons(config: NeuronsCoderConfig, hookpoint: str, model: SubjectModel) -> _Made:
    reads, writes = mlp_of(hookpoint, model.model_type)
    rows, bias = _down_projection(model.base_model, reads)
    neurons = NeuronCoder(rows, bias, config.k, config.by)
    about = f"the {config.k} largest of {len(rows)} neurons by {config.by}, {reads}"
    if config.rotation_seed is None:
        return _Made(PlacedCoder(neurons, reads, writes), about, config.k)
    coder = rotated_neurons(neurons, _rotation(config.rotation_seed, reads, len(rows)))
    about = f"{about}, rotated with seed {config.rotation_seed}"
    return _Made(PlacedCoder(coder, reads, writes), about, config.k)


def _down_projection(base_model: nn.Module, reads: str) -> tuple[Tensor, Tensor]:
    """What each neuron adds to the MLP's output, and what is added beside; on the CPU."""
    path, _ = parse_hookpoint(base_model, reads)
    module = base_model.get_submodule(path)
    weight = getattr(module, "weight", None)
    is_linear = isinstance(module, nn.Linear | Conv1D)
    if not is_linear or not isinstance(weight, Tensor) or not _is_plain(weight):
        raise ModelError(
            f"neurons coder: {path!r} is a {type(module).__name__}, wanted a linear layer of "
            "floats in memory. Load the subject model whole and without quantisation, or choose "
            "another layer."
        )
    rows = weight.detach() if isinstance(module, Conv1D) else weight.detach().T
    bias = torch.zeros(rows.shape[1]) if module.bias is None else module.bias.detach()
    return rows.cpu().contiguous(), bias.float().cpu()


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and not weight.is_meta


def _rotation(seed: int, reads: str, width: int) -> Tensor:
    def make() -> dict[str, Tensor]:
        logger.info("drawing a rotation of %d neurons", width)
        rng = latent_rng(seed, LayerKey("neurons", reads), None, "rotation")
        return {"rotation": random_rotation(rng, width)}

    return _kept("rotation", _hash(seed, reads, width), make)["rotation"]


def _random(config: RandomCoderConfig, hookpoint: str, materials: Materials) -> _Made:
    like = materials.coder(config.like)
    k = config.k or _k_of(like.expected_l0)
    if k is None:
        raise CoderError(
            f"random coder at {hookpoint}: how many latents of {config.like!r} fire on a token was "
            "not published with it. Write their mean number as k in the study."
        )
    rng = latent_rng(config.seed, LayerKey("random", like.reads), None, "directions")
    coder = random_coder(rng, like.coder.num_latents, like.coder.d_in, k)
    writes = writes_of(like.reads, materials.subject_model.model_type)
    about = f"{coder.num_latents} directions, {k} at once, as many as {config.like!r} has"
    return _Made(PlacedCoder(coder, like.reads, writes), f"{about}, {like.reads}", k)


def _k_of(l0: float | None) -> int | None:
    return None if l0 is None else max(1, round(l0))


def _pca(config: PCACoderConfig, hookpoint: str, materials: Materials) -> _Made:
    model = materials.subject_model
    reads = translate(hookpoint, model.model_type)

    def make() -> Mapping[str, Tensor]:
        logger.info("computing principal components of %d tokens at %s", config.n_tokens, reads)
        moments = _moments(model, materials.dataset(config.n_tokens), reads)
        return moments.components(config.num_components or moments.width)._asdict()

    kept = _kept("principal_components", _fit_identity(config, reads, materials), make)
    coder = pca_coder(PrincipalComponents(**kept), config.k)
    writes = writes_of(reads, model.model_type)
    about = f"{coder.num_latents // 2} principal components of {config.n_tokens} tokens, {reads}"
    return _Made(PlacedCoder(coder, reads, writes), about, config.k)


@torch.inference_mode()
def _moments(model: SubjectModel, dataset: TokenDataset, reads: str) -> Moments:
    """Of what stands at a hookpoint, but on BOS."""
    moments: Moments | None = None
    base_model, first = model.base_model, dataset.first_visible
    for contexts in context_batches(dataset, model.config.batch_size):
        tokens = np.stack([dataset.context_tokens(int(context)) for context in contexts])
        input_ids = torch.from_numpy(tokens).to(model.device, torch.int64)
        with captured(base_model, [reads]) as found:
            base_model(input_ids=input_ids, use_cache=False)
        hidden = found[reads][:, first:].flatten(0, 1)
        if not hidden.isfinite().all():
            raise ModelError(
                f"hookpoint {reads!r}, contexts {contexts[0]} to {contexts[-1]}: NaN or infinity. "
                "Load the subject model with dtype bfloat16 or float32."
            )
        moments = moments or Moments(hidden.shape[1])
        moments.add(hidden)
    assert moments is not None  # a dataset holds a context
    return moments


def _fit_identity(config: PCACoderConfig, reads: str, materials: Materials) -> str:
    size = [config.n_tokens, config.num_components]
    return _hash(size, materials.subject_model.identity(), materials.dataset_identity(), reads)


def _kept(kind: str, identity: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from the cache folder, made first if they are not there.

    Raises:
        CoderError: If the file there is damaged.
    """

    def write(folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, folder / _FILE)

    folder = build_once(cache_folder() / kind / identity[:32], write)
    try:
        with safetensors.safe_open(folder / _FILE, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CoderError(
            f"{folder / _FILE}: unreadable ({error}). Remove the folder, and it is made again."
        ) from error


def _hash(*about: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *about], sort_keys=True).encode()).hexdigest()
