"""One latent's intervention as objects, for prompts."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from autointerp_dagster.core.schemas import InterventionStatus
from autointerp_dagster.core.types import LatentId


@dataclass(frozen=True, slots=True)
class SteeredPrompt:
    """A beginning of a context, cut after the first token on which the latent fires."""

    window_id: int
    """``context << 16 | position of the last token``."""
    is_for_explainer: bool
    """Else for scoring; no prompt is for both."""
    quintile: int
    """Of the activation on the last token; 0 strongest."""
    activation: float
    """On the last token, raw coder units."""
    prompt: str
    clean: str | None
    """What the model writes next, undisturbed; null for the explainer's prompts."""
    steered: str | None
    """What it writes under the intervention; null for the explainer's prompts."""
    promoted: tuple[str, ...]
    """Next tokens whose probability rose most, descending; empty for scoring prompts."""
    rises: tuple[float, ...]
    """By how much, in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Intervention:
    """All prompts of a latent at one strength."""

    latent: LatentId
    kl_target: float
    """Nats."""
    status: InterventionStatus
    strength: float | None
    """Null: none was found."""
    kl: float | None
    """Realised mean divergence over the scoring prompts, nats."""
    prompts: tuple[SteeredPrompt, ...]
    """By window."""


def interventions_of(
    interventions: pl.DataFrame, prompts: pl.DataFrame
) -> dict[int, tuple[Intervention, ...]]:
    """The interventions of each latent of one layer, by latent index and then by target.

    Args:
        interventions: ``schemas.INTERVENTIONS`` of one layer.
        prompts: ``schemas.INTERVENTION_PROMPTS`` of the same latents.
    """
    shown: dict[tuple[int, float], list[SteeredPrompt]] = {}
    for row in prompts.sort("latent", "kl_target", "window_id").iter_rows(named=True):
        shown.setdefault((row["latent"], row["kl_target"]), []).append(_prompt(row))
    found: dict[int, tuple[Intervention, ...]] = {}
    for row in interventions.sort("latent", "kl_target").iter_rows(named=True):
        index, target = row["latent"], row["kl_target"]
        intervention = Intervention(
            latent=LatentId(row["coder"], row["hookpoint"], index),
            kl_target=target,
            status=row["status"],
            strength=row["strength"],
            kl=row["kl"],
            prompts=tuple(shown.get((index, target), ())),
        )
        found[index] = (*found.get(index, ()), intervention)
    return found


def _prompt(row: dict[str, Any]) -> SteeredPrompt:
    return SteeredPrompt(
        window_id=row["window_id"],
        is_for_explainer=row["is_for_explainer"],
        quintile=row["quintile"],
        activation=row["activation"],
        prompt=row["prompt"],
        clean=row["clean"],
        steered=row["steered"],
        promoted=tuple(row["promoted"] or ()),
        rises=tuple(row["rises"] or ()),
    )
