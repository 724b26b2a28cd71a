"""Which latents are explained, and how."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from autointerp_dagster.core.config.base import Parameters

LEAST_FOR_STEPS = 300
"""``max_tokens`` below which four steps and a description do not fit."""


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


def kind_of_selection(value: object) -> str:
    """How a selection of latents is written: ``all``, a list of indices, or a sample."""
    if isinstance(value, str):
        return "<all>"
    return "<list>" if isinstance(value, list | tuple) else "<sample>"


LatentSelection = Annotated[
    Annotated[Literal["all"], Tag("<all>")]
    | Annotated[LatentSample, Tag("<sample>")]
    | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Tag("<list>")],
    Discriminator(kind_of_selection),
]
"""``all``, a sample, or a list of indices used in every layer."""


class TopTokensExplainerConfig(Parameters, frozen=True):
    """No language model: the tokens with the largest summed activation, in a fixed template."""

    kind: Literal["top_tokens"]
    n_tokens: int = Field(default=8, ge=1, le=8)
    """Tokens named in the explanation."""


class _ChatExplainerConfig(Parameters, frozen=True):
    """What every question for an explanation has."""

    show_activations: bool = True
    """List up to 10 marked tokens with their displayed activation under each window."""
    max_tokens: int = Field(default=200, ge=1)


class DefaultExplainerConfig(_ChatExplainerConfig, frozen=True):
    """A chat model reads train windows and writes one sentence."""

    kind: Literal["default"]
    n_examples: int = Field(default=40, ge=1)
    """Train windows shown, spread over all quantiles, the strongest first."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    chain_of_thought: bool = False
    """Let the model list marked words and shared traits first. Needs a model behind a server, and
    ``max_tokens`` of 400 or more."""
    show_promoted: bool = False
    """Show the tokens that the latent's decoder row promotes, too."""

    @field_validator("chain_of_thought")
    @classmethod
    def _check_room(cls, chain_of_thought: bool, info: Any) -> bool:
        max_tokens = info.data.get("max_tokens", LEAST_FOR_STEPS)
        if chain_of_thought and max_tokens < LEAST_FOR_STEPS:
            raise ValueError(
                f"max_tokens is {max_tokens}, wanted {LEAST_FOR_STEPS} or more for the steps and "
                "the description. Set max_tokens: 400"
            )
        return chain_of_thought


class ContrastiveExplainerConfig(_ChatExplainerConfig, frozen=True):
    """As ``default``, with windows in which the latent is silent, that must not be covered."""

    kind: Literal["contrastive"]
    n_examples: int = Field(default=15, ge=1)
    """Activating train windows, spread over all quantiles."""
    n_silent: int = Field(default=5, ge=1)
    """Non-activating train windows."""
    temperature: float = Field(default=0.0, ge=0, le=2)


class SingleTokenExplainerConfig(_ChatExplainerConfig, frozen=True):
    """Where one token carries the latent a template says so; else as ``default``."""

    kind: Literal["single_token"]
    min_share: float = Field(default=0.9, gt=0, le=1)
    """Of the summed activation over train windows that the token must have."""
    n_examples: int = Field(default=40, ge=1)
    """Train windows shown where a model is asked."""
    temperature: float = Field(default=0.0, ge=0, le=2)


class OutputExplainerConfig(Parameters, frozen=True):
    """A base model names what the latent makes more likely (method: intervention)."""

    kind: Literal["output"]
    kl: float | None = Field(default=None, gt=0)
    """Strength of the intervention shown, one of ``interventions.kl``; null: the first."""
    n_tokens: int = Field(default=5, ge=1, le=10)
    """Tokens shown per prompt, those whose probability rose most."""
    n_samples: int = Field(default=5, ge=1)
    """Answers kept; the first that says something stands for the explainer."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    max_tokens: int = Field(default=20, ge=1)
    seed: int = 0


class _SelectingExplainerConfig(_ChatExplainerConfig, frozen=True):
    """Explanations tried on the windows of the ``select`` split by the judge."""

    n_examples: int = Field(default=40, ge=1)
    """Train windows shown, as in ``default``."""
    windows_per_prompt: int = Field(default=5, ge=1)
    """Of detection and fuzzing on ``select``."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    seed: int = 0


class BestOfNExplainerConfig(_SelectingExplainerConfig, frozen=True):
    """The best of several answers, by detection and fuzzing on ``select``."""

    kind: Literal["best_of_n"]
    n: int = Field(default=5, ge=2)
    """Answers to choose from."""
    temperature: float = Field(default=0.7, gt=0, le=2)
    """Above 0, where all answers would be one."""


class RefineExplainerConfig(_SelectingExplainerConfig, frozen=True):
    """An explanation improved by being shown what it gets wrong on ``select``."""

    kind: Literal["refine"]
    n_loops: int = Field(default=2, ge=1)
    """Times that a better explanation is asked for."""
    n_mistakes: int = Field(default=20, ge=1)
    """False positives, and false negatives, shown at most."""


ExplainerConfig = Annotated[
    TopTokensExplainerConfig
    | DefaultExplainerConfig
    | ContrastiveExplainerConfig
    | SingleTokenExplainerConfig
    | OutputExplainerConfig
    | BestOfNExplainerConfig
    | RefineExplainerConfig,
    Field(discriminator="kind"),
]
