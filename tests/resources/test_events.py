"""Each place's event says exactly which version it is of, from which versions it was made."""

from collections.abc import Mapping
from dataclasses import replace

import dagster as dg
from toy import ALL, H0, H1, LINES, Toy, lines

from autointerp_dagster.core.types import Place
from autointerp_dagster.partitions import code_version
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study.stages import STAGES


def tags_of(toy: Toy, name: str, place: Place) -> Mapping[str, str]:
    return toy.event(name, place).tags or {}


def input_of(toy: Toy, name: str, place: Place, upstream: str) -> tuple[str, str]:
    """Version and event pointer that the newest event of a place names for an input."""
    tags, key = tags_of(toy, name, place), f"{toy.name}/{upstream}"
    return tags[f"dagster/input_data_version/{key}"], tags[f"dagster/input_event_pointer/{key}"]


def test_an_event_carries_the_versions_of_code_and_data(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache")
    for cell in toy.study.cells:
        tags = tags_of(toy, "activation_cache", cell)
        head = toy.head("activation_cache", cell)
        assert tags["dagster/data_version"] == head.content_hash
        assert tags["dagster/data_version_is_user_provided"] == "true"
        assert tags["dagster/code_version"] == code_version(toy.study, STAGES["activation_cache"])
        assert tags["dagster/partition/layer"] == str(cell.layer)
        assert tags["dagster/partition/range"] == str(cell.range)


def test_the_code_version_is_the_one_that_dagster_compares_with(toy: Toy) -> None:
    toy.run("token_dataset")
    declared = toy.asset("token_dataset")
    assert set(declared.code_versions_by_key.values()) == {
        tags_of(toy, "token_dataset", ALL)["dagster/code_version"]
    }


def test_an_event_points_at_the_event_of_each_input(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache", "latent_records")
    tokens = toy.events("token_dataset", ALL)[0]
    for cell in toy.study.cells:
        cache = toy.events("activation_cache", cell)[0]
        assert input_of(toy, "latent_records", cell, "activation_cache") == (
            toy.head("activation_cache", cell).content_hash,
            str(cache.storage_id),
        )
        assert input_of(toy, "latent_records", cell, "token_dataset") == (
            toy.head("token_dataset", ALL).content_hash,
            str(tokens.storage_id),
        )


def test_an_input_is_found_behind_many_newer_events_of_other_places(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache")
    for _ in range(9):  # two events each; of all six places together a run asks for twelve
        toy.run("activation_cache", cells=slice(0, 1))
    toy.run("latent_records")
    for cell in toy.study.cells:
        cache = toy.events("activation_cache", cell)[0]
        assert input_of(toy, "latent_records", cell, "activation_cache") == (
            toy.head("activation_cache", cell).content_hash,
            str(cache.storage_id),
        )


def test_of_several_partitions_the_newest_event_is_named(toy: Toy) -> None:
    toy.run_all()
    cells = [cell for cell in toy.study.cells if cell.layer == H0]
    newest = max(
        (toy.events("latent_metrics", cell)[0] for cell in cells), key=lambda e: e.storage_id
    )
    version, pointer = input_of(toy, "layer_metrics", H0, "latent_metrics")
    assert pointer == str(newest.storage_id)
    event = newest.asset_materialization
    assert event is not None
    assert (event.tags or {})["dagster/data_version"] == version


def test_external_inputs_are_named_by_what_was_observed_of_them(toy: Toy) -> None:
    toy.versions = {"subject_model": "weights", "sparse_coders sae@h.1": "trained on"}
    toy.run("token_dataset", "activation_cache")
    cell = next(cell for cell in toy.study.cells if cell.layer == H1)
    for asset, place, version in (
        ("subject_model", ALL, "weights"),
        ("sparse_coders", H1, "trained on"),
    ):
        observed = toy.events(asset, place)[0]
        assert input_of(toy, "activation_cache", cell, asset) == (version, str(observed.storage_id))


def observed_versions(toy: Toy, asset: str, place: Place) -> list[str]:
    """The oldest first."""
    events = [record.asset_observation for record in reversed(toy.events(asset, place))]
    return [(event.tags or {})["dagster/data_version"] for event in events if event is not None]


def test_external_inputs_are_observed_when_they_have_changed_and_only_then(toy: Toy) -> None:
    for version in ("a", "a", "b", "a"):
        toy.versions = {"subject_model": version, "corpus": "same", "sparse_coders sae@h.0": "c"}
        toy.run("token_dataset", "activation_cache")
    assert observed_versions(toy, "subject_model", ALL) == ["a", "b", "a"]
    assert observed_versions(toy, "corpus", ALL) == ["same"]
    assert observed_versions(toy, "sparse_coders", H0) == ["c"]
    assert observed_versions(toy, "sparse_coders", H1) == ["sparse_coders sae@h.1 as it was"]


def test_a_run_over_some_cells_reports_these_and_no_others(toy: Toy) -> None:
    toy.run("token_dataset")
    toy.run("activation_cache", cells=slice(1, 2))
    cells = toy.study.cells
    assert [c for c in cells if toy.events("activation_cache", c)] == [cells[1]]


def test_a_cell_that_a_run_makes_besides_is_reported_too(toy: Toy) -> None:
    """The cache commits every range of a layer, whichever was asked for."""

    def commit_of(stage: StageRun, place: Place) -> Commit:
        commit = Commit([stage.store.put_table(LINES, lines("shared"))], {})
        for cell in stage.pending_cells([c for c in toy.study.cells if c.layer == H0]):
            if cell != place:
                stage.commit(cell, commit)
        return commit

    toy.run("token_dataset")
    toy.commit_of = commit_of
    toy.run("activation_cache", cells=slice(1, 2))
    mine = [cell for cell in toy.study.cells if cell.layer == H0]
    assert [tags_of(toy, "activation_cache", cell)["dagster/data_version"] for cell in mine] == [
        toy.head("activation_cache", cell).content_hash for cell in mine
    ]


def test_a_study_that_links_has_events_and_input_versions_of_its_own(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache")
    other = replace(toy, name="other", computed=[])
    other.run("token_dataset", "activation_cache")
    cell = toy.study.cells[0]
    tokens = other.events("token_dataset", ALL)[0]
    assert other.computed == []
    assert input_of(other, "activation_cache", cell, "token_dataset") == (
        toy.head("token_dataset", ALL).content_hash,
        str(tokens.storage_id),
    )


def test_metadata_say_what_was_made_and_what_it_cost(toy: Toy) -> None:
    def commit_of(stage: StageRun, place: Place) -> Commit:
        return Commit(
            [stage.store.put_table(LINES, lines("a", "b")), stage.store.put_table(
                LINES, lines("c"), name="more")],
            {"n": 3, "share": 0.5, "is_good": True, "what": "words", "reasons": {"rare": 2},
             "median": None},
            complete=False,
            usage={"prompt_tokens": 12, "usd": 0.25},
            shown={"preview": dg.MetadataValue.md("| a |")},
        )  # fmt: skip

    toy.commit_of = commit_of
    toy.run("token_dataset")
    metadata = toy.event("token_dataset", ALL).metadata
    head = toy.head("token_dataset", ALL)
    values = {name: value.value for name, value in metadata.items()}
    assert values == {
        "n": 3, "share": 0.5, "is_good": True, "what": "words", "reasons": {"rare": 2},
        "median": None, "prompt_tokens": 12.0, "usd": 0.25, "preview": "| a |",
        "dagster/row_count": 3, "n_bytes": sum(blob.n_bytes for blob in head.blobs),
        "seconds": head.provenance.seconds, "complete": False, "manifest": head.path,
    }  # fmt: skip
    assert isinstance(metadata["is_good"], dg.BoolMetadataValue)  # not the int that a bool is
