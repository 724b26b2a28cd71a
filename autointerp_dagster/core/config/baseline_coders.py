"""Coders that nobody trained, which a study compares trained ones with."""

from typing import Literal

from pydantic import Field

from autointerp_dagster.core.config.computing import ComputingConfig


class NeuronsCoderConfig(ComputingConfig, frozen=True):
    """The hidden neurons of a layer's MLP: what goes into its down projection.

    A layer of the study names the MLP by any hookpoint of its layer, e.g. ``layers.9``.
    """

    format: Literal["neurons"]
    k: int = Field(default=32, ge=1)
    """Neurons that may fire on one token; the paper takes 32 and 256."""
    by: Literal["value", "magnitude"] = "value"
    """The k largest are the k largest signed values, of which those above zero fire; or the k
    largest sizes: then a neuron is two latents, ``2 i`` positive and ``2 i + 1`` negative."""
    rotation_seed: int | None = Field(default=None, ge=0)
    """Seed of a random rotation, in whose axes the neurons are read; null: not rotated."""


class RandomCoderConfig(ComputingConfig, frozen=True):
    """Random directions, as many as another coder of the study has latents."""

    format: Literal["random"]
    like: str
    """Name of the coder that it is compared with: it gives the place and the number of latents."""
    k: int | None = Field(default=None, ge=1)
    """Latents that may fire on one token; null: as many as fire on average in the coder that it is
    compared with, as published."""
    seed: int = Field(default=0, ge=0)
    """Of the directions."""


class PCACoderConfig(ComputingConfig, frozen=True):
    """Principal components of what stands at the hookpoint, over the first tokens of the corpus.

    A component is two latents, ``2 i`` positive and ``2 i + 1`` negative.
    """

    format: Literal["pca"]
    k: int = Field(default=32, ge=1)
    """Components that may fire on one token."""
    num_components: int | None = Field(default=None, ge=1)
    """Those of the largest variance; null: as many as the hookpoint is wide."""
    n_tokens: int = Field(default=200_000, ge=2)
    """Tokens that they are computed from, BOS not counted."""


BaselineCoderConfig = NeuronsCoderConfig | RandomCoderConfig | PCACoderConfig
