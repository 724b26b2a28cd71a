"""What is computed, what is skipped, what is linked, and what a failure leaves behind."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from bench import Bench
from toy import ALL, H0, H1, LINES, WIDTH, BrokenError, Toy, lines

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.types import Place
from autointerp_dagster.resources import store as store_resource
from autointerp_dagster.resources.store import OUTSIDE_CODER, Commit, StageRun
from autointerp_dagster.study.stages import stages_of

CELLS = ("token_dataset", "activation_cache", "latent_records")


def manifests(toy: Toy) -> list[Path]:
    return [path for path in toy.root.rglob("*.json") if path.parts[-3] != "parts"]


def test_a_second_run_computes_nothing_and_moves_no_head(toy: Toy) -> None:
    toy.run_all()
    before = {cell: toy.head("latent_records", cell).path for cell in toy.study.cells}
    computed, written = list(toy.computed), len(manifests(toy))
    toy.run_all()
    assert toy.computed == computed
    assert len(manifests(toy)) == written
    assert {cell: toy.head("latent_records", cell).path for cell in before} == before
    assert toy.not_fresh() == set()


def test_another_study_of_the_same_store_links_what_it_shares(toy: Toy) -> None:
    toy.run(*CELLS)
    other = replace(toy, name="other", computed=[], models={"latent_records": {"judge": "new"}})
    other.run(*CELLS)
    inside = [cell for cell in toy.study.cells if cell.range.start < WIDTH]
    assert other.computed == [("latent_records", str(cell)) for cell in inside]
    for cell in inside:
        shared = other.head("activation_cache", cell)
        assert shared == toy.head("activation_cache", cell)
        assert shared.provenance.study == "toy"  # whoever made it
        event = other.event("activation_cache", cell)
        assert event.metadata["manifest"].value == shared.path


def test_an_input_that_was_never_materialized_is_named_with_what_to_do(toy: Toy) -> None:
    toy.run("token_dataset")
    with pytest.raises(StoreError) as raised:
        toy.run("latent_records", cells=slice(1, 2))
    assert str(raised.value) == (
        "toy: latent_records needs activation_cache sae@h.0/0000010-0000019, which was never "
        "materialized. Materialize activation_cache first (or run `autointerp run`)."
    )
    assert toy.computed == [("token_dataset", "all")]


def test_a_layer_asks_for_each_of_its_cells(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache", "latent_records", "explanations", "latent_metrics",
            cells=slice(0, 2))  # fmt: skip
    with pytest.raises(StoreError, match=r"layer_metrics needs latent_records sae@h.0/0000020-"):
        toy.run("layer_metrics", layer=0)


def test_a_cell_that_fails_leaves_the_finished_ones_and_the_rest_is_made_next_time(
    toy: Toy,
) -> None:
    toy.run("token_dataset", "activation_cache")
    cells = toy.study.cells
    toy.broken = {("latent_records", str(cells[1]))}
    with pytest.raises(BrokenError):
        toy.run("latent_records")
    finished = (cells[0], cells[2], cells[5])  # what lies outside of the coder needs no computing
    assert {cell for cell in cells if toy.has_head("latent_records", cell)} == set(finished)
    assert {cell for cell in cells if toy.events("latent_records", cell)} == set(finished)

    toy.broken, toy.computed = set(), []
    toy.run("latent_records")
    rest = [cell for cell in cells if cell not in finished]
    assert toy.computed == [("latent_records", str(cell)) for cell in rest]
    assert not {name for name in toy.not_fresh() if name[0] == "latent_records"}


def test_a_failure_in_the_first_place_reports_nothing(toy: Toy) -> None:
    toy.broken = {("token_dataset", "all")}
    with pytest.raises(BrokenError):
        toy.run("token_dataset")
    assert not toy.has_head("token_dataset", ALL)
    assert toy.events("token_dataset", ALL) == []


def test_a_place_that_was_cut_short_is_never_taken_as_done(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache")
    cell = toy.study.cells[0]
    toy.cut_short = {("latent_records", str(cell))}
    toy.run("latent_records", cells=slice(0, 1))
    assert not toy.head("latent_records", cell).complete
    toy.cut_short, toy.computed = set(), []
    toy.run("latent_records", cells=slice(0, 1))
    assert toy.computed == [("latent_records", str(cell))]
    assert toy.head("latent_records", cell).complete
    toy.run("latent_records", cells=slice(0, 1))
    assert toy.computed == [("latent_records", str(cell))]


def test_an_input_that_was_cut_short_is_known_below(toy: Toy) -> None:
    seen: dict[Place, bool] = {}

    def commit_of(stage: StageRun, place: Place) -> Commit:
        seen[place] = stage.all_complete(place)
        return Commit([stage.store.put_table(LINES, lines(str(place)))], {})

    toy.run("token_dataset")
    first, second, *_ = toy.study.cells
    toy.cut_short = {("activation_cache", str(second))}
    toy.run("activation_cache")
    toy.commit_of = commit_of
    toy.run("latent_records", cells=slice(0, 2))
    assert seen == {first: True, second: False}


def test_a_new_model_or_a_new_version_makes_a_stage_again_and_nothing_above(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.run(*CELLS)
    for change in ("model", "version"):
        toy.computed = []
        if change == "model":
            toy.models = {"latent_records": {"judge": "new"}}
        else:
            newer = replace(store_resource.STAGES["latent_records"], version="next")
            monkeypatch.setitem(store_resource.STAGES, "latent_records", newer)
        toy.run(*CELLS)
        assert {asset for asset, _ in toy.computed} == {"latent_records"}
        assert len(toy.computed) == 4


def test_the_same_content_again_makes_nothing_below_it_again(toy: Toy) -> None:
    toy.run(*CELLS)
    toy.computed, toy.models = [], {"activation_cache": {"judge": "new"}}
    toy.run(*CELLS)
    assert {asset for asset, _ in toy.computed} == {"activation_cache"}


def test_other_content_of_one_cell_makes_its_children_again(toy: Toy) -> None:
    toy.run_all()
    cell = toy.study.cells[1]
    toy.computed, toy.models = [], {"activation_cache": {"judge": "new"}}
    toy.contents = {("activation_cache", str(cell)): "something else"}
    toy.run("activation_cache")
    children = {"latent_records", "explanations"}
    assert toy.not_fresh() == {(child, str(cell)) for child in children}
    toy.computed = []
    toy.run("latent_records", "explanations")
    assert set(toy.computed) == {(child, str(cell)) for child in children}
    assert toy.not_fresh() == set()  # their content is what it was


def test_going_back_to_an_old_model_links_the_old_result(toy: Toy) -> None:
    toy.run(*CELLS)
    cell = toy.study.cells[0]
    old = toy.head("latent_records", cell).path
    toy.contents = {("latent_records", str(cell)): "new"}
    toy.models = {"latent_records": {"judge": "new"}}
    toy.run(*CELLS)
    assert toy.head("latent_records", cell).path != old
    toy.computed, toy.models = [], {}
    toy.run(*CELLS)
    assert (toy.computed, toy.head("latent_records", cell).path) == ([], old)


def test_changed_weights_of_one_layer_leave_the_other_alone(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache")
    toy.computed, toy.versions = [], {"sparse_coders sae@h.1": "trained on"}
    toy.run("activation_cache")
    cells = [str(cell) for cell in toy.study.cells if cell.layer == H1]
    assert toy.computed == [("activation_cache", cell) for cell in cells]


def test_a_manifest_names_its_inputs_the_way_back_and_the_run(toy: Toy) -> None:
    toy.run("token_dataset")
    run_id = toy.run("activation_cache")
    cell = toy.study.cells[0]
    head, tokens = toy.head("activation_cache", cell), toy.head("token_dataset", ALL)
    assert head.provenance.run_id == run_id
    by_asset = {upstream.asset: upstream for upstream in head.upstream}
    assert by_asset["token_dataset"].manifest == tokens.path
    assert by_asset["token_dataset"].content_hash == tokens.content_hash
    assert by_asset["sparse_coders"].cell == str(H0)
    assert by_asset["sparse_coders"].manifest is None


def test_ranges_outside_of_a_coder_pass_through_without_being_computed(toy: Toy) -> None:
    toy.run_all()
    outside = [cell for cell in toy.study.cells if cell.range.start >= WIDTH]
    stages = [stage.name for stage in stages_of(toy.study) if stage.scope == "cell"]
    for cell in outside:
        assert {toy.head(name, cell).status for name in stages} == {OUTSIDE_CODER}
        assert {asset for asset, place in toy.computed if place == str(cell)} == {
            "activation_cache"
        }
        assert toy.event("latent_metrics", cell).metadata["dagster/row_count"].value == 0
    assert toy.head("study_metrics", ALL).status == "ok"


def test_a_layer_reads_the_rows_of_all_its_cells_inside_of_the_coder(toy: Toy) -> None:
    read: dict[Place, list[str]] = {}

    def commit_of(stage: StageRun, place: Place) -> Commit:
        read[place] = stage.table("latent_records", place, LINES.name)["line"].to_list()
        return Commit([stage.store.put_table(LINES, lines(str(place)))], {})

    cells = [s.name for s in stages_of(toy.study) if s.scope == "cell"]
    toy.run("token_dataset", *cells)
    toy.commit_of = commit_of
    toy.run("layer_metrics", layer=1)
    inside = [cell for cell in toy.study.cells if cell.layer == H1 and cell.range.start < WIDTH]
    assert read == {H1: [f"latent_records {cell}" for cell in inside]}


def test_a_piece_of_a_cell_is_made_once_unless_it_was_cut_short(toy: Toy) -> None:
    made: list[str] = []

    def piece(stage: StageRun, name: str, *, complete: bool) -> Part:
        def make() -> Part:
            made.append(name)
            blob = stage.store.put_table(LINES, lines(name), name=f"lines/{name}")
            return Part(name=name, fingerprint="", blob=blob, complete=complete)

        return stage.part(name, {"about": name}, make)

    def commit_of(stage: StageRun, place: Place) -> Commit:
        parts = [piece(stage, "whole", complete=True), piece(stage, "cut", complete=False)]
        return Commit([part.blob for part in parts], {}, complete=all(p.complete for p in parts))

    toy.run("token_dataset", "activation_cache")
    toy.commit_of = commit_of
    toy.run("latent_records", cells=slice(0, 1))
    toy.run("latent_records", cells=slice(0, 1))
    assert made == ["whole", "cut", "cut"]
    assert [blob.name for blob in toy.head("latent_records", toy.study.cells[0]).blobs] == [
        "lines/cut",
        "lines/whole",
    ]


def test_the_log_says_how_many_were_new(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="autointerp_dagster"):
        toy.run("token_dataset", "activation_cache", cells=slice(0, 1))
        toy.run("activation_cache", cells=slice(0, 2))
    said = [r.getMessage() for r in caplog.records if "activation_cache" in r.getMessage()]
    assert said[0].startswith("activation_cache: 1 new, 0 from the store, 1 rows")
    assert said[-1].startswith("activation_cache: 1 new, 1 from the store, 1 rows")


def test_a_store_that_was_removed_is_made_again(toy: Toy) -> None:
    """Dagster's records say it is there; the store decides."""
    toy.run("token_dataset", "activation_cache")
    shutil.rmtree(toy.root)
    toy.computed = []
    toy.run("token_dataset", "activation_cache")
    assert len(toy.computed) == 1 + len(toy.study.cells)


