"""Interventions: a latent's prompts, the strength of steering along it, and what was then written.

Source:
    arXiv 2410.13928, section 3.3.
"""

from autointerp_dagster.core.interventions.directions import (
    ablated,
    activations_of,
    directions_of,
)
from autointerp_dagster.core.interventions.experiment import (
    Outcome,
    Rises,
    SteeredPrompts,
    Writer,
    has_enough,
    intervene,
    untried,
)
from autointerp_dagster.core.interventions.prompts import prompts_of
from autointerp_dagster.core.interventions.record import (
    Intervention,
    SteeredPrompt,
    interventions_of,
)
from autointerp_dagster.core.interventions.strength import (
    Divergence,
    Strength,
    divergence_between,
    find_strengths,
)

__all__ = [
    "Divergence",
    "Intervention",
    "Outcome",
    "Rises",
    "SteeredPrompt",
    "SteeredPrompts",
    "Strength",
    "Writer",
    "ablated",
    "activations_of",
    "directions_of",
    "divergence_between",
    "find_strengths",
    "has_enough",
    "intervene",
    "interventions_of",
    "prompts_of",
    "untried",
]
