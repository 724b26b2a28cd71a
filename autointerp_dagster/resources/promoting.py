"""Which tokens the decoder rows of latents promote and suppress, by the subject model's head."""

import logging

import torch

from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.logit_lens import centred, promoted_and_suppressed
from autointerp_dagster.core.sparse_coders import SparseCoder
from autointerp_dagster.core.sparse_coders.host import has_fast_bfloat16
from autointerp_dagster.core.types import LayerKey

N_TOKENS = 8
"""Promoted and suppressed tokens of each latent."""

_LATENTS_AT_ONCE = 4096
"""Decoder rows in memory: 64 MiB at a width of 4096."""

logger = logging.getLogger(__name__)


def promoted_by_decoder(
    model: SubjectModel, coder: SparseCoder, layer: LayerKey, latents: range
) -> tuple[list[list[int]], list[list[int]]] | None:
    """The tokens that each latent promotes and suppresses, as ids, strongest first.

    Reads the decoder rows of these latents only, and the output head of the model (which loads the
    model). What the last layers would make of a direction is left out: see
    :mod:`core.logit_lens`.

    Args:
        model: The subject model.
        coder: Its decoder's rows are taken for directions in the residual stream where they are as
            wide as it is. A module of that width that does not write into the stream cannot be told
            from one that does.
        layer: Named in the log.
        latents: Of the coder.

    Returns:
        Per latent ``N_TOKENS`` promoted ids and as many suppressed ones (fewer in a tiny
        vocabulary); none for a latent whose row is zero or, before a layer norm, constant. Null if
        the widths differ: such a decoder writes elsewhere.

    Raises:
        ModelError: If the model has no output head.
    """
    if not latents:
        return [], []
    lens = model.unembedding()
    width = coder.decoder_rows(latents[:1]).shape[1]
    if width != lens.weight.shape[1]:
        logger.info(
            "%s: decoder rows are %d wide and the residual stream %d, so no promoted tokens.",
            layer, width, lens.weight.shape[1],
        )  # fmt: skip
        return None
    n = min(N_TOKENS, lens.weight.shape[0])
    is_fast = lens.weight.device.type == "cuda" or has_fast_bfloat16()
    rough = torch.bfloat16 if is_fast else torch.float32
    promoted: list[list[int]] = []
    suppressed: list[list[int]] = []
    for first in range(0, len(latents), _LATENTS_AT_ONCE):
        rows = coder.decoder_rows(latents[first : first + _LATENTS_AT_ONCE])
        if lens.centres:
            rows = centred(rows)
        has_direction = rows.ne(0).any(dim=1).tolist()
        found = promoted_and_suppressed(rows, lens.weight, lens.norm_weight, n, rough)
        for tokens, kept in zip(found, (promoted, suppressed), strict=True):
            pairs = zip(tokens.tolist(), has_direction, strict=True)
            kept.extend(ids if is_direction else [] for ids, is_direction in pairs)
    return promoted, suppressed