def test_a_grid_wider_than_the_coder_reaches_the_study_metrics(
    world: Path, server: FakeLLMServer, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """The real stages: 48 latents in a grid of 100, so one whole range and a half lie outside."""
    overrides = {
        "layers": ["h.1"], "max_num_latents": 100, "range_size": 32, "latents": [0, 7, 33],
        "explainers": {"default": None}, "scorers": {"fuzzing": None},
        "floors": {"donor_block": 32},
    }  # fmt: skip
    bench = Bench(tmp_path, world, server.base_url, instance, overrides)
    bench.run()
    study, heads = bench.study, bench.heads()
    assert [str(block) for block in study.ranges][-2:] == ["0000064-0000095", "0000096-0000099"]
    for stage in stages_of(study):
        if stage.scope == "cell":
            found = [heads[stage.name, str(cell)] for cell in study.cells]
            assert [head.status for head in found] == ["ok", "ok", OUTSIDE_CODER, OUTSIDE_CODER]
            assert [len(head.blobs) > 0 for head in found] == [True, True, False, False]
    assert bench.table("latent_records", "latents").height == 48
    assert bench.table("latent_metrics", "latent_metrics")["latent"].unique().to_list() == [
        0,
        7,
        33,
    ]
    assert bench.table("study_metrics", "study_metrics").height > 0
    assert bench.stale() == set()


def test_a_run_reads_what_its_fingerprints_name_though_a_head_moves_meanwhile(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache")
    first, second = toy.study.cells[:2]
    named = toy.head("activation_cache", second).path
    read: list[str | None] = []

    def commit(stage: StageRun, place: Place) -> Commit:
        if not read:  # another run finishes while this one works on its first cell
            moved = toy.head("activation_cache", first)
            stage.store.set_head(toy.name, "activation_cache", str(second), moved)
        read.append(stage.input("activation_cache", place).path)
        return Commit([stage.store.put_table(LINES, lines(str(place)))], {})

    toy.commit_of = commit
    toy.run("latent_records", cells=slice(0, 2))
    assert read == [toy.head("activation_cache", first).path, named]
    upstream = {up.asset: up.manifest for up in toy.head("latent_records", second).upstream}
    assert upstream["activation_cache"] == named
