"""The parameters of a study, composed of those that ``core/config`` declares."""

import re
from itertools import product
from typing import Any

from pydantic import Field, model_validator

from autointerp_dagster.core.config import (
    CoderConfig,
    CorpusConfig,
    ExplainerConfig,
    FloorsConfig,
    LatentSelection,
    MetricsConfig,
    ModelsConfig,
    Parameters,
    RemoteLLMConfig,
    SamplingConfig,
    ScorersConfig,
    TokenConfig,
)
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey

MAX_KEYS = 99
"""Dagster stops tracking versions of edges of 100 and more partitions."""


class BudgetConfig(Parameters, frozen=True):
    """What may be spent on remote language models; null: no limit.

    Checked before each call, which is not made if it could exceed the limit.
    """

    usd: float | None = Field(default=None, ge=0)
    """Of one run. Needs the prices of every remote model."""
    tokens: int | None = Field(default=None, ge=0)
    """Of one run, prompt and completion tokens together."""
    study_usd: float | None = Field(default=None, ge=0)
    """Of all runs of the study together."""
    study_tokens: int | None = Field(default=None, ge=0)
    """Of all runs of the study together."""
    hours: float | None = Field(default=None, gt=0)
    """How long one asset may go on asking; then it stops cleanly, as for a budget."""


class Study(Parameters, frozen=True):
    """Everything that decides the tables of one study."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Key prefix and group of its assets; the file's stem by default."""
    models: ModelsConfig
    corpus: CorpusConfig
    tokens: TokenConfig = TokenConfig()
    coders: dict[str, CoderConfig] = Field(min_length=1)
    """Sparse coders by name."""
    layers: tuple[str, ...] = Field(min_length=1)
    """Hookpoints, taken for every coder, or ``<coder>@<hookpoint>`` for one of them."""
    max_num_latents: int = Field(ge=1)
    """Width of the widest coder; the range dimension spans it."""
    range_size: int = Field(default=4096, ge=1)
    """Latents per cell."""
    latents: LatentSelection = "all"
    """Which latents are explained."""
    sampling: SamplingConfig = SamplingConfig()
    explainers: dict[str, ExplainerConfig] = Field(min_length=1)
    """Explainers by name."""
    scorers: ScorersConfig = ScorersConfig()
    floors: FloorsConfig = FloorsConfig()
    metrics: MetricsConfig = MetricsConfig()
    budget: BudgetConfig = BudgetConfig()
    store: str = "store"
    """Folder or URL of the results; a relative folder counts from the working directory."""

    @property
    def layer_keys(self) -> tuple[LayerKey, ...]:
        """The layers, in the file's order."""
        keys = [
            LayerKey.parse(layer) if "@" in layer else LayerKey(coder, layer)
            for layer in self.layers
            for coder in ([""] if "@" in layer else self.coders)
        ]
        return tuple(dict.fromkeys(keys))

    @property
    def ranges(self) -> tuple[LatentRange, ...]:
        """The ranges that span the widest coder; the last may be shorter."""
        width = self.max_num_latents
        starts = range(0, width, self.range_size)
        return tuple(LatentRange(start, min(start + self.range_size, width)) for start in starts)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every layer with every range."""
        return tuple(Cell(layer, block) for layer, block in product(self.layer_keys, self.ranges))

    @property
    def latents_identity(self) -> Any:
        """:attr:`latents` as JSON, for fingerprints."""
        return self.latents.identity() if isinstance(self.latents, Parameters) else self.latents

    @model_validator(mode="after")
    def _check_layers(self) -> "Study":
        for layer in self.layer_keys:
            if layer.coder not in self.coders:
                raise ValueError(
                    f"layers: {layer} names coder {layer.coder!r}; declared are "
                    f"{sorted(self.coders)}."
                )
        if len(self.layer_keys) > MAX_KEYS:
            raise ValueError(f"layers: {len(self.layer_keys)} in all, wanted at most {MAX_KEYS}.")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "Study":
        for what, names in (("coders", self.coders), ("explainers", self.explainers)):
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                    raise ValueError(
                        f"{what}: name {name!r}: wanted letters, digits, '_' and '-' only."
                    )
        for layer in self.layer_keys:
            if not re.fullmatch(r"\w+(\.\w+)*", layer.hookpoint):
                raise ValueError(
                    f"layers: hookpoint {layer.hookpoint!r}: wanted a dotted module path, e.g. "
                    "'layers.9.mlp'."
                )
        return self

    @model_validator(mode="after")
    def _check_prices(self) -> "Study":
        models = {"explainer": self.models.explainer, "judge": self.models.judge}
        limits = ("usd", "study_usd")
        limit = next((n for n in limits if getattr(self.budget, n) is not None), None)
        for part, config in models.items():
            is_free = isinstance(config, RemoteLLMConfig) and not config.has_price
            if limit is not None and is_free:
                raise ValueError(
                    f"budget.{limit}: models.{part} has no price, so the budget could never be "
                    "reached. Add usd_per_1m_prompt and usd_per_1m_completion, or use "
                    "budget.tokens."
                )
        return self

    @model_validator(mode="after")
    def _check_ranges(self) -> "Study":
        if len(self.ranges) > MAX_KEYS:
            smallest = -(-self.max_num_latents // MAX_KEYS)
            raise ValueError(
                f"range_size: {self.range_size} cuts {self.max_num_latents} latents into "
                f"{len(self.ranges)} ranges, wanted at most {MAX_KEYS}. Use {smallest} or more."
            )
        whole_layer = len(self.ranges) == 1
        if self.floors.sample and not whole_layer and self.range_size % self.floors.donor_block:
            raise ValueError(
                f"range_size: {self.range_size} is no multiple of floors.donor_block "
                f"{self.floors.donor_block}. Set floors.donor_block to a divisor of it."
            )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> "Study":
        if self.tokens.context_len % self.sampling.window_len:
            raise ValueError(
                f"sampling.window_len: {self.sampling.window_len} does not divide "
                f"tokens.context_len {self.tokens.context_len}."
            )
        if self.scorers.embedding is not None and self.models.embedder is None:
            raise ValueError(
                "scorers.embedding: needs models.embedder, e.g. "
                "{source: 'embedded:all-minilm-l6-v2', query_prefix: ''}."
            )
        return self
