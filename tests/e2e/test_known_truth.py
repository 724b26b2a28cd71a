"""The whole pipeline on latents whose meaning is known: the truth must score 1, another's .5."""

import math

import dagster as dg
import polars as pl
import pytest
from bench import Bench, Name
from planted import LATENTS, NO_RULE, NUM_LATENTS, planted, truths

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.core.metrics import HEADLINE
from autointerp_dagster.core.schemas import LAYER_METRICS, MAIN_VARIANT, TABLES
from autointerp_dagster.core.types import Place
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.study.stages import STAGES, Stage, places_of, stages_of

CHANCE = 0.5
OUTSIDE = "sae@h.1/0000048-0000063"
"""The cell beyond ``h.1``'s coder."""


def headlines(bench: Bench, subject: str, explainer: str = "default") -> pl.DataFrame:
    """Balanced accuracy of every latent and scorer."""
    return bench.table("latent_metrics", "latent_metrics").filter(
        metric="balanced_accuracy", variant=MAIN_VARIANT, subject=subject, explainer=explainer
    )


def by_latent(frame: pl.DataFrame, column: str) -> dict[tuple[str, int], object]:
    return {(row["hookpoint"], row["latent"]): row[column] for row in frame.to_dicts()}


def made_places(bench: Bench) -> list[tuple[Stage, Place]]:
    study = bench.study
    stages = [stage for stage in stages_of(study) if not stage.is_external]
    return [(stage, place) for stage in stages for place in places_of(study, stage.scope)]


def test_each_planted_latent_gets_its_true_explanation(whole: Bench) -> None:
    rows = whole.table("explanations", "explanations").filter(explainer="default", status="ok")
    texts = by_latent(rows, "text")
    assert {name: text for name, text in texts.items() if text != NO_RULE} == truths()


def test_a_latent_without_a_rule_gets_no_true_explanation(whole: Bench) -> None:
    rows = whole.table("explanations", "explanations").filter(explainer="default", text=NO_RULE)
    ruleless = {(place, latent) for place, latent, known in planted() if known.explanation is None}
    assert by_latent(rows, "text").keys() == ruleless


@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_the_true_explanation_scores_one(whole: Bench, scorer: str) -> None:
    values = by_latent(headlines(whole, "own").filter(scorer=scorer), "value")
    assert {name: values[name] for name in truths()} == dict.fromkeys(truths(), 1.0)


@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_another_latents_explanation_scores_at_chance(whole: Bench, scorer: str) -> None:
    rows = headlines(whole, "other").filter(pl.col("value").is_not_null(), scorer=scorer)
    assert rows.height >= 10
    # Balanced accuracy of n verdicts around .5 has a standard error below .5 / sqrt(n); classes
    # crowd each other out of a window (a firing word takes a place), which costs up to .03.
    tolerance = 4 * 0.5 / math.sqrt(rows["n"].sum()) + 0.03
    assert abs(rows["value"].mean() - CHANCE) < tolerance  # type: ignore[operator]


@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_the_study_reports_the_lift_over_the_floor(whole: Bench, scorer: str) -> None:
    rows = whole.table("study_metrics", "study_metrics")
    lift = rows.filter(
        comparison="subject", a="own", explainer="default", scorer=scorer,
        statistic="mean_difference",
    ).row(0, named=True)  # fmt: skip
    assert lift["lo"] > 0.25
    assert lift["p"] < 0.01


def test_naming_tokens_cannot_explain_a_context(whole: Bench) -> None:
    """``top_tokens`` knows all words of a class, but not what stands before a word."""
    values = by_latent(headlines(whole, "own", "top_tokens").filter(scorer="fuzzing"), "value")
    assert values["h.0", 5] == 1.0  # colours
    assert values["h.0", 14] < 0.9  # type: ignore[operator]  # after a comma


def test_every_latent_of_every_coder_has_a_status(whole: Bench) -> None:
    statuses = by_latent(whole.table("latent_records", "latents"), "status")
    expected = {
        (hookpoint, latent): LATENTS[hookpoint][latent].status
        if latent in LATENTS[hookpoint]
        else "dead"
        for hookpoint, width in NUM_LATENTS.items()
        for latent in range(width)
    }
    assert statuses == expected


def test_every_latent_has_a_row_per_explainer_with_a_text_or_a_reason(whole: Bench) -> None:
    rows = whole.table("explanations", "explanations")
    statuses = by_latent(whole.table("latent_records", "latents"), "status")
    assert rows.height == 2 * len(statuses)
    for row in rows.to_dicts():
        status = statuses[row["hookpoint"], row["latent"]]
        wanted = ("ok", None) if status == "ok" else ("skipped", status)
        assert (row["status"], row["reason"]) == wanted
        assert (row["text"] is None) == (status != "ok")


