"""Which windows of a latent are seen by whom."""

from typing import Literal

from pydantic import Field, model_validator

from autointerp_dagster.core.config.base import Parameters
from autointerp_dagster.core.schemas import NegativeKind, NeighbourMeasure

_MOST = 65_535  # what the column rank of a latent's windows holds


class SamplingConfig(Parameters, frozen=True):
    """How a latent's windows are cut, split and drawn (method: latent records)."""

    window_len: int = Field(default=32, ge=4)
    """Tokens per window; divides the context length."""
    window_mode: Literal["fixed", "centred"] = "fixed"
    """``fixed``: contexts cut into aligned windows; ``centred``: activating windows are cut so that
    their maximum stands at three quarters of them (at a context's edge as near as can be)."""
    n_train: int = Field(default=40, ge=1, le=_MOST)
    """Activating windows that the explainer may see."""
    n_select: int = Field(default=20, ge=0, le=_MOST)
    """Activating windows to choose between explanations with."""
    n_test: int = Field(default=100, ge=1, le=_MOST)
    """Activating windows that the judge sees."""
    n_negative_train: int = Field(default=20, ge=0, le=_MOST)
    n_negative_select: int = Field(default=20, ge=0, le=_MOST)
    n_negative_test: int = Field(default=100, ge=1, le=_MOST)
    """Non-activating windows, by split; all kinds together, as many of each."""
    n_quantiles: int = Field(default=10, ge=1, le=100)
    """Bands of equal count by window maximum; 0 is the strongest."""
    strategy: Literal["quantiles", "random", "top", "mix"] = "quantiles"
    """How activating windows are drawn; ``mix`` takes 20 % from the top."""
    negative_kinds: tuple[NegativeKind, ...] = Field(default=("random",), min_length=1)
    """How non-activating windows are chosen. ``random``: any; ``neighbour``: a neighbouring latent
    fires there (see ``neighbours``); ``similar``: their text is nearest to an activating window's
    (needs ``models.embedder``); ``same_token``: they hold the token the latent fires on most. Where
    there are too few of a kind fewer are used: no other kind makes them up."""
    silent_scope: Literal["window", "context"] = "window"
    """Where a latent must be silent for a window to count as non-activating."""
    min_tokens: int = Field(default=200, ge=0)
    """Firing tokens below which a latent is rare (the paper's cut)."""
    min_test_windows: int = Field(default=20, ge=1)
    """Activating test windows below which a latent is rare."""
    max_window_firing_rate: float = Field(default=0.9, gt=0, le=1)
    """Share of windows above which a latent is dense."""
    near_duplicate_jaccard: float | None = Field(default=0.8, gt=0, le=1)
    """A select or test window this similar (token 8-grams) to a chosen train window is dropped, and
    a non-activating one to an activating one of its split; null: only non-activating windows with
    the very text of an activating one are."""
    max_windows: int = Field(default=10_000, ge=1000)
    """Of a latent that fires in more windows, about so many are drawn from: a sample by hashed
    priority, and for ``top`` and ``mix`` the strongest ones. Counts and quantiles stay those of all
    its windows."""
    split_block: int = Field(default=16, ge=1)
    """Documents longer than this many contexts are split by blocks of it."""
    train_share: float = Field(default=0.4, gt=0, lt=1)
    select_share: float = Field(default=0.1, ge=0, lt=1)
    """The rest is test."""
    seed: int = 0
    """Part of the address of every draw."""

    @model_validator(mode="after")
    def _name_a_kind_once(self) -> "SamplingConfig":
        if len(set(self.negative_kinds)) < len(self.negative_kinds):
            raise ValueError(f"negative_kinds: {list(self.negative_kinds)} names a kind twice.")
        return self

    @model_validator(mode="after")
    def _draw_some_of_each_kind(self) -> "SamplingConfig":
        n_kinds = len(self.negative_kinds)
        for name in ("n_negative_train", "n_negative_select", "n_negative_test"):
            if 0 < (n := getattr(self, name)) < n_kinds:
                raise ValueError(
                    f"{name}: {n} for {n_kinds} negative_kinds, so some would get none. Ask for "
                    f"at least {n_kinds}" + ("." if name == "n_negative_test" else ", or for 0.")
                )
        return self

    @model_validator(mode="after")
    def _draw_from_enough(self) -> "SamplingConfig":
        n_drawn = self.n_train + self.n_select + self.n_test
        if self.max_windows < n_drawn:
            raise ValueError(
                f"max_windows: {self.max_windows} to draw n_train + n_select + n_test = {n_drawn} "
                "from. Set it to more, best ten times as many."
            )
        return self

    @model_validator(mode="after")
    def _leave_room_for_test(self) -> "SamplingConfig":
        if self.train_share + self.select_share >= 1:
            raise ValueError(
                f"train_share {self.train_share} + select_share {self.select_share}: "
                "wanted a sum below 1, so that documents are left for test."
            )
        return self


class NeighboursConfig(Parameters, frozen=True):
    """Which latents of a layer are near each other (method: neighbours)."""

    measures: tuple[NeighbourMeasure, ...] = Field(default=("cofiring",), min_length=1)
    """What is computed; negatives of kind ``neighbour`` take their neighbours from the first."""
    n_neighbours: int = Field(default=10, ge=1, le=250)
    """Neighbours kept of each latent and measure, the nearest first."""
    max_tokens: int = Field(default=4_000_000, ge=1)
    """Tokens on which co-firing is counted: of a larger dataset, contexts drawn by hashed
    priority, so that memory does not grow with it."""
    n_windows: int = Field(default=64, ge=1)
    """Windows kept of each neighbour, to draw negatives from."""

    @model_validator(mode="after")
    def _name_a_measure_once(self) -> "NeighboursConfig":
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"measures: {list(self.measures)} names a measure twice.")
        return self


class WindowEmbeddingsConfig(Parameters, frozen=True):
    """Which windows negatives of kind ``similar`` are searched in."""

    max_windows: int | None = Field(default=None, ge=1)
    """Windows that are embedded, drawn by hashed priority; null: all of the corpus."""
