"""How explanations are scored, and what the scores are compared with."""

from typing import Literal

from pydantic import Field

from autointerp_dagster.core.config.base import Parameters


class DetectionConfig(Parameters, frozen=True):
    """The judge says which plain windows contain the feature described."""

    windows_per_prompt: int = Field(default=5, ge=1)
    """Windows that the judge labels in one answer; fewer cost more and err less together."""
    n_examples: int | None = Field(default=None, ge=1)
    """Windows of each class per latent; null: all the test windows of the record."""
    top_logprobs: int = Field(default=10, ge=0, le=20)
    """Candidates per token to ask log-probabilities of; 0: none, and then no AUROC."""
    seed: int = 0
    """Part of the address of the order in which windows are shown."""


class FuzzingConfig(Parameters, frozen=True):
    """The judge says in which windows every marked token is an instance of the explanation."""

    windows_per_prompt: int = Field(default=5, ge=1)
    """As in detection."""
    n_examples: int | None = Field(default=None, ge=1)
    """As in detection."""
    top_logprobs: int = Field(default=10, ge=0, le=20)
    """As in detection."""
    variants: tuple[Literal["active"], ...] = ()
    """Further false markings; ``active``: activating windows marked on silent tokens."""
    seed: int = 0
    """Part of the address of the order of windows and of false markings."""


class EmbeddingConfig(Parameters, frozen=True):
    """Windows ranked by the cosine of their embedding with the explanation's."""

    n_examples: int | None = Field(default=None, ge=1)
    """As in detection."""


class ScorersConfig(Parameters, frozen=True):
    """The scorers of a study; one that is absent is not run."""

    detection: DetectionConfig | None = None
    fuzzing: FuzzingConfig | None = None
    embedding: EmbeddingConfig | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the scorers that are run."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


class FloorsConfig(Parameters, frozen=True):
    """What a score is compared with: the same windows under another latent's explanation."""

    sample: int = Field(default=200, ge=0)
    """Explained latents per layer whose floors are measured; 0: none."""
    max_decoder_cosine: float = Field(default=0.3, gt=-1, le=1)
    """The other latent's decoder direction must differ at least this much."""
    donor_block: int = Field(default=4096, ge=2)
    """The other latent is drawn from the same aligned block of this many latents, so that a cell
    needs no other cell and the draw does not depend on the range size, a multiple of it."""
    seed: int = 0


class MetricsConfig(Parameters, frozen=True):
    """How verdicts become numbers."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of every interval."""
    interpretable_cut: float = Field(default=0.6, gt=0, lt=1)
    """A latent is called interpretable if its one-sided lower bound is above this."""
    false_discovery_rate: float = Field(default=0.05, gt=0, lt=1)
    """Of the latents called interpretable, within a layer, explainer and scorer."""
    n_bootstrap: int = Field(default=2000, ge=100)
    """Resamples of latents behind an interval over a layer."""
    seed: int = 0
