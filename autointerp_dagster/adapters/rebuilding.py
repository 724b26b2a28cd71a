"""How well sparse autoencoders rebuild what they read, on a few contexts of the token dataset."""

from collections.abc import Mapping

import numpy as np
import torch

from autointerp_dagster.adapters.coder_files import check_width
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.hooks import captured
from autointerp_dagster.core.sparse_coders import PlacedCoder, Unexplained
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey

_CONTEXTS = 8
_SHARE = 100
"""One context in so many, at most: beside the pass over all of them it costs nothing."""
_TOKENS = 1024
"""Vectors that are encoded, about."""


@torch.inference_mode()
def fractions_unexplained(
    model: SubjectModel, dataset: TokenDataset, coders: Mapping[LayerKey, PlacedCoder]
) -> dict[LayerKey, float]:
    """Fraction of variance unexplained of each coder that writes where it reads.

    Transcoders are left out: they give another vector than they read. Contexts stand at equal
    distances in the dataset, so the same ones are taken whatever runs.

    Args:
        model: Runs one context at a time.
        dataset: Tokens of this subject model's tokenizer.
        coders: On the CPU; on a GPU one at a time is copied there.

    Raises:
        ModelError: If a hookpoint is unknown.
        CoderError: If a coder's width is not that of its hookpoint.
    """
    rebuilding = {k: placed for k, placed in coders.items() if placed.reads == placed.writes}
    hidden = _hidden(model, dataset, {placed.reads for placed in rebuilding.values()})
    found: dict[LayerKey, float] = {}
    for layer, placed in rebuilding.items():
        x = hidden[placed.reads]
        check_width(placed, model, layer)
        coder, unexplained = placed.coder.to(x.device), Unexplained()
        unexplained.add(x.cpu(), coder.decode(coder.encode(x), x).cpu())
        fraction = unexplained.fraction
        if fraction is not None:
            found[layer] = fraction
    return found


def _hidden(
    model: SubjectModel, dataset: TokenDataset, hookpoints: set[str]
) -> dict[str, torch.Tensor]:
    """What stands at some tokens of some contexts, never at BOS."""
    lengths, first = np.diff(dataset.offsets), dataset.first_visible
    able = np.flatnonzero(lengths > first)
    n = min(_CONTEXTS, max(1, able.size // _SHARE), able.size)
    chosen = able[np.linspace(0, able.size - 1, n).astype(np.int64)] if n else able
    step = max(1, int((lengths[chosen] - first).sum()) // _TOKENS)
    parts: dict[str, list[torch.Tensor]] = {hookpoint: [] for hookpoint in hookpoints}
    for context in chosen.tolist() if hookpoints else ():
        tokens = torch.from_numpy(dataset.context_tokens(context).astype(np.int64))
        with captured(model.base_model, hookpoints) as found:
            model.base_model(input_ids=tokens[None].to(model.device), use_cache=False)
        for hookpoint, vectors in found.items():
            parts[hookpoint].append(vectors[0, first::step].to(model.device))
    return {hookpoint: torch.cat(of) for hookpoint, of in parts.items() if of}
