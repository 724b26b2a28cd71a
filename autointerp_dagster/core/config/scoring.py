"""How explanations are scored, and what the scores are compared with."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from autointerp_dagster.core.config.base import Parameters
from autointerp_dagster.core.config.explaining import kind_of_selection


class ScoredSample(Parameters, frozen=True):
    """The first of a layer's explained latents, floor latents before the others."""

    sample: int = Field(ge=1)
    """Latents per layer."""


ScoredLatents = Annotated[
    Annotated[Literal["all"], Tag("<all>")]
    | Annotated[ScoredSample, Tag("<sample>")]
    | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), Tag("<list>")],
    Discriminator(kind_of_selection),
]
"""Which of the explained latents a scorer is asked about."""


class ScorerConfig(Parameters, frozen=True):
    """What every scorer has."""

    latents: ScoredLatents = "all"
    """Of the explained latents, those that are scored: ``all``, ``{sample: n}`` or a list."""
    explainers: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Whose explanations are scored; null: all explainers'."""
    seed: int = 0
    """Part of the address of the scorer's draws."""


class LabelScorerConfig(ScorerConfig, frozen=True):
    """What scorers share whose judge labels windows."""

    windows_per_prompt: int = Field(default=5, ge=1)
    """Windows that the judge labels in one answer; fewer cost more and err less together."""
    n_examples: int | None = Field(default=None, ge=1)
    """Windows of each class per latent; null: all the test windows of the record."""
    top_logprobs: int = Field(default=10, ge=0, le=20)
    """Candidates per token to ask log-probabilities of; 0: none, and then no AUROC."""


class DetectionConfig(LabelScorerConfig, frozen=True):
    """The judge says which plain windows contain the feature described."""


class FuzzingConfig(LabelScorerConfig, frozen=True):
    """The judge says in which windows every marked token is an instance of the explanation."""

    variants: tuple[Literal["active"], ...] = ()
    """Further false markings; ``active``: activating windows marked on silent tokens."""


class EmbeddingConfig(ScorerConfig, frozen=True):
    """Windows ranked by the cosine of their embedding with the explanation's."""

    n_examples: int | None = Field(default=None, ge=1)
    """As in detection."""


class SurprisalConfig(ScorerConfig, frozen=True):
    """Windows ranked by how much likelier the explanation makes them to a base model."""

    n_examples: int | None = Field(default=None, ge=1)
    """As in detection."""


class SimulationConfig(ScorerConfig, frozen=True):
    """The activation of every token predicted from the explanation."""

    mode: Literal["all_at_once", "json"] = "json"
    """``all_at_once``: by a base model's log-probabilities of the numbers 0 to 10; ``json``: the
    judge writes them."""
    n_examples: int | None = Field(default=None, ge=1)
    """As in detection."""


class IntruderConfig(ScorerConfig, frozen=True):
    """The judge finds the window that does not belong; needs no explanation."""

    n_trials: int = Field(default=20, ge=1)
    """Questions per latent, spread over the quantiles."""
    internal: bool = False
    """Ask as many again in which the intruder is an activating window of another quantile."""


class ExampleEmbeddingConfig(ScorerConfig, frozen=True):
    """Test windows ranked by their nearness to train windows; needs no explanation."""

    n_rounds: int = Field(default=20, ge=1)
    """Pairs of an activating and a non-activating test window."""
    n_shown: int = Field(default=10, ge=1)
    """Train windows of each class that a test window is compared with."""


class InterventionConfig(ScorerConfig, frozen=True):
    """How much less surprising an explanation is after text written under an intervention.

    Without ``explainers`` it is asked about those of kind ``output``; about all if there are none.
    """


class InterventionsConfig(Parameters, frozen=True):
    """How the subject model is steered along a latent (method: intervention)."""

    latents: ScoredLatents = "all"
    """Of the latents that are to be explained, those that are steered along."""
    kl: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0,), min_length=1)
    """Strengths, as mean divergence of the next token's distribution in nats. The first is the
    main one."""
    tolerance: float = Field(default=0.1, gt=0, lt=1)
    """Relative; beyond it an intervention is off target."""
    max_steps: int = Field(default=10, ge=1)
    """Strengths tried in the search, at most."""
    prompt_len: int = Field(default=64, ge=4)
    """Tokens of a prompt at most, with BOS."""
    min_len: int = Field(default=8, ge=2)
    """Tokens of a prompt at least, with BOS."""
    n_prompts: int = Field(default=40, ge=2)
    """Per latent, of both kinds, at most."""
    n_for_explainer: int = Field(default=10, ge=1)
    """Of these, those that the ``output`` explainer may see, from train contexts; the others
    score, and are from test contexts."""
    n_tokens: int = Field(default=8, ge=1)
    """Of each continuation."""
    n_promoted: int = Field(default=10, ge=1)
    """Tokens kept per explainer's prompt."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    seed: int = 0

    @model_validator(mode="after")
    def _leave_prompts_for_scoring(self) -> "InterventionsConfig":
        if self.n_for_explainer >= self.n_prompts:
            raise ValueError(
                f"n_for_explainer {self.n_for_explainer}: wanted fewer than n_prompts "
                f"{self.n_prompts}, so that prompts are left for scoring."
            )
        if self.min_len > self.prompt_len:
            raise ValueError(
                f"min_len {self.min_len}: wanted at most prompt_len {self.prompt_len}."
            )
        return self


class AdaptiveConfig(Parameters, frozen=True):
    """Detection and fuzzing in rounds of prompts, until the score is sure enough."""

    target_halfwidth: float = Field(gt=0, lt=0.5)
    """A latent stops when its confidence sequence is at most twice this wide."""
    min_prompts: int = Field(default=4, ge=2)
    """Prompts before it may stop."""


class ScorersConfig(Parameters, frozen=True):
    """The scorers of a study; one that is absent is not run."""

    detection: DetectionConfig | None = None
    fuzzing: FuzzingConfig | None = None
    surprisal: SurprisalConfig | None = None
    embedding: EmbeddingConfig | None = None
    simulation: SimulationConfig | None = None
    intruder: IntruderConfig | None = None
    example_embedding: ExampleEmbeddingConfig | None = None
    intervention: InterventionConfig | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the scorers that are run."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    def of(self, name: str) -> ScorerConfig:
        """The parameters of a scorer that is run.

        Raises:
            KeyError: If it is not.
        """
        config = getattr(self, name, None)
        if config is None:
            raise KeyError(name)
        return config


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
    match_min_cosine: float = Field(default=0.7, gt=0, le=1)
    """Latents of two layers are one if they are each other's nearest by decoder cosine, it is this
    or more,"""
    match_min_cofiring: float = Field(default=0.1, ge=0, le=1)
    """and of the tokens on which either fires both do on this share (Jaccard). 0: not asked for."""
    seed: int = 0
