"""Which latents are explained, and how."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from autointerp_dagster.core.config.base import Parameters


class LatentSample(Parameters, frozen=True):
    """A random sample of each layer's latents, alive or not."""

    sample: int = Field(ge=1)
    """Latents per layer."""
    per: Literal["layer"] = "layer"
    """Each layer has a sample of its own."""
    by: Literal["random", "firing_rate"] = "random"
    """``random``: all latents alike; ``firing_rate``: equally many from each quarter of the
    latents that fire at least once, ordered by firing tokens."""
    seed: int = 0


def _kind_of_selection(value: object) -> str:
    if isinstance(value, str):
        return "<all>"
    return "<list>" if isinstance(value, list | tuple) else "<sample>"


LatentSelection = Annotated[
    Annotated[Literal["all"], Tag("<all>")]
    | Annotated[LatentSample, Tag("<sample>")]
    | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Tag("<list>")],
    Discriminator(_kind_of_selection),
]
"""``all``, a sample, or a list of indices used in every layer."""


class TopTokensExplainerConfig(Parameters, frozen=True):
    """No language model: the tokens with the largest summed activation, in a fixed template."""

    kind: Literal["top_tokens"]
    n_tokens: int = Field(default=8, ge=1, le=8)
    """Tokens named in the explanation."""


class DefaultExplainerConfig(Parameters, frozen=True):
    """A chat model reads train windows and writes one sentence."""

    kind: Literal["default"]
    n_examples: int = Field(default=40, ge=1)
    """Train windows shown, strongest quantile first."""
    show_activations: bool = True
    """List up to 10 marked tokens with their displayed activation under each window."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: int = Field(default=200, ge=1)


ExplainerConfig = Annotated[
    TopTokensExplainerConfig | DefaultExplainerConfig, Field(discriminator="kind")
]
