"""The activation cache as it is written first: dense tensors, kept whole, split at the end.

Per batch the whole model runs; each hookpoint's vectors become a dense [context, position, latent]
tensor; what is above 1e-5 is looked for twice, for its places and for its values; how often each
latent fires is a sum over the dense tensor. Batches are kept in lists and joined at the end. Then
each range of latents is picked out with a mask and saved: places in the smallest unsigned type that
holds them, values in float16.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

THRESHOLD = 1e-5

Encode = Callable[[Tensor], Tensor]
"""From [context, position, d_in] to the dense activations."""


class PlainCache(NamedTuple):
    """Every non-zero of every hookpoint, in memory."""

    places: dict[str, Tensor]
    """[non-zero, (context, position, latent)], int64."""
    values: dict[str, Tensor]
    n_tokens: dict[str, Tensor]
    """How often each latent fires."""


class Split(NamedTuple):
    """What one file holds."""

    context: np.ndarray
    position: np.ndarray
    latent: np.ndarray
    value: np.ndarray


def dense_topk(weight: Tensor, bias: Tensor, centre: Tensor, k: int) -> Encode:
    """Linear, ReLU, the k largest, and these scattered into zeros."""

    def encode(hidden: Tensor) -> Tensor:
        found = nn.functional.linear(hidden - centre, weight, bias).relu()
        largest = found.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(found).scatter_(-1, largest.indices, largest.values)

    return encode


def dense_jump_relu(weight: Tensor, bias: Tensor, threshold: Tensor) -> Encode:
    """Linear, times whether it is above the threshold."""

    def encode(hidden: Tensor) -> Tensor:
        found = nn.functional.linear(hidden, weight, bias)
        return found * (found > threshold)

    return encode


def plain_cache(
    base_model: nn.Module, encoders: Mapping[str, Encode], tokens: Tensor, batch_size: int
) -> PlainCache:
    """Everything that fires.

    Args:
        base_model: Run whole on each batch.
        encoders: By hookpoint.
        tokens: [context, position].
        batch_size: Contexts at once.
    """
    places: dict[str, list[Tensor]] = {name: [] for name in encoders}
    values: dict[str, list[Tensor]] = {name: [] for name in encoders}
    n_tokens: dict[str, Tensor] = {}
    for start in range(0, len(tokens), batch_size):
        hidden = _hidden(base_model, list(encoders), tokens[start : start + batch_size])
        for name, encode in encoders.items():
            with torch.inference_mode():
                dense = encode(hidden[name])
            found = torch.nonzero(dense.abs() > THRESHOLD)
            found[:, 0] += start
            places[name].append(found)
            values[name].append(dense[dense.abs() > THRESHOLD])
            fired = (dense > 0).sum((0, 1))
            n_tokens[name] = n_tokens[name] + fired if name in n_tokens else fired
    return PlainCache(
        {name: torch.cat(parts) for name, parts in places.items()},
        {name: torch.cat(parts) for name, parts in values.items()},
        n_tokens,
    )


def save_splits(cache: PlainCache, starts: range, folder: Path) -> None:
    """One file per hookpoint and range of latents."""
    for name, places in cache.places.items():
        latent = places[:, 2]
        for start in starts:
            mask = (latent >= start) & (latent < start + starts.step)
            mine = places[mask].numpy()
            mine[:, 2] -= start
            small = np.uint16 if mine.size == 0 or mine.max() < 1 << 16 else np.uint32
            columns = {
                "locations": mine.astype(small),
                "activations": cache.values[name][mask].half().numpy(),
            }
            save_file(columns, _file(folder, name, start))


def read_splits(starts: range, folder: Path, name: str) -> Split:
    """All non-zeros of a hookpoint, for comparison."""
    parts: list[Split] = []
    for start in starts:
        columns = load_file(_file(folder, name, start))
        context, position, latent = columns["locations"].astype(np.int64).T
        value = columns["activations"].astype(np.float32)
        parts.append(Split(context, position, latent + start, value))
    return Split(*(np.concatenate(of) for of in zip(*parts, strict=True)))


def _hidden(base_model: nn.Module, hookpoints: list[str], tokens: Tensor) -> dict[str, Tensor]:
    hidden: dict[str, Tensor] = {}
    handles = []
    for name in hookpoints:

        def keep(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
            del module, inputs
            hidden[name] = output

        handles.append(base_model.get_submodule(name).register_forward_hook(keep))
    with torch.inference_mode():
        base_model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return hidden


def _file(folder: Path, name: str, start: int) -> Path:
    return folder / f"{name}_{start}.safetensors"
