"""The parameters of a study, composed of those that ``core/config`` declares."""

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from autointerp_dagster.core.config import (
    AdaptiveConfig,
    BestOfNExplainerConfig,
    ChecksConfig,
    CoderConfig,
    ContrastiveExplainerConfig,
    CorpusConfig,
    DefaultExplainerConfig,
    ExplainerConfig,
    FloorsConfig,
    InterventionsConfig,
    LabelScorerConfig,
    LatentSelection,
    LocalLLMConfig,
    MetricsConfig,
    ModelsConfig,
    NeighboursConfig,
    OutputExplainerConfig,
    Parameters,
    RandomCoderConfig,
    RefineExplainerConfig,
    RemoteLLMConfig,
    SamplingConfig,
    ScorerConfig,
    ScorersConfig,
    TokenConfig,
    WindowEmbeddingsConfig,
)
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey
from autointerp_dagster.study.budget import BudgetConfig
from autointerp_dagster.study.discovery import DISCOVER, DiscoveryConfig, Layers, check_layers

MAX_KEYS = 99
"""Dagster stops tracking versions of edges of 100 and more partitions."""


class Study(Parameters, frozen=True):
    """Everything that decides the tables of one study."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Key prefix and group of its assets; the file's stem by default."""
    models: ModelsConfig
    corpus: CorpusConfig
    tokens: TokenConfig = TokenConfig()
    coders: dict[str, CoderConfig] = Field(min_length=1)
    """Sparse coders by name."""
    layers: Layers
    """Hookpoints, taken for every coder, or ``<coder>@<hookpoint>`` for one of them. In a file also
    Unix patterns (``layers.*.mlp``) and TransformerLens names (``blocks.5.hook_resid_post``); or
    ``discover`` alone: every coder that turns up, see ``discovery``."""
    discovery: DiscoveryConfig = DiscoveryConfig()
    """Has an effect with ``layers: discover`` only."""
    max_num_latents: int = Field(ge=1)
    """Width of the widest coder; the range dimension spans it."""
    range_size: int = Field(default=4096, ge=1)
    """Latents per cell."""
    latents: LatentSelection = "all"
    """Which latents are explained."""
    logit_lens: bool = True
    """Whether the activation cache names the tokens that each decoder row promotes and suppresses;
    null without. Multiplies every row by the unembedding: dear on a CPU for a large vocabulary."""
    sampling: SamplingConfig = SamplingConfig()
    neighbours: NeighboursConfig | None = None
    """Which latents are near each other; null: not asked, unless negatives are of that kind."""
    window_embeddings: WindowEmbeddingsConfig = WindowEmbeddingsConfig()
    """For negatives of kind ``similar``; without them it has no effect."""
    explainers: dict[str, ExplainerConfig] = Field(min_length=1)
    """Explainers by name."""
    interventions: InterventionsConfig = InterventionsConfig()
    """How the model is steered, where the intervention scorer or an ``output`` explainer asks."""
    scorers: ScorersConfig = ScorersConfig()
    scoring: AdaptiveConfig | None = None
    """Ask detection and fuzzing in rounds, until a latent's score is sure enough; null: all test
    windows of every latent."""
    floors: FloorsConfig = FloorsConfig()
    metrics: MetricsConfig = MetricsConfig()
    checks: ChecksConfig = ChecksConfig()
    """What a result may look like before the rest of a run is stopped."""
    budget: BudgetConfig = BudgetConfig()
    store: str = "store"
    """Folder or URL of the results; a relative folder counts from the working directory."""
    _found: dict[LayerKey, str] = PrivateAttr(default_factory=dict)

    @property
    def discovers(self) -> bool:
        """Whether its layers are those that turn up, :meth:`with_found`."""
        return self.layers == (DISCOVER,)

    def with_found(self, addresses: Mapping[LayerKey, str]) -> "Study":
        """The same study with these layers, if it discovers them; each with its address."""
        study = self.model_copy()
        study._found = dict(addresses)  # pyright: ignore[reportAttributeAccessIssue]
        return study

    def address_of(self, layer: LayerKey) -> str:
        """What the coder's files are asked for: the hookpoint, or where a found one lies."""
        return self._found.get(layer, layer.hookpoint)

    @property
    def layer_keys(self) -> tuple[LayerKey, ...]:
        """The layers, in the file's order; of a study that discovers, in that of their finding."""
        if self.discovers:
            return tuple(self._found)
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
        check_layers(self.layers, self.coders.values())
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
    def _check_baselines(self) -> "Study":
        for name, config in self.coders.items():
            if not isinstance(config, RandomCoderConfig):
                continue
            known = [n for n, c in self.coders.items() if not isinstance(c, RandomCoderConfig)]
            if config.like not in known:
                raise ValueError(
                    f"coders.{name}.like: {config.like!r} is no other coder of the study that is "
                    f"not random itself. Choose from {known}."
                )
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
            if not re.fullmatch(r"[\w*?\[\]!-]+(\.[\w*?\[\]!-]+)*", layer.hookpoint):
                raise ValueError(
                    f"layers: hookpoint {layer.hookpoint!r}: wanted a dotted module path, e.g. "
                    "'layers.9.mlp'."
                )
        return self

    @model_validator(mode="after")
    def _check_prices(self) -> "Study":
        models = {part: getattr(self.models, part) for part in ("explainer", "judge", "base_lm")}
        budget = self.budget
        limits = {"budget.usd": budget.usd, "budget.study_usd": budget.study_usd}
        limits |= {"discovery.nightly.usd": self.discovery.nightly.usd}
        limit = next((name for name, usd in limits.items() if usd is not None), None)
        for part, config in models.items():
            is_free = isinstance(config, RemoteLLMConfig) and not config.has_price
            if limit is not None and is_free:
                raise ValueError(
                    f"{limit}: models.{part} has no price, so the budget could never be "
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
        return self

    @model_validator(mode="after")
    def _check_scorers(self) -> "Study":
        for name in self.scorers.asked:
            unknown = [
                e for e in self.scorers.of(name).explainers or () if e not in self.explainers
            ]
            if unknown:
                raise ValueError(
                    f"scorers.{name}.explainers: {unknown[0]!r} is none of {list(self.explainers)}."
                )
        wanted = {f"scorers.{name}": self.scorers.of(name).latents for name in self.scorers.asked}
        wanted["interventions"] = self.interventions.latents
        for part, latents in wanted.items():
            outside = (
                set(latents) - set(self.latents) if _are_lists(latents, self.latents) else set()
            )
            if outside:
                raise ValueError(
                    f"{part}.latents: {min(outside)} is not in the study's latents, so it will not "
                    "be explained. List it there, too."
                )
        return self

    @model_validator(mode="after")
    def _check_models(self) -> "Study":
        scorers = self.scorers
        if self.embeds_windows and self.models.embedder is None:
            raise ValueError(
                "sampling.negative_kinds: similar windows need models.embedder, e.g. "
                "{source: 'embedded:all-minilm-l6-v2', query_prefix: ''}."
            )
        for name in ("embedding", "example_embedding"):
            if getattr(scorers, name) is not None and self.models.embedder is None:
                raise ValueError(
                    f"scorers.{name}: needs models.embedder, e.g. "
                    "{source: 'embedded:all-minilm-l6-v2', query_prefix: ''}."
                )
        simulates = scorers.simulation is not None and scorers.simulation.mode == "all_at_once"
        wanted = {
            "scorers.surprisal": scorers.surprisal is not None,
            "scorers.intervention": scorers.intervention is not None,
            "scorers.simulation (mode: all_at_once)": simulates,
            "explainers (kind: output)": bool(self.output_explainers),
        }
        for part, is_wanted in wanted.items():
            if is_wanted and self.models.base_lm is None:
                raise ValueError(
                    f"{part}: needs models.base_lm, a model that continues plain text, e.g. "
                    "{source: 'embedded:smollm2-135m-instruct'}."
                )
        for name, config in self.output_explainers.items():
            if config.kl is not None and config.kl not in self.interventions.kl:
                raise ValueError(
                    f"explainers.{name}.kl: {config.kl} is none of interventions.kl "
                    f"{list(self.interventions.kl)}."
                )
        return self

    @model_validator(mode="after")
    def _check_thinking(self) -> "Study":
        if isinstance(self.models.explainer, LocalLLMConfig):
            for name, config in self.explainers.items():
                if isinstance(config, DefaultExplainerConfig) and config.chain_of_thought:
                    raise ValueError(
                        f"explainers.{name}.chain_of_thought: models.explainer runs in this "
                        "process (source), where an answer is one line and no steps are written. "
                        "Use a model behind a server (base_url or serve), or leave it out."
                    )
        return self

    @model_validator(mode="after")
    def _check_promoted(self) -> "Study":
        for name, config in self.explainers.items():
            shows = isinstance(config, DefaultExplainerConfig) and config.show_promoted
            if shows and not self.logit_lens:
                raise ValueError(
                    f"explainers.{name}.show_promoted: with logit_lens: false no promoted tokens "
                    "are known. Set logit_lens to true, or leave show_promoted out."
                )
        return self

    @model_validator(mode="after")
    def _check_marks(self) -> "Study":
        fuzzing = self.scorers.fuzzing
        exchanges_marks = fuzzing is not None and "active" in fuzzing.variants
        if exchanges_marks and self.sampling.window_mode == "centred":
            raise ValueError(
                "scorers.fuzzing.variants: 'active' exchanges marks between windows, and with "
                "sampling.window_mode: centred all peaks stand at the same place, so hardly any "
                "two can. Leave 'active' out, or use window_mode: fixed."
            )
        return self

    @model_validator(mode="after")
    def _check_windows_of_explainers(self) -> "Study":
        sampling = self.sampling
        can_select = bool(
            sampling.n_select and sampling.n_negative_select and sampling.select_share
        )
        for name, config in self.explainers.items():
            if (
                isinstance(config, BestOfNExplainerConfig | RefineExplainerConfig)
                and not can_select
            ):
                raise ValueError(
                    f"explainers.{name}: {config.kind} chooses by windows of the select split, and "
                    "there would be none. Set sampling.n_select, n_negative_select and "
                    "select_share above 0."
                )
            if isinstance(config, ContrastiveExplainerConfig) and not sampling.n_negative_train:
                raise ValueError(
                    f"explainers.{name}: contrastive shows non-activating train windows, and there "
                    "would be none. Set sampling.n_negative_train above 0."
                )
        return self

    @property
    def adaptive_scorers(self) -> tuple[str, ...]:
        """The scorers that ask about a latent until its score is sure; in a fixed order."""
        return (
            ()
            if self.scoring is None
            else tuple(
                name
                for name in self.scorers.asked
                if isinstance(self.scorers.of(name), LabelScorerConfig)
            )
        )

    def scorer_config(self, name: str) -> ScorerConfig:
        """The parameters of a scorer that is run, with the explainers that it is asked about.

        The intervention scorer is asked about what explains outputs, where anything does.

        Raises:
            KeyError: If it is not run.
        """
        config = self.scorers.of(name)
        if name == "intervention" and config.explainers is None and self.output_explainers:
            return config.model_copy(update={"explainers": tuple(self.output_explainers)})
        return config

    @property
    def finds_neighbours(self) -> NeighboursConfig | None:
        """How neighbours are found; null if nothing asks for them."""
        if self.neighbours is None and "neighbour" in self.sampling.negative_kinds:
            return NeighboursConfig()
        return self.neighbours

    @property
    def embeds_windows(self) -> bool:
        """Whether the windows of the corpus are embedded."""
        return "similar" in self.sampling.negative_kinds

    @property
    def output_explainers(self) -> dict[str, OutputExplainerConfig]:
        """Those explainers that read interventions, by name."""
        return {
            name: config
            for name, config in self.explainers.items()
            if isinstance(config, OutputExplainerConfig)
        }

    @property
    def matches_layers(self) -> bool:
        """Whether latents of two layers are matched and their explanations compared."""
        has_two = self.discovers or len(self.layer_keys) > 1
        return has_two and self.models.embedder is not None

    @property
    def intervenes(self) -> bool:
        """Whether the model is steered at all."""
        return self.scorers.intervention is not None or bool(self.output_explainers)


def _are_lists(*selections: object) -> bool:
    return all(isinstance(selection, tuple) for selection in selections)
