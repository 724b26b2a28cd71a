"""Which Dagster runs make a set of places: all of it, nothing else, an input before its readers."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.adapters.heads import Name
from autointerp_dagster.cli.run import Selection, _runs_over
from autointerp_dagster.core.types import Cell, Place
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import STAGES, Stage, inputs_at, places_of, upstream_of

LOCAL = {"source": "none"}
STUDY = Study.model_validate(
    {
        "name": "s",
        "models": {
            "subject": LOCAL,
            "explainer": LOCAL,
            "embedder": {"source": "none", "query_prefix": ""},
        },
        "corpus": {"kind": "embedded"},
        "coders": {"sae": {"path": "none"}, "other": {"path": "none"}},
        "layers": ["h.0", "h.1"],
        "max_num_latents": 30,
        "range_size": 10,
        "explainers": {"default": {"kind": "default"}},
        "sampling": {"negative_kinds": ["random", "neighbour", "similar"]},
        "scorers": {"detection": {}, "intruder": {}},
        "floors": {"donor_block": 10},
    }
)
WHOLE = Selection.of(STUDY, None, None, None)
PLACES: list[tuple[Stage, Place]] = [
    (stage, place) for stage in WHOLE.stages for place in places_of(STUDY, stage.scope)
]
EDGES: list[tuple[Name, Name]] = [
    ((up.name, str(source)), (stage.name, str(place)))
    for stage, place in PLACES
    for up in upstream_of(STUDY, stage)
    for source in inputs_at(STUDY, stage, place, up)
]
"""(input, what is made from it)."""
ALL_NAMES = {(stage.name, str(place)) for stage, place in PLACES}


def made_by(selection: Selection, only: set[Name]) -> list[list[tuple[str, str]]]:
    """By run: (stage, place), in the order in which a run makes them."""
    runs = []
    for stages, places in _runs_over(STUDY, selection, only):
        at = [str(place) for place in places] or ["all"]
        runs.append([(stage.name, place) for stage in stages for place in at])
        cells = [place for place in places if isinstance(place, Cell)]
        assert set(cells) == set(between(cells))
    return runs


def between(cells: list[Cell]) -> list[Cell]:
    """What a run takes whose first and last cells are these."""
    if not cells:
        return []
    layers, ranges = STUDY.layer_keys, STUDY.ranges
    first, last = cells[0], cells[-1]
    rows = layers[layers.index(first.layer) : layers.index(last.layer) + 1]
    columns = ranges[ranges.index(first.range) : ranges.index(last.range) + 1]
    return [Cell(layer, block) for layer, block in product(rows, columns)]


@given(st.sets(st.sampled_from(sorted(ALL_NAMES))) | st.just(ALL_NAMES))
@settings(max_examples=60, deadline=None)
def test_runs_make_each_place_once_and_its_inputs_before_it(only: set[Name]) -> None:
    order = [name for run in made_by(WHOLE, only) for name in run]
    assert sorted(order) == sorted(only)
    when = {name: i for i, name in enumerate(order)}
    for above, mine in EDGES:
        if above in only and mine in only:
            assert when[above] < when[mine]


def test_a_whole_study_is_made_in_few_runs() -> None:
    # Tokens and embeddings; the cache; what reads its neighbours; the layers; the study.
    assert len([run for run in made_by(WHOLE, ALL_NAMES) if run]) == 5


@pytest.mark.parametrize("until", [None, "latent_records"])
def test_nothing_outside_of_the_selection_is_made(until: str | None) -> None:
    selection = Selection.of(STUDY, ["sae@h.1"], [str(STUDY.ranges[0])], until)
    made = {name for run in made_by(selection, ALL_NAMES) for name in run}
    places = {place for name, place in made if STAGES[name].scope != "study"}
    assert places == {f"sae@h.1/{STUDY.ranges[0]}"}
    assert {"token_dataset", "window_embeddings"} <= {name for name, _ in made}
    assert ("latent_metrics" in {name for name, _ in made}) == (until is None)


def test_no_run_is_made_of_nothing() -> None:
    assert [run for run in made_by(WHOLE, set()) if run] == []
