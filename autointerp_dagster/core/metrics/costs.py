"""What the answers behind a study's metrics cost, by the stage that asked."""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from autointerp_dagster.core.llm import Usage
from autointerp_dagster.core.schemas import STUDY_METRICS


@dataclass(frozen=True, slots=True)
class StageCost:
    """The answers that one stage used, whichever run paid for them."""

    usage: Usage
    n_latents: int
    """Latents asked about."""


def cost_rows(costs: Mapping[str, StageCost]) -> pl.DataFrame:
    """Rows of ``STUDY_METRICS`` with comparison ``cost``; a is the stage, b is null.

    Statistics: ``prompt_tokens``, of which ``cached_tokens``, ``completion_tokens``, of all these
    ``estimated_tokens``, ``usd``, and ``usd_per_latent`` (null without latents). ``n`` counts the
    latents. There is no interval.

    Args:
        costs: By the name of the stage.
    """
    rows = []
    for stage, cost in costs.items():
        usage, n = cost.usage, cost.n_latents
        values: dict[str, float | None] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "estimated_tokens": usage.estimated_tokens,
            "usd": usage.usd,
            "usd_per_latent": usage.usd / n if n else None,
        }
        rows += [
            {"comparison": "cost", "a": stage, "statistic": name, "value": value, "n": n}
            for name, value in values.items()
        ]
    return STUDY_METRICS.conform(pl.DataFrame(rows, schema=dict(STUDY_METRICS.columns)))
