"""Which tokens decoder rows promote and suppress, against all logits at once and two sorts of them.

The plain version multiplies in float32 and takes the largest and the smallest of all logits of a
row. Ours multiplies roughly (in bfloat16 where the CPU does so in hardware), in blocks, and decides
the order of the few that are left in float64. Both name the same tokens.
"""

import torch
from torch import Tensor

from autointerp_dagster.core.logit_lens import promoted_and_suppressed
from autointerp_dagster.core.sparse_coders.host import has_fast_bfloat16
from benchmarks.measure import Result, by_turns

N_LATENTS, N_TOKENS, D_IN, N = 1024, 50_304, 768, 8
"""A vocabulary as of Pythia, at the width of its 160M parameters."""
BAR, BAR_WITHOUT_BFLOAT16 = 1.1, 0.6
SAME_BAR = 0.999
"""Share of tokens in the same place: sums in float32 may swap two."""


def run() -> list[Result]:
    """CPU seconds as a ratio, and how many tokens are the same."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N_LATENTS, D_IN, generator=generator)
    head = torch.randn(N_TOKENS, D_IN, generator=generator).bfloat16()
    is_fast = has_fast_bfloat16()
    rough = torch.bfloat16 if is_fast else torch.float32

    def ours() -> tuple[Tensor, Tensor]:
        return promoted_and_suppressed(rows, head, None, N, rough)

    def plain() -> tuple[Tensor, Tensor]:
        logits = rows @ head.float().T
        return logits.topk(N).indices, logits.topk(N, largest=False).indices

    pair = by_turns(ours, plain)
    same = (torch.stack(pair.ours) == torch.stack(pair.plain)).float().mean().item()
    bar = BAR if is_fast else BAR_WITHOUT_BFLOAT16
    return [
        Result("logit lens: latents per CPU-second over a plain product", pair.ratio, bar, "x"),
        Result("logit lens: tokens as of the plain product", same, SAME_BAR, "of 1"),
    ]
