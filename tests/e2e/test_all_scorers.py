"""Every explainer, scorer and kind of negative, through the assets, on latents of known meaning."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from bench import Bench
from dagster_walk import DagsterWalk

from autointerp_dagster.adapters.lineage import lineage_of
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.metrics import FAMILIES, HEADLINE
from autointerp_dagster.core.schemas import TABLES
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.study.stages import STAGES, places_of, stages_of

MEANING = (1, 5, 9)
"""Latents with a rule in words."""
LATENTS = [*MEANING, 3, 22]
"""The last two are dense and rare."""
EXPLAINERS = {
    "default": {"kind": "default", "n_examples": 12, "show_promoted": True},
    "contrastive": {"kind": "contrastive", "n_examples": 8, "n_silent": 3},
    "single_token": {"kind": "single_token", "n_examples": 12},
    "output": {"kind": "output", "n_samples": 2},
    "best_of_n": {"kind": "best_of_n", "n": 2, "n_examples": 12},
    "refine": {"kind": "refine", "n_loops": 1, "n_examples": 12},
}
SCORERS = {
    "detection": {},
    "fuzzing": {"variants": ["active"]},
    "surprisal": {"n_examples": 3, "latents": {"sample": 2}, "explainers": ["default"]},
    "embedding": {"explainers": ["default"]},
    "simulation": {"n_examples": 5, "explainers": ["default"]},
    "intruder": {"n_trials": 6, "internal": True},
    "example_embedding": {"n_rounds": 4},
    "intervention": {"latents": {"sample": 3}, "explainers": ["output"]},
}
KINDS = ["random", "neighbour", "similar", "same_token"]
ASKING = ("detection", "fuzzing", "surprisal", "simulation", "intruder", "intervention")


@pytest.fixture(scope="module")
def bench(
    world: Path, server: FakeLLMServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    base_lm = {"base_url": server.base_url, "model": "fake-base"}
    embedder = {"source": "embedded:all-minilm-l6-v2", "query_prefix": "", "device": "cpu"}
    overrides = {
        "latents": LATENTS,
        "layers": ["h.0"],
        "models": {"base_lm": base_lm, "embedder": embedder},
        "explainers": {**EXPLAINERS, "top_tokens": None},
        "sampling": {"n_test": 20, "n_quantiles": 4, "negative_kinds": KINDS},
        "window_embeddings": {"max_windows": 400},
        "interventions": {"kl": [0.05], "n_prompts": 8, "n_for_explainer": 3, "n_tokens": 4},
        "scorers": SCORERS,
        "metrics": {"n_bootstrap": 100},
    }
    with dg.DagsterInstance.ephemeral() as kept:
        bench = Bench(tmp_path_factory.mktemp("all"), world, server.base_url, kept, overrides)
        bench.run()
        yield bench


def headline(bench: Bench, scorer: str) -> pl.DataFrame:
    metrics = bench.table("latent_metrics", "latent_metrics")
    return metrics.filter(
        (pl.col("scorer") == scorer)
        & (pl.col("metric") == HEADLINE[scorer])
        & (pl.col("variant") == "all")
    )


def test_every_stage_of_the_graph_is_fresh(bench: Bench) -> None:
    assert {name for name, _ in bench.heads()} == {
        name for name, stage in STAGES.items() if not stage.is_external
    }
    assert bench.stale() == set()


def test_every_table_conforms(bench: Bench) -> None:
    declared = {table.name: table for table in TABLES}
    checked = set()
    for head in bench.heads().values():
        for blob in head.blobs:
            table = declared.get(blob.name.split("/")[0])
            if table is not None:
                frame = bench.store.table(blob)
                assert frame.equals(table.conform(frame))
                checked.add(table.name)
    assert checked == set(declared)


def test_the_walk_of_every_stage_is_the_one_that_dagster_recorded(bench: Bench) -> None:
    study, store, recorded = bench.study, bench.store, DagsterWalk(bench)
    heads, n_walked = bench.heads(), 0
    for stage in stages_of(study):
        for place in () if stage.is_external else places_of(study, stage.scope):
            head = heads[stage.name, str(place)]
            event = recorded.newest(asset_key(study, stage), partition_key(place))
            assert event is not None
            assert event.version == head.content_hash
            walk = lineage_of(store, head)
            mine = {(made.asset, made.cell): made.content_hash for made in walk.made}
            mine |= {(name.split()[0], name.split()[1]): v for name, v in walk.external.items()}
            assert recorded.below(event) == mine, (stage.name, str(place))
            n_walked += len(mine)
    assert n_walked > 200


@pytest.mark.parametrize("explainer", ["default", "contrastive", "best_of_n", "refine"])
def test_an_ideal_model_explains_what_has_a_meaning(bench: Bench, explainer: str) -> None:
    own = headline(bench, "detection").filter(
        (pl.col("explainer") == explainer)
        & (pl.col("subject") == "own")
        & pl.col("latent").is_in(MEANING)
    )
    assert own["value"].to_list() == [1.0] * len(MEANING)


def test_each_explainer_has_one_selected_row_per_latent(bench: Bench) -> None:
    rows = bench.table("explanations", "explanations")
    selected = rows.filter("selected").group_by("explainer", "latent").len()
    assert selected["len"].to_list() == [1] * (len(EXPLAINERS) * len(LATENTS))
    candidates = rows.group_by("explainer", "latent").len()
    assert candidates.filter(pl.col("explainer") == "best_of_n")["len"].max() == 2


@pytest.mark.parametrize("scorer", ["fuzzing", "simulation"])
def test_an_ideal_judge_finds_true_explanations_true(bench: Bench, scorer: str) -> None:
    own = headline(bench, scorer).filter(
        (pl.col("explainer") == "default")
        & (pl.col("subject") == "own")
        & pl.col("latent").is_in(MEANING)
    )
    assert own.height == len(MEANING)
    # Words of a class fire at three strengths, which no explanation tells.
    assert min(own["value"].to_list()) >= (0.9 if scorer == "simulation" else 1.0)


def test_the_intruder_is_found_and_needs_no_explanation(bench: Bench) -> None:
    rows = headline(bench, "intruder").filter(pl.col("latent").is_in(MEANING))
    assert rows["explainer"].to_list() == [None] * len(MEANING)
    assert rows["value"].to_list() == [1.0] * len(MEANING)


def test_scorers_are_asked_about_their_own_latents_and_explainers(bench: Bench) -> None:
    for scorer, config in SCORERS.items():
        verdicts = bench.table(f"score_{scorer}", "verdicts")
        assert not verdicts.is_empty(), scorer
        explainers = set(verdicts["explainer"].to_list())
        if not FAMILIES[scorer].needs_explanation:
            assert explainers == {None}
        else:
            assert explainers <= set(config.get("explainers", EXPLAINERS))
        if "latents" in config:
            assert verdicts["latent"].n_unique() <= config["latents"]["sample"]


def test_every_scorer_has_headline_rows_with_a_value(bench: Bench) -> None:
    for scorer in SCORERS:
        rows = headline(bench, scorer).filter(pl.col("status") == "ok")
        assert not rows.is_empty(), scorer
        assert rows.filter(pl.col("value").is_null()).is_empty()


def test_the_judges_answers_are_in_the_journal(bench: Bench) -> None:
    for scorer in ASKING:
        verdicts = bench.table(f"score_{scorer}", "verdicts").filter(pl.col("status") == "ok")
        assert verdicts["call_id"].null_count() == 0, scorer


def test_a_second_run_computes_nothing(bench: Bench) -> None:
    before = {name: head.path for name, head in bench.heads().items()}
    bench.run()
    assert {name: head.path for name, head in bench.heads().items()} == before


def test_an_edited_explainer_leaves_what_needs_no_explanation_fresh(bench: Bench) -> None:
    before = bench.overrides
    default = {**EXPLAINERS["default"], "n_examples": 11}
    explainers = {**before["explainers"], "default": default}
    bench.overrides = {**before, "explainers": explainers}
    stale = {name for name, _ in bench.stale()}
    bench.overrides = before
    assert stale == {"explanations"}
