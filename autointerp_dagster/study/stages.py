"""The graph: every stage, what it is made from, and the version of the code that makes it.

A stage's ``version`` is part of every fingerprint. Raise it when the stage's output changes for the
same inputs; the golden-output test fails when that was forgotten.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from autointerp_dagster.core.types import Cell, LayerKey, Place, WholeStudy
from autointerp_dagster.study.model import Study

Scope = Literal["study", "layer", "cell"]
"""How an asset is partitioned: not at all, by layer, by layer and range."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One asset of the graph."""

    name: str
    """Asset, module and table name."""
    scope: Scope
    version: str = ""
    """Empty for external assets."""
    upstream: tuple[str, ...] = ()
    pool: Literal["gpu", "llm"] | None = None
    """Limits how many steps of the kind run at once."""
    kinds: tuple[str, ...] = ()
    """Icons in the UI."""
    description: str = ""

    spans: tuple[str, ...] = ()
    """Of ``upstream``, those of which a cell reads every range of its layer."""
    follows: bool = False
    """Recomputed by itself when its inputs are (cheap, no language model)."""

    @property
    def is_external(self) -> bool:
        """Observed, never made here."""
        return not self.version


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "subject_model",
            "study",
            kinds=("huggingface",),
            description="The language model being interpreted; its version is its weights' hash.",
        ),
        Stage("corpus", "study", description="The text; its version is its content's hash."),
        Stage(
            "sparse_coders",
            "layer",
            kinds=("pytorch",),
            description="One sparse coder per layer; its version is its weights' hash.",
        ),
        Stage(
            "token_dataset",
            "study",
            "1",
            ("subject_model", "corpus"),
            kinds=("parquet",),
            description="The corpus as contexts of tokens, one document per context.",
        ),
        Stage(
            "activation_cache",
            "cell",
            "2",
            ("subject_model", "sparse_coders", "token_dataset"),
            pool="gpu",
            kinds=("pytorch", "parquet"),
            description="Every activation above zero: (latent, context, position, activation).",
        ),
        Stage(
            "neighbours",
            "cell",
            "1",
            ("sparse_coders", "token_dataset", "activation_cache"),
            kinds=("polars", "parquet"),
            description="Which latents of the layer fire together, or have alike directions.",
            spans=("activation_cache",),
        ),
        Stage(
            "window_embeddings",
            "study",
            "1",
            ("token_dataset",),
            pool="gpu",
            kinds=("pytorch",),
            description="The embedding of every window of the corpus, each text embedded once.",
        ),
        Stage(
            "latent_records",
            "cell",
            "3",
            ("token_dataset", "activation_cache", "neighbours", "window_embeddings"),
            kinds=("polars", "parquet"),
            description="Windows with their split, and statistics, of every latent.",
        ),
        Stage(
            "interventions",
            "cell",
            "2",
            (
                "subject_model",
                "sparse_coders",
                "token_dataset",
                "activation_cache",
                "latent_records",
            ),
            pool="gpu",
            kinds=("pytorch", "parquet"),
            description="What the model writes when it is steered along a latent.",
        ),
        Stage(
            "explanations",
            "cell",
            "2",
            (
                "token_dataset",
                "sparse_coders",
                "activation_cache",
                "latent_records",
                "interventions",
            ),
            pool="llm",
            kinds=("openai", "parquet"),
            description="What each selected latent responds to, in words, by each explainer.",
        ),
        Stage(
            "score_detection",
            "cell",
            "2",
            ("token_dataset", "latent_records", "explanations"),
            pool="llm",
            kinds=("openai", "parquet"),
            description="A judge says which plain windows contain the feature described.",
        ),
        Stage(
            "score_fuzzing",
            "cell",
            "2",
            ("token_dataset", "latent_records", "explanations"),
            pool="llm",
            kinds=("openai", "parquet"),
            description="A judge says in which windows every marked token fits the explanation.",
        ),
        Stage(
            "score_surprisal",
            "cell",
            "1",
            (
                "token_dataset",
                "latent_records",
                "explanations",
            ),
            pool="llm",
            kinds=(
                "openai",
                "parquet",
            ),
            description="Windows ranked by how much likelier the explanation makes them.",
        ),
        Stage(
            "score_embedding",
            "cell",
            "2",
            (
                "token_dataset",
                "latent_records",
                "explanations",
            ),
            pool="gpu",
            kinds=(
                "pytorch",
                "parquet",
            ),
            description="Windows ranked by the similarity of their embedding to the explanation's.",
        ),
        Stage(
            "score_simulation",
            "cell",
            "1",
            (
                "token_dataset",
                "latent_records",
                "explanations",
            ),
            pool="llm",
            kinds=(
                "openai",
                "parquet",
            ),
            description="The activation of every token, predicted from the explanation.",
        ),
        Stage(
            "score_intruder",
            "cell",
            "1",
            (
                "token_dataset",
                "activation_cache",
                "latent_records",
            ),
            pool="llm",
            kinds=(
                "openai",
                "parquet",
            ),
            description="A judge finds the window that does not belong; no explanation needed.",
        ),
        Stage(
            "score_example_embedding",
            "cell",
            "1",
            (
                "token_dataset",
                "activation_cache",
                "latent_records",
            ),
            pool="gpu",
            kinds=(
                "pytorch",
                "parquet",
            ),
            description="Test windows ranked by their nearness to train windows.",
        ),
        Stage(
            "score_intervention",
            "cell",
            "1",
            (
                "interventions",
                "explanations",
            ),
            pool="llm",
            kinds=(
                "openai",
                "parquet",
            ),
            description="How much less surprising an explanation is after steered text.",
        ),
        Stage(
            "latent_metrics",
            "cell",
            "2",
            (
                "latent_records",
                "explanations",
                "score_detection",
                "score_fuzzing",
                "score_surprisal",
                "score_embedding",
                "score_simulation",
                "score_intruder",
                "score_example_embedding",
                "score_intervention",
            ),
            kinds=("polars", "parquet"),
            description="Scores of each latent with intervals and floors.",
        ),
        Stage(
            "layer_metrics",
            "layer",
            "2",
            ("latent_records", "latent_metrics"),
            kinds=("polars", "parquet"),
            description="Medians, floors and counts over the latents of a layer.",
            follows=True,
        ),
        Stage(
            "study_metrics",
            "study",
            "5",
            (
                "sparse_coders",
                "activation_cache",
                "explanations",
                "latent_metrics",
                "layer_metrics",
            ),
            kinds=("polars", "parquet"),
            description="Own against floor; explainers, scorers, layers, coders; and the cost.",
            follows=True,
        ),
    )
}
"""In the order of the data."""

