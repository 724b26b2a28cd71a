"""What is out of date, and why: against the rule of a run, and against what Dagster says."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ALL, H0, Toy

from autointerp_dagster.adapters.heads import read_heads
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.types import Place
from autointerp_dagster.resources.identities import Identities
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.staleness import (
    Cause,
    OutOfDate,
    out_of_date,
    parameter_changes,
)
from autointerp_dagster.study.stages import STAGES, inputs_at, places_of, stages_of, upstream_of

SCORERS = {"scorers": {"detection": {}}}
MODELS = {"explanations": {"explainer": "large"}, "score_detection": {"judge": "small"}}


def identities_of(toy: Toy) -> Identities:
    return Identities(toy._external(), lambda stage: toy.models.get(stage, {}))


def found_in(toy: Toy) -> dict[tuple[str, str], OutOfDate]:
    return {one.name: one for one in out_of_date(toy.study, toy.store, identities_of(toy))}


def causes(toy: Toy, asset: str, place: Place) -> list[Cause]:
    found = found_in(toy).get((asset, str(place)))
    return [] if found is None else [cause for cause in found.causes if cause.kind != "follows"]


def direct(toy: Toy) -> set[tuple[str, str]]:
    return {name for name, one in found_in(toy).items() if one.is_direct}


def paths(toy: Toy) -> dict[tuple[str, str], str | None]:
    return {n: head.path for n, head in read_heads(toy.store, toy.name).manifests.items()}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """All of it, made once. Do not run it again."""
    with dg.DagsterInstance.ephemeral() as kept:
        toy = Toy(tmp_path_factory.mktemp("toy"), kept, models=dict(MODELS), changes=dict(SCORERS))
        toy.run_all()
        yield toy


@pytest.fixture
def made(made_once: Toy, tmp_path: Path) -> Toy:
    """The same, to be looked at with other parameters, or with files that are lost."""
    shutil.copytree(made_once.root, tmp_path / "copy")
    return replace(made_once, root=tmp_path / "copy", computed=[])


def test_before_the_first_run_every_place_was_never_made(toy: Toy) -> None:
    found = found_in(toy)
    assert {name for name, one in found.items() if one.causes[0].text == "never made"} == {
        (stage.name, str(place))
        for stage in stages_of(toy.study)
        if not stage.is_external
        for place in places_of(toy.study, stage.scope)
    }
    (token_dataset, cache) = (found["token_dataset", "all"], found["activation_cache", CELL])
    assert [cause.kind for cause in token_dataset.causes] == ["never_made"]
    assert [cause.kind for cause in cache.causes] == ["never_made", "follows"]


def test_what_was_just_made_is_current(made: Toy) -> None:
    assert found_in(made) == {}
    assert made.not_fresh() == set()


CELL = "sae@h.0/0000000-0000009"


def change_weights(toy: Toy) -> None:
    toy.versions = {"sparse_coders sae@h.0": "trained on"}


def change_corpus(toy: Toy) -> None:
    toy.versions = {"corpus": "more text"}


def change_judge(toy: Toy) -> None:
    toy.models = {**MODELS, "score_detection": {"judge": "large"}}


def change_a_parameter(toy: Toy) -> None:
    toy.changes = {**SCORERS, "sampling": {"n_test": 12}}


def lose_a_table(toy: Toy) -> None:
    (blob,) = toy.head("latent_records", toy.study.cells[0]).blobs
    (toy.root / blob.path).unlink()


def damage_a_manifest(toy: Toy) -> None:
    path = toy.root / str(toy.head("latent_records", toy.study.cells[0]).path)
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(
    ("change", "asset", "place", "texts"),
    [
        (change_weights, "activation_cache", CELL, [
            "weights: sparse_coders sae@h.0 changed, sparse_coder -> trained on"]),
        (change_corpus, "token_dataset", "all", [
            "corpus: corpus all changed, corpus all a -> more text"]),
        (change_judge, "score_detection", CELL, ['model: judge "small" -> "large"']),
        (change_a_parameter, "latent_records", CELL, ["parameter: n_test 100 -> 12"]),
        (lose_a_table, "latent_records", CELL, ["lost: no longer in the store: lines"]),
    ],
)  # fmt: skip
def test_the_cause_is_named(
    made: Toy, change: Callable[[Toy], None], asset: str, place: str, texts: list[str]
) -> None:
    change(made)
    found = found_in(made)[asset, place]
    assert [cause.text for cause in found.causes if cause.kind != "follows"] == texts


def test_what_rests_on_it_follows_down_to_the_end_and_nothing_else_does(made: Toy) -> None:
    change_weights(made)
    found = found_in(made)
    assert {name for name, one in found.items() if one.is_direct} == {
        (asset, str(cell))
        for asset in ("activation_cache", "explanations")
        for cell in made.study.cells
        if cell.layer == H0
    }
    assert {cell for _, cell in found} == {
        *(str(cell) for cell in made.study.cells if cell.layer == H0), str(H0), "all",
    }  # fmt: skip
    (cause,) = found["latent_records", CELL].causes
    assert (cause.asset, cause.cells) == ("activation_cache", (CELL,))
    assert cause.text == f"follows activation_cache {CELL}, which is out of date"
    (cause,) = found["layer_metrics", str(H0)].causes[:1]
    assert cause.cells == tuple(str(cell) for cell in made.study.cells if cell.layer == H0)
    assert ("token_dataset", "all") not in found


def test_a_raised_version_is_code(made: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = replace(STAGES["latent_records"], version="next")
    monkeypatch.setitem(STAGES, "latent_records", raised)
    (cause,) = causes(made, "latent_records", made.study.cells[0])
    assert cause.kind == "code"
    assert cause.text == f"code: version {cause.old} -> next"
    assert direct(made) == made.not_fresh()


def test_a_replaced_input_is_named_with_its_place(toy: Toy) -> None:
    toy.run("token_dataset", "activation_cache", "latent_records")
    toy.versions = {"subject_model": "other weights"}
    toy.contents = {("activation_cache", str(cell)): f"{cell} anew" for cell in toy.study.cells}
    toy.run("token_dataset", "activation_cache")
    cell = toy.study.cells[0]
    assert [cause.text for cause in causes(toy, "latent_records", cell)] == [
        f"input: activation_cache {cell} was replaced"
    ]
    assert causes(toy, "token_dataset", ALL) == []
    assert direct(toy) == toy.not_fresh()


def test_an_input_that_comes_and_one_that_goes_are_named(made: Toy) -> None:
    made.changes = {
        "scorers": {"embedding": {}},
        "models": {"embedder": {"source": "none", "query_prefix": ""}},
    }
    texts = [cause.text for cause in causes(made, "latent_metrics", made.study.cells[0])]
    assert [text for text in texts if text.startswith("input")] == [
        f"input: score_detection {CELL} is none any more",
    ]
    kinds = [cause.kind for cause in found_in(made)["score_embedding", CELL].causes]
    assert kinds == ["never_made"]


def test_a_smaller_grid_is_another_input(made: Toy) -> None:
    made.changes = {**SCORERS, "layers": ["h.0"]}
    (first, *_) = causes(made, "study_metrics", ALL)
    assert first.kind == "input"
    assert "is none any more" in first.text


def test_a_cut_short_place_is_out_of_date_for_dagster_too(toy: Toy) -> None:
    stages = ("token_dataset", "activation_cache", "latent_records", "explanations")
    cell = toy.study.cells[1]
    toy.cut_short = {("explanations", str(cell))}
    toy.run(*stages)
    assert [cause.kind for cause in causes(toy, "explanations", cell)] == ["cut_short"]
    assert ("explanations", str(cell)) in toy.not_fresh()
    assert direct(toy) == toy.not_fresh()
    toy.cut_short = set()
    toy.run(*stages)
    assert {name for name, _ in toy.not_fresh()}.isdisjoint(stages)
    assert direct(toy) == toy.not_fresh()


def test_a_damaged_manifest_is_told_and_what_rests_on_it_follows(made: Toy) -> None:
    damage_a_manifest(made)
    found = found_in(made)
    (cause,) = found["latent_records", CELL].causes
    assert cause.kind == "damaged"
    assert "does not match the manifest's name" in cause.text
    assert [cause.kind for cause in found["explanations", CELL].causes] == ["follows"]


def test_weights_that_cannot_be_read_are_a_cause_of_their_own(made: Toy) -> None:
    def gone(_: Place) -> str:
        raise CoderError("no such file")

    identities = Identities({**made._external(), "sparse_coders": gone}, identities_of(made).models)
    found = out_of_date(made.study, made.store, identities)
    asset = next(one for one in found if one.asset == "activation_cache")
    assert asset.causes == (
        Cause("unreadable", "unreadable: sparse_coders sae@h.0: no such file",
              asset="sparse_coders", cells=("sae@h.0",)),
    )  # fmt: skip


def test_a_run_computes_what_was_listed_and_then_nothing_is_out_of_date(
    made: Toy, instance: dg.DagsterInstance
) -> None:
    made.instance = instance
    for change in (change_weights, change_judge, lose_a_table):
        change(made)
    listed, before = found_in(made), paths(made)
    made.run_all()
    new = {name for name, path in paths(made).items() if before[name] != path}
    assert {name for name, one in listed.items() if one.is_direct} <= new <= listed.keys()
    assert found_in(made) == {}
    damage_a_manifest(made)
    made.run("latent_records", cells=slice(0, 1))
    assert found_in(made) == {}


versions = st.dictionaries(
    st.sampled_from(["subject_model", "corpus", "sparse_coders sae@h.0", "sparse_coders sae@h.1"]),
    st.sampled_from(["a", "b"]),
)
models = st.dictionaries(
    st.sampled_from(["explanations", "score_detection", "score_fuzzing"]),
    st.dictionaries(st.sampled_from(["judge", "explainer"]), st.sampled_from(["x", "large"])),
)
changes = st.fixed_dictionaries(
    {},
    optional={
        "sampling": st.fixed_dictionaries({"n_test": st.sampled_from([100, 12])}),
        "layers": st.sampled_from([["h.0", "h.1"], ["h.1"]]),
        "logit_lens": st.booleans(),
    },
)


def is_skipped(toy: Toy, identities: Identities, asset: str, place: Place) -> bool:
    """The rule itself, place by place."""
    inputs = StageInputs.of(
        toy.store,
        toy.study,
        asset,
        models=identities.models(asset),
        external=identities.external,
    )
    above = [
        (up, source)
        for up in upstream_of(toy.study, inputs.stage)
        for source in inputs_at(toy.study, inputs.stage, place, up)
    ]
    if not all(up.is_external or toy.has_head(up.name, source) for up, source in above):
        return False
    return inputs.is_current(place)


@given(versions, models, changes)
@settings(max_examples=10, deadline=None)
def test_listed_by_themselves_are_exactly_the_places_that_a_run_would_not_skip(
    made_once: Toy, versions: dict, models: dict, changes: dict
) -> None:
    changed = {**SCORERS, **changes}
    toy = replace(made_once, versions=versions, models={**MODELS, **models}, changes=changed)
    identities = identities_of(toy)
    assert direct(toy) == {
        (stage.name, str(place))
        for stage in stages_of(toy.study)
        if not stage.is_external
        for place in places_of(toy.study, stage.scope)
        if not is_skipped(toy, identities, stage.name, place)
    }


trees = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("pqr"), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from("xyz"), trees), st.dictionaries(st.sampled_from("xyz"), trees)
)
def test_parameters_that_differ_are_named_and_only_these(before: dict, now: dict) -> None:
    found = list(parameter_changes(before, now, {}))
    assert (found == []) == (json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True))

    def at(tree: object, keys: list[str]) -> object:
        for key in keys:
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree

    for cause in found:
        keys = str(cause.key).split(".")
        assert (cause.old, cause.new) == (at(before, keys), at(now, keys))