def test_every_latent_has_a_metric_or_the_reason_why_not(whole: Bench) -> None:
    statuses = by_latent(whole.table("latent_records", "latents"), "status")
    for explainer in ("default", "top_tokens"):
        rows = headlines(whole, "own", explainer)
        assert rows.height == 2 * len(statuses)  # two scorers
        for row in rows.to_dicts():
            is_ok = statuses[row["hookpoint"], row["latent"]] == "ok"
            assert row["status"] == ("ok" if is_ok else "no_explanation")
            assert (row["value"] is None) == (not is_ok)


def test_a_latent_alone_in_its_range_has_no_floor_and_says_so(whole: Bench) -> None:
    rows = headlines(whole, "other").filter(hookpoint="h.0", latent=50)
    assert rows["status"].to_list() == ["no_donor", "no_donor"]


def test_a_range_beyond_a_coder_is_committed_as_such_by_every_stage(whole: Bench) -> None:
    heads = whole.heads()
    stages = [stage.name for stage, place in made_places(whole) if str(place) == OUTSIDE]
    assert len(stages) == 6
    assert {heads[stage, OUTSIDE].status for stage in stages} == {"outside_coder"}
    others = [head for (_, place), head in heads.items() if place != OUTSIDE]
    assert {head.status for head in others} == {"ok"}


def test_no_judgement_failed(whole: Bench) -> None:
    scores = [h for (asset, _), h in whole.heads().items() if asset.startswith("score_")]
    assert {head.summary.get("n_failed", 0) for head in scores} == {0}
    assert whole.table("score_fuzzing", "verdicts")["status"].unique().to_list() == ["ok"]
    assert whole.table("latent_metrics", "latent_metrics")["n_failed"].sum() == 0


def test_every_stored_table_conforms_to_its_schema(whole: Bench) -> None:
    """Conforming a stored table changes nothing: columns, types and order are the declared ones."""
    declared = {table.name: table for table in TABLES}
    checked = set()
    for head in whole.heads().values():
        for blob in head.blobs:
            table = declared.get(blob.name.split("/")[0])
            if table is not None:
                frame = whole.store.table(blob)
                assert frame.equals(table.conform(frame))
                assert frame.schema == pl.Schema(dict(table.columns))
                checked.add(table.name)
    not_asked = {"interventions", "intervention_prompts", "neighbours", "neighbour_windows"}
    assert checked == set(declared) - not_asked


def test_nothing_that_changes_from_run_to_run_is_in_a_table() -> None:
    volatile = {"run_id", "time", "timestamp", "seconds", "started", "finished", "usd"}
    assert not volatile & {name for table in TABLES for name in table.columns}


def latest(bench: Bench, stage: Stage, place: Place) -> dg.AssetMaterialization:
    partition = partition_key(place)
    where = dg.AssetRecordsFilter(
        asset_key=asset_key(bench.study, stage),
        asset_partitions=None if partition is None else [partition],
    )
    event = bench.instance.fetch_materializations(where, limit=1).records[0].asset_materialization
    assert event is not None
    return event


def test_every_place_has_an_event_that_leads_to_its_manifest(whole: Bench) -> None:
    heads = whole.heads()
    for stage, place in made_places(whole):
        head: Manifest = heads[stage.name, str(place)]
        event = latest(whole, stage, place)
        assert event.metadata["manifest"].value == head.path
        assert event.metadata["seconds"].value == head.provenance.seconds
        assert event.metadata["complete"].value is True
        assert "n_bytes" in event.metadata
        assert (event.tags or {})["dagster/data_version"] == head.content_hash


def test_every_event_of_a_result_counts_what_is_in_it(whole: Bench) -> None:
    for stage, place in made_places(whole):
        if str(place) != OUTSIDE:
            names = set(latest(whole, stage, place).metadata)
            assert any(name.startswith("n_") for name in names - {"n_bytes"}), (stage.name, place)


def test_the_medians_of_a_layer_are_numbers_of_its_event(whole: Bench) -> None:
    stage = STAGES["layer_metrics"]
    for layer in whole.study.layer_keys:
        head = whole.heads()["layer_metrics", str(layer)]
        medians = whole.store.table(head.blob(LAYER_METRICS.name)).filter(
            scorer="fuzzing",
            subject="own",
            variant=MAIN_VARIANT,
            metric=HEADLINE["fuzzing"],
            statistic="median",
        )
        shown = latest(whole, stage, layer).metadata
        assert medians.height
        for explainer, value in medians.select("explainer", "value").iter_rows():
            entry = shown.get(f"median fuzzing {explainer}")
            assert (entry and entry.value) == value


def test_lineage_leads_from_a_score_to_weights_and_corpus(whole: Bench) -> None:
    heads, store = whole.heads(), whole.store
    todo: list[Name] = [("score_fuzzing", "sae@h.1/0000000-0000015")]
    external: set[Name] = set()
    while todo:
        head = heads[todo.pop()]
        for upstream in head.upstream:
            name = (upstream.asset, upstream.cell)
            if upstream.manifest is None:
                external.add(name)
            else:
                assert store.manifest(upstream.manifest) == heads[name]
                todo.append(name)
    assert external == {("subject_model", "all"), ("corpus", "all"), ("sparse_coders", "sae@h.1")}
