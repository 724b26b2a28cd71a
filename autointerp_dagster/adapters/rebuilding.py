"""How often coders from files fire and how well they rebuild, on a sample of the token dataset."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float

from autointerp_dagster.adapters.coder_files import check_width
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.checks import Rebuilt
from autointerp_dagster.core.hooks import captured
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.sparse_coders import PlacedCoder, Unexplained
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey

_TOKENS = 1024
"""Vectors that are encoded, at most: beside the pass over all tokens they cost nothing."""
_CONTEXTS = range(8, 65)
"""At least so many contexts are run where there are so many, and no more."""
_FEW_TOKENS = 256
"""With fewer the fraction of variance unexplained is not told."""
_OUTLIER = 10.0
"""Of the median norm: models park attention on a token or two of such norm, which coders were often
not trained on, and one of which would outweigh all others in a sum of squares."""


@torch.inference_mode()
def rebuilt_by(
    model: SubjectModel, dataset: TokenDataset, coders: Mapping[LayerKey, PlacedCoder]
) -> dict[LayerKey, Rebuilt]:
    """What each coder makes of a sample of what it reads, where nothing is known of its files.

    Contexts stand at equal distances in the dataset and tokens are drawn by their context, so the
    same ones are taken whatever runs.

    Args:
        model: Runs one context at a time.
        dataset: Tokens of this subject model's tokenizer.
        coders: On the CPU; on a GPU one at a time is copied there.

    Raises:
        ModelError: If a hookpoint is unknown.
        CoderError: If a coder's width is not that of its hookpoint.
    """
    hidden = _hidden(model, dataset, {placed.reads for placed in coders.values()})
    found: dict[LayerKey, Rebuilt] = {}
    for layer, placed in coders.items():
        check_width(placed, model, layer)
        if placed.reads in hidden:
            found[layer] = _rebuilt(placed, hidden[placed.reads])
    return found


def _rebuilt(placed: PlacedCoder, vectors: Float[torch.Tensor, "token d_in"]) -> Rebuilt:
    norms = vectors.float().norm(dim=1)
    x = vectors[norms <= _OUTLIER * norms.median()]
    coder, unexplained = placed.coder.to(x.device), Unexplained()
    encoded = coder.encode(x)
    if placed.reads == placed.writes and len(x) >= _FEW_TOKENS:
        unexplained.add(x.cpu(), coder.decode(encoded, x).cpu())
    return Rebuilt(
        l0=len(encoded.token) / len(x),
        fvu=unexplained.fraction,
        n_tokens=len(x),
        n_outliers=len(vectors) - len(x),
    )


def _hidden(
    model: SubjectModel, dataset: TokenDataset, hookpoints: set[str]
) -> dict[str, torch.Tensor]:
    """What stands at some tokens of some contexts, never at BOS."""
    lengths, first = np.diff(dataset.offsets), dataset.first_visible
    able = np.flatnonzero(lengths > first)
    if not able.size or not hookpoints:
        return {}
    wanted = int(np.ceil(_TOKENS / (lengths[able] - first).mean()))
    n = min(able.size, min(max(wanted, _CONTEXTS.start), _CONTEXTS.stop - 1))
    chosen = able[np.linspace(0, able.size - 1, n).astype(np.int64)]
    parts: dict[str, list[torch.Tensor]] = {hookpoint: [] for hookpoint in hookpoints}
    for context in chosen.tolist():
        tokens = torch.from_numpy(dataset.context_tokens(context).astype(np.int64))
        at = _positions(context, first, len(tokens), _TOKENS // n)
        with captured(model.base_model, hookpoints) as found:
            model.base_model(input_ids=tokens[None].to(model.device), use_cache=False)
        for hookpoint, vectors in found.items():
            parts[hookpoint].append(vectors[0].to(model.device)[at])
    return {hookpoint: torch.cat(of) for hookpoint, of in parts.items()}


def _positions(context: int, first: int, length: int, most: int) -> list[int]:
    """Some of a context's visible positions, each as likely as another."""
    rng = latent_rng(0, None, context, "rebuilding")
    n = min(most, length - first)
    return sorted(rng.choice(np.arange(first, length), size=n, replace=False).tolist())