_SCORE = "score_"
SCORE_STAGES = tuple(name for name in STAGES if name.startswith(_SCORE))


def stages_of(study: Study) -> list[Stage]:
    """The stages that a study has: all but what it does not ask for."""
    absent = {name for name in SCORE_STAGES if name.removeprefix(_SCORE) not in study.scorers.asked}
    if not study.intervenes:
        absent.add("interventions")
    if study.finds_neighbours is None:
        absent.add("neighbours")
    if not study.embeds_windows:
        absent.add("window_embeddings")
    return [stage for stage in STAGES.values() if stage.name not in absent]


def upstream_of(study: Study, stage: Stage) -> list[Stage]:
    """The inputs that a stage has in this study."""
    absent = set(STAGES) - {found.name for found in stages_of(study)}
    if stage.name == "latent_records" and "neighbour" not in study.sampling.negative_kinds:
        absent.add("neighbours")
    if stage.name == "neighbours" and not {"decoder", "encoder"} & _measures(study):
        absent.add("sparse_coders")
    if stage.name == "explanations" and not study.output_explainers:
        absent.add("interventions")
    if stage.name == "study_metrics" and not study.matches_layers:
        absent |= {"sparse_coders", "activation_cache", "explanations"}
    return [STAGES[name] for name in stage.upstream if name not in absent]


def _measures(study: Study) -> set[str]:
    return set() if study.finds_neighbours is None else set(study.finds_neighbours.measures)


def places_of(study: Study, scope: Scope) -> Iterator[Place]:
    """Every place of an asset of this scope."""
    if scope == "study":
        yield WholeStudy()
    elif scope == "layer":
        yield from study.layer_keys
    else:
        yield from study.cells


def inputs_at(study: Study, stage: Stage, place: Place, upstream: Stage) -> list[Place]:
    """The places of ``upstream`` that a place of ``stage`` is made from."""
    scope = upstream.scope
    if isinstance(place, Cell) and upstream.name in stage.spans:
        return [cell for cell in study.cells if cell.layer == place.layer]
    if isinstance(place, Cell) and scope == "cell":
        return [place]
    if isinstance(place, Cell) and scope == "layer":
        return [place.layer]
    if isinstance(place, LayerKey) and scope != "study":
        return [p for p in places_of(study, scope) if place in (p, getattr(p, "layer", None))]
    return list(places_of(study, scope))
