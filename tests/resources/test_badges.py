"""The badges of partitions in the UI and ``autointerp stale`` say the same, and where they cannot.

Dagster's staleness is not transitive: a badge is one of a place that has itself a cause; what
merely follows has none until its input has changed. It compares events and code versions, so it
does not see what happens to files, nor places that a study does not have any more.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions import data_version
from toy import H0, Name, Toy
from ui import Badge, badges

from autointerp_dagster.core.scorers import detection
from autointerp_dagster.core.types import Place
from autointerp_dagster.resources.events import observe_outside_runs
from autointerp_dagster.resources.identities import Identities
from autointerp_dagster.resources.staleness import OutOfDate, out_of_date
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study.stages import STAGES, places_of, stages_of

CODE = {"code", "parameter", "prompt", "model", "cut_short"}
"""Kinds of causes that Dagster calls a new code version."""
SMALL = {"scorers": {"detection": {}}, "max_num_latents": 20}
Change = Callable[[Toy, pytest.MonkeyPatch], None]
Ask = Callable[[Toy], dict[Name, Badge]]
NO_TELEMETRY = {"telemetry": {"enabled": False}}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """All of it, made once. Do not run it again."""
    root = tmp_path_factory.mktemp("made")
    (root / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(root / "home"), overrides=NO_TELEMETRY) as kept:
        toy = Toy(root / "store", kept, changes=dict(SMALL))
        toy.run_all()
        yield toy


@pytest.fixture
def made(made_once: Toy, tmp_path: Path) -> Iterator[Toy]:
    """The same, with its own store and records."""
    shutil.copytree(made_once.root.parent, tmp_path, dirs_exist_ok=True)
    home = str(tmp_path / "home")
    with dg.DagsterInstance.local_temp(home, overrides=NO_TELEMETRY) as instance:
        yield replace(made_once, root=tmp_path / "store", instance=instance, computed=[])


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    return lambda toy: badges(toy, tmp_path / "studies", monkeypatch)


def listed(toy: Toy) -> dict[Name, OutOfDate]:
    identities = Identities(toy._external(), lambda stage: toy.models.get(stage, {}))
    return {one.name: one for one in out_of_date(toy.study, toy.store, identities)}


def expected(toy: Toy, found: Mapping[Name, OutOfDate]) -> dict[Name, Badge]:
    """The badges that follow from what `autointerp stale` lists."""
    names = [
        (stage.name, str(place))
        for stage in stages_of(toy.study)
        if not stage.is_external
        for place in places_of(toy.study, stage.scope)
    ]
    return {name: badge_of(found[name]) if name in found else Badge("FRESH") for name in names}


def badge_of(one: OutOfDate) -> Badge:
    kinds = {cause.kind for cause in one.causes}
    if "never_made" in kinds:
        return Badge("MISSING")
    causes = {("CODE", *one.name)} if kinds & CODE else set()
    for cause in one.causes:
        if cause.kind in ("external", "input"):
            causes |= {("DATA", str(cause.asset), cell) for cell in cause.cells}
    return Badge("STALE" if one.is_direct else "FRESH", frozenset(causes))


def observe_new_weights(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    toy.versions = {"sparse_coders sae@h.0": "trained on"}
    stage = STAGES["sparse_coders"]
    observe_outside_runs(toy.instance, toy.study, stage, H0, "trained on", {})


def edit_parameter_version_and_prompt(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    toy.changes = {**toy.changes, "sampling": {"n_test": 12}}
    patch.setitem(STAGES, "activation_cache", replace(STAGES["activation_cache"], version="next"))
    patch.setattr(detection, "VERSION", "another wording")


def replace_all_activations(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    observe_new_weights(toy, patch)
    toy.contents = {("activation_cache", str(cell)): "anew" for cell in toy.study.cells}
    toy.run("activation_cache")


def replace_metrics_of_one_cell(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(STAGES, "latent_metrics", replace(STAGES["latent_metrics"], version="next"))
    toy.contents = {("latent_metrics", str(toy.study.cells[0])): "anew"}
    toy.run("latent_metrics", cells=slice(0, 1))


@pytest.mark.parametrize(
    ("change", "n_stale", "n_following"),
    [
        (edit_parameter_version_and_prompt, 12, 11),
        (observe_new_weights, 4, 8),
        (replace_all_activations, 4, 6),
        (replace_metrics_of_one_cell, 5, 1),
    ],
)
def test_a_badge_is_on_places_with_a_cause_of_their_own_and_names_it(
    made: Toy, ask: Ask, monkeypatch: pytest.MonkeyPatch,
    change: Change, n_stale: int, n_following: int,
) -> None:  # fmt: skip
    change(made, monkeypatch)
    shown, found = ask(made), listed(made)
    assert shown == expected(made, found)
    assert sum(badge.status == "STALE" for badge in shown.values()) == n_stale
    assert sum(not one.is_direct for one in found.values()) == n_following


def test_a_stage_never_made_is_missing_and_a_finished_study_has_no_badge(
    made: Toy, ask: Ask
) -> None:
    assert {badge.status for badge in ask(made).values()} == {"FRESH"}
    made.changes = {**SMALL, "scorers": {"detection": {}, "fuzzing": {}}}
    shown = ask(made)
    statuses = {name: badge.status for name, badge in shown.items()}
    assert statuses == {n: b.status for n, b in expected(made, listed(made)).items()}
    assert {n for (n, _), status in statuses.items() if status == "MISSING"} == {"score_fuzzing"}
    assert {n for (n, _), status in statuses.items() if status == "STALE"} == {"latent_metrics"}


def test_what_dagster_is_not_told_of_has_no_badge(made: Toy, ask: Ask) -> None:
    """Files: weights before anybody has observed them, a local model, and what the store lost."""
    made.versions = {"sparse_coders sae@h.0": "trained on"}
    made.models = {"score_detection": {"judge": "other weights in the same folder"}}
    (blob,) = made.head("latent_records", made.study.cells[0]).blobs
    (made.root / blob.path).unlink()
    path = made.root / str(made.head("latent_metrics", made.study.cells[0]).path)
    path.write_text(path.read_text() + " ")
    kinds = {
        (one.asset, one.cell.split("/")[0]): {cause.kind for cause in one.causes} - {"follows"}
        for one in reversed(listed(made).values())
        if one.is_direct
    }
    assert kinds == {
        ("activation_cache", "sae@h.0"): {"external"},
        ("explanations", "sae@h.0"): {"external"},
        ("latent_records", "sae@h.0"): {"lost"},
        ("score_detection", "sae@h.0"): {"model"},
        ("score_detection", "sae@h.1"): {"model"},
        ("latent_metrics", "sae@h.0"): {"damaged"},
    }
    assert {badge.status for badge in ask(made).values()} == {"FRESH"}


def test_what_rested_on_a_layer_that_was_taken_out_has_no_badge(made: Toy, ask: Ask) -> None:
    made.changes = {**made.changes, "layers": ["h.1"]}
    (one,) = listed(made).values()
    assert one.name == ("study_metrics", "all")
    assert {cause.kind for cause in one.causes} == {"input"}
    assert {badge.status for badge in ask(made).values()} == {"FRESH"}


def test_an_edge_of_a_hundred_partitions_and_more_has_no_badge(
    made: Toy, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of three: layer metrics have a badge each, and so will study metrics after them."""
    monkeypatch.setattr(data_version, "SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD", 3)
    replace_metrics_of_one_cell(made, monkeypatch)
    found, shown = listed(made), ask(made)
    (cause, _) = found["study_metrics", "all"].causes[:2]
    assert (cause.kind, cause.asset) == ("input", "latent_metrics")
    assert shown["study_metrics", "all"].status == "FRESH"
    assert shown["layer_metrics", str(H0)].status == "STALE"


def test_what_was_replaced_while_it_was_read_has_a_badge_at_once(made: Toy, ask: Ask) -> None:
    """A run reads one version of an input, to its end; the event says which, not the newest."""
    cell = made.study.cells[0]
    meanwhile = replace(
        made, versions={"sparse_coders sae@h.0": "trained on"},
        contents={("activation_cache", str(cell)): "anew"},
    )  # fmt: skip

    def commit_of(stage: StageRun, place: Place) -> Commit:
        stage.input("activation_cache", cell)
        if place == cell:
            meanwhile.run("activation_cache", cells=slice(0, 1))
        return Commit([], {})

    made.changes = {**made.changes, "sampling": {"n_test": 12}}
    meanwhile.changes = made.changes
    replace(made, commit_of=commit_of).run("latent_records", cells=slice(0, 2))
    found = listed(meanwhile)
    assert [cause.text for cause in found["latent_records", str(cell)].causes] == [
        f"input: activation_cache {cell} was replaced",
    ]
    shown = ask(meanwhile)
    assert shown == expected(meanwhile, found)
