"""Checks of results: counts and tables to what was found, by hand."""

from collections.abc import Mapping
from math import isnan

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.core.checks import (
    Bounds,
    Counts,
    Findings,
    Rebuilt,
    failed_counts,
    failed_rate,
    failed_reasons,
    floor_counts,
    judge_floor,
    reconstruction,
    schema,
    schema_fault,
    scored_counts,
    share_scored,
    split_faults,
    splits_disjoint,
)
from autointerp_dagster.core.checks.shares import Held
from autointerp_dagster.core.metrics import HEADLINE
from autointerp_dagster.core.metrics.intervals import wilson
from autointerp_dagster.core.schemas import EXPLANATIONS, SELECTION
from autointerp_dagster.core.sparse_coders import Unexplained
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey


def counts(*pairs: tuple[float, float]) -> Counts:
    """(hits, n) of each latent."""
    hits, n = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return Counts.of(hits, n)


def cell(index: int, layer: str = "h.0") -> Cell:
    start = 16 * index
    return Cell(LayerKey("sae", layer), LatentRange(start, start + 16))


def held(
    places: Mapping[Cell, Counts], least: float, most: float, n_compared: int | None = None
) -> Held:
    n_compared = len(places) if n_compared is None else n_compared
    return Bounds(least, most, n_compared).held({"": places} if places else {})


def test_a_share_of_latents_counted_once_each_has_wilsons_interval() -> None:
    share = counts(*[(1, 1)] * 3, *[(0, 1)] * 7).share()
    lo, hi = wilson(np.array([0.3]), np.array([10.0]), 0.95)
    assert share.value == pytest.approx(0.3)
    assert (share.lo, share.hi) == (pytest.approx(lo[0]), pytest.approx(hi[0]))
    assert share.text == "0.300 [0.108, 0.603] of 10"


def test_answers_that_fail_together_by_latent_leave_more_doubt() -> None:
    """Half of 200 answers failed: all those of 5 latents of 10, or every other one of each."""
    together = counts(*[(20, 20)] * 5, *[(0, 20)] * 5).share()
    apart = counts(*[(10, 20)] * 10).share()
    assert together.value == apart.value == 0.5
    # 10 latents that are worth an answer each: Wilson's interval of 5 in 10 is .24 to .76.
    assert together.lo < 0.24
    assert together.hi > 0.76
    # Spread more evenly than by chance: no less sure than 200 answers apart, .43 to .57.
    assert apart.lo == pytest.approx(0.431, abs=0.001)


def test_nothing_counted_is_let_through() -> None:
    share = counts().share()
    assert share.n == 0
    assert isnan(share.value)
    assert held({cell(0): counts()}, 0.2, 0.8).passed
    assert held({}, 0.2, 0.8).passed


def test_only_an_interval_wholly_beyond_the_bound_says_no() -> None:
    # 3 of 10: .108 to .603.
    places = {cell(0): counts(*[(1, 1)] * 3, *[(0, 1)] * 7)}
    assert held(places, 0.0, 0.11).passed
    assert not held(places, 0.0, 0.10).passed
    assert held(places, 0.6, 1.0).passed
    assert not held(places, 0.61, 1.0).passed


def test_one_broken_place_among_sound_ones_says_no_and_is_named() -> None:
    sound = counts(*[(0, 20)] * 50)
    broken = counts(*[(20, 20)] * 10)
    found = held({cell(i): sound for i in range(99)} | {cell(99): broken}, 0.0, 0.2)
    assert found.whole[""].hi < 0.2  # alone it would be let through
    assert not found.passed
    assert list(found.offenders) == [str(cell(99))]


def test_a_broken_layer_is_named_though_none_of_its_cells_is_sure() -> None:
    sound, doubtful = counts(*[(0, 20)] * 50), counts(*[(20, 20)] * 2, *[(0, 20)] * 2)
    bad = {cell(i, "h.1"): doubtful for i in range(20)}
    found = held({cell(i): sound for i in range(20)} | bad, 0.0, 0.2)
    assert list(found.offenders) == ["sae@h.1"]
    assert not found.passed
    # The same verdict whatever else a run looks at.
    assert held(bad, 0.0, 0.2, 40).offenders == found.offenders


def test_a_group_that_fails_is_named_though_others_outweigh_it() -> None:
    good, bad = counts(*[(0, 10)] * 40), counts(*[(10, 10)] * 40)
    groups = {name: {cell(0): good} for name in "abcd"} | {"broken": {cell(0): bad}}
    found = Bounds(0.0, 0.2).held(groups)
    assert not found.passed
    assert list(found.offenders) == [f"{cell(0)} broken"]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=20),
    st.integers(1, 19),
)
def test_counts_of_parts_added_are_those_of_all(pairs: list[tuple[int, int]], at: int) -> None:
    pairs = [(min(hits, n), n) for hits, n in pairs]
    at = min(at, len(pairs) - 1)
    parts = [counts(*pairs[:at]), counts(*pairs[at:])]
    assert Counts.together(parts) == pytest.approx(counts(*pairs))


def test_offenders_stand_in_order_of_how_far_beyond_they_are() -> None:
    half, all_of_them = counts(*[(10, 20)] * 30), counts(*[(20, 20)] * 30)
    places = {cell(0, "h.1"): half, cell(1): all_of_them}
    assert list(held(places, 0.0, 0.2).offenders) == [str(cell(1)), str(cell(0, "h.1"))]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_a_share_lies_in_its_interval_in_the_unit_range(pairs: list[tuple[int, int]]) -> None:
    share = counts(*((min(hits, n), n) for hits, n in pairs)).share()
    assert 0 <= share.lo <= share.value <= share.hi <= 1
    assert share.hi - share.lo < 1


ANSWERS = {
    "latent": pl.UInt32,
    "explainer": pl.String,
    "status": pl.String,
    "reason": pl.String,
}


def sums(counts: Counts) -> tuple[float, float, float]:
    """Latents, hits, and of how many."""
    return counts[:3]


def test_failed_rate_counts_what_was_asked_and_not_what_a_budget_left() -> None:
    rows = pl.DataFrame(
        [
            (0, "a", "ok", None),
            (0, "a", "failed", "unparsable"),
            (0, "a", "failed", "budget"),
            (0, "a", "failed", "deadline"),
            (1, "a", "failed", "call_failed"),
            (1, "a", "failed", "not_recorded"),
            (2, "a", "failed", "off_target"),
            (3, "a", "skipped", "dead"),
            (0, "b", "ok", None),
            (0, None, "failed", "no_vector"),
        ],
        schema=ANSWERS,
        orient="row",
    )
    found = failed_counts(rows)
    assert {name: sums(of) for name, of in found.items()} == {
        "a": (2, 2, 3),
        "b": (1, 0, 1),
        "": (1, 1, 1),
    }
    assert failed_reasons(rows) == {"call_failed": 1, "no_vector": 1, "unparsable": 1}


def test_failed_rate_says_what_was_found_wanted_and_to_be_done() -> None:
    bad, good = counts(*[(20, 20)] * 5), counts(*[(0, 20)] * 5)
    places = {
        cell(0): Findings(failed={"default": bad}, reasons={"refused": 10, "unparsable": 80}),
        cell(1): Findings(failed={"default": good}, reasons={"unparsable": 10}),
    }
    outcome = failed_rate(places, Bounds(0.0, 0.2))
    assert not outcome.passed
    assert outcome.numbers["failed_rate default"] == 0.5
    assert outcome.numbers["n_asked"] == 200
    assert list(outcome.offenders) == [f"{cell(0)} default", "sae@h.0 default"]
    assert "found default 0.500 [" in outcome.line
    assert "(unparsable 90, refused 10)" in outcome.line
    assert "wanted a share of at most 0.2" in outcome.line
    assert "checks.failed_rate" in outcome.line
    assert "\n" not in outcome.line
    assert failed_rate(places, Bounds(0.0, 0.9)).passed
    assert failed_rate({}, Bounds(0.0, 0.2)).passed


def test_an_explainer_that_asks_nobody_does_not_hide_another_that_fails() -> None:
    answers = {"default": counts(*[(4, 10)] * 40), "top_tokens": counts(*[(0, 10)] * 40)}
    outcome = failed_rate({cell(0): Findings(failed=answers)}, Bounds(0.0, 0.25))
    assert list(outcome.offenders) == [f"{cell(0)} default"]


def metrics(*rows: tuple[int, str | None, str, float | None, str]) -> pl.DataFrame:
    """(latent, explainer, scorer, value, status) of headline metrics."""
    headline = {name: HEADLINE[name] for name in ("detection", "intruder", "intervention")}
    frame = pl.DataFrame(
        rows,
        schema={
            "latent": pl.UInt32,
            "explainer": pl.String,
            "scorer": pl.String,
            "value": pl.Float64,
            "status": pl.String,
        },
        orient="row",
    )
    return frame.with_columns(
        subject=pl.lit("own"),
        variant=pl.lit("all"),
        metric=pl.col("scorer").replace_strict(headline),
    )


def test_share_scored_counts_latents_that_could_be_scored_by_each_scorer() -> None:
    found = metrics(
        (0, "a", "detection", 0.9, "ok"),
        (0, "b", "detection", None, "no_explanation"),
        (1, "a", "detection", None, "failed"),
        (1, "b", "detection", None, "unasked"),  # a budget
        (2, "a", "detection", None, "no_explanation"),  # a rare latent
        (3, "b", "detection", None, "no_explanation"),  # skipped
        (4, "a", "detection", None, "no_explanation"),  # a budget ended before it was explained
        (0, None, "intruder", 0.2, "ok"),
        (1, None, "intruder", None, "too_few"),
        (3, None, "intruder", None, "missing_class"),  # a study without negatives
        (0, "a", "intervention", 0.3, "ok"),
        (1, "a", "intervention", None, "too_few"),  # nobody steered it
        (3, "a", "intervention", None, "failed"),  # no strength was found
        (4, "b", "intervention", None, "failed"),
    )
    steered = pl.DataFrame(
        {
            "latent": pl.Series([3, 3, 4, 4], dtype=pl.UInt32),
            "explainer": ["a", "a", "b", "b"],
            "subject": ["own"] * 4,
            "reason": ["off_target", "off_target", "off_target", "unparsable"],
        }
    )
    of_other_subject = found.with_columns(subject=pl.lit("other"))
    explanations = pl.DataFrame(
        {
            "latent": pl.Series([0, 3, 4], dtype=pl.UInt32),
            "explainer": ["b", "b", "a"],
            "selected": [True, True, True],
            "status": ["failed", "skipped", "failed"],
            "reason": ["unparsable", "no_train_windows", "budget"],
        }
    )
    latents = pl.DataFrame(
        {
            "latent": pl.Series([0, 1, 2, 3, 4], dtype=pl.UInt32),
            "status": ["ok", "ok", "rare", "ok", "ok"],
        }
    )
    counted = scored_counts(pl.concat([found, of_other_subject]), explanations, latents, steered)
    assert {name: sums(of) for name, of in counted.items()} == {
        "detection a": (2, 1, 2),
        "detection b": (1, 0, 1),
        "intruder": (2, 1, 2),
        "intervention a": (1, 1, 1),
        "intervention b": (1, 0, 1),
    }


def test_share_scored_holds_each_scorer_against_the_bound() -> None:
    sound, none = counts(*[(1, 1)] * 40), counts(*[(0, 1)] * 40)
    bounds = Bounds(0.5, 1.0)
    outcome = share_scored(
        {cell(0): Findings(scored={"detection": sound, "fuzzing": none})}, bounds
    )
    assert not outcome.passed
    assert list(outcome.offenders) == [f"{cell(0)} fuzzing"]
    assert share_scored({cell(0): Findings(scored={"detection": sound})}, bounds).passed
    assert share_scored({}, bounds).passed


def verdicts(*rows: tuple[int, str, bool, bool | None]) -> pl.DataFrame:
    """(latent, subject, is_activating, prediction)."""
    frame = pl.DataFrame(
        rows,
        schema={
            "latent": pl.UInt32,
            "subject": pl.String,
            "is_activating": pl.Boolean,
            "prediction": pl.Boolean,
        },
        orient="row",
    )
    return frame.with_columns(variant=pl.lit("all"), explainer=pl.lit("a"))


def test_floor_counts_balance_the_classes_and_leave_the_own_explanation_out() -> None:
    (found,) = floor_counts(
        verdicts(
            (0, "other", True, True),  # sensitivity 1 of 1
            (0, "other", False, False),  # specificity 1 of 3
            (0, "other", False, True),
            (0, "other", False, True),
            (0, "other", False, None),  # failed
            (0, "own", True, True),
            (1, "other", True, True),  # of one class alone
        )
    ).values()
    assert sums(found) == pytest.approx((1, 4 * (1 + 1 / 3) / 2, 4))


def test_a_judge_that_says_the_same_to_all_is_at_one_half() -> None:
    always = verdicts(*((0, "other", bool(i % 3), True) for i in range(9)))
    assert floor_counts(always)["a"].share().value == 0.5


@pytest.mark.parametrize(("right", "passes"), [(20, True), (25, True), (38, False), (2, False)])
def test_judge_floor_blocks_far_from_one_half_on_both_sides(right: int, passes: bool) -> None:
    places = {cell(0): Findings(floor={"a": counts(*[(right, 40)] * 20)})}
    assert judge_floor(places, Bounds(0.35, 0.65)).passed is passes


def selection(*latents: int) -> pl.DataFrame:
    frame = pl.DataFrame({"latent": latents, "is_floor": [False] * len(latents)})
    rows = frame.with_columns(coder=pl.lit("sae"), hookpoint=pl.lit("h.0"), rank=pl.lit(None))
    return rows.select(pl.col(name).cast(kind) for name, kind in SELECTION.columns.items())


def test_schema_finds_columns_types_order_and_repeats() -> None:
    sound = selection(1, 2, 5)
    assert schema_fault(SELECTION, sound.schema, sound) is None
    lacking = sound.drop("rank").with_columns(more=pl.lit(1))
    assert schema_fault(SELECTION, lacking.schema, lacking) == (
        "selection: columns missing ['rank'], unknown ['more']"
    )
    other = sound.cast({"latent": pl.Int64})
    assert schema_fault(SELECTION, other.schema, other) == (
        "selection: column latent is Int64, declared UInt32"
    )
    assert schema_fault(SELECTION, sound.schema, selection(2, 1)) == (
        "selection: rows are not sorted by key"
    )
    assert schema_fault(SELECTION, sound.schema, selection(1, 1)) == "selection: a key repeats"
    assert schema_fault(EXPLANATIONS, EXPLANATIONS.empty().schema, EXPLANATIONS.empty()) is None
    sound_place, bad_place = Findings(n_tables=2), Findings(n_tables=1, table_fault="a key repeats")
    assert schema({cell(0): sound_place}).passed
    outcome = schema({cell(0): sound_place, cell(1): bad_place})
    assert outcome.offenders == {str(cell(1)): "a key repeats"}
    assert outcome.numbers == {"n_faults": 1, "n_tables": 3}
    assert not outcome.passed


def windows(*rows: tuple[int, str, int]) -> pl.DataFrame:
    """(latent, split, context)."""
    return pl.DataFrame(
        rows, schema={"latent": pl.UInt32, "split": pl.String, "context": pl.UInt32}, orient="row"
    )


def test_split_faults_are_windows_in_a_split_that_is_not_their_documents() -> None:
    split_of = np.array([0, 0, 1, 2], dtype=np.int8)
    sound = windows((0, "train", 0), (0, "train", 1), (0, "select", 2), (1, "test", 3))
    assert split_faults(sound, split_of) == (0, None)
    assert split_faults(windows(), split_of) == (0, None)
    assert split_faults(windows(), np.empty(0, dtype=np.int8)) == (0, None)
    wrong = windows((0, "train", 0), (7, "test", 1), (8, "select", 0))
    assert split_faults(wrong, split_of) == (
        2,
        "2 windows, e.g. latent 7 has context 1 in test, which is of train",
    )
    assert split_faults(windows((0, "train", 4)), split_of) == (
        1,
        "1 windows, e.g. latent 0 has context 4 in train, which is not there",
    )
    wrong_place = Findings(n_windows=3, n_wrong_splits=2, split_fault="2 windows")
    assert not splits_disjoint({cell(0): wrong_place}).passed
    assert splits_disjoint({cell(0): Findings(n_windows=3)}).passed


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["train", "select", "test"]))),
)
def test_without_split_faults_no_context_is_in_two_splits(
    split_of: list[int], rows: list[tuple[int, str]]
) -> None:
    frame = windows(*((0, split, context) for context, split in rows))
    n_wrong, _ = split_faults(frame, np.array(split_of, dtype=np.int8))
    n_splits = frame.group_by("context").agg(pl.col("split").n_unique())["split"]
    assert n_wrong > 0 or n_splits.max() in (None, 1)


def fraction(x: torch.Tensor, rebuilt: torch.Tensor, size: int) -> float | None:
    unexplained = Unexplained()
    for part, of in zip(x.split(size), rebuilt.split(size), strict=True):
        unexplained.add(part, of)
    return unexplained.fraction


def test_variance_unexplained_by_hand() -> None:
    # Mean (1, 2): squared distances 1 + 1 and 4 + 4, so 10 in all.
    x = torch.tensor([[0.0, 0], [2, 0], [0, 4], [2, 4]])
    x = x + torch.tensor([1e3, -1e3])
    assert fraction(x, x, 4) == 0.0
    assert fraction(x, x.mean(dim=0).expand(4, 2), 4) == pytest.approx(1.0)
    wrong = x + torch.tensor([1.0, 0])  # 4 of 4 * (1 + 4)
    assert fraction(x, wrong, 4) == pytest.approx(0.2)
    assert fraction(x, wrong, 1) == pytest.approx(0.2)


def test_variance_unexplained_is_unknown_where_nothing_varies() -> None:
    x = torch.full((5, 3), 7.3)
    assert fraction(x, x + 1, 2) is None
    assert Unexplained().fraction is None


def rebuilt(l0: float | None, expected: float | None, fvu: float | None) -> Rebuilt:
    return Rebuilt(l0, expected_l0=expected, fvu=fvu, n_tokens=1000)


@pytest.mark.parametrize(
    ("one", "fault"),
    [
        (rebuilt(30.0, 32.0, 0.2), None),
        (rebuilt(30.0, None, 0.2), None),
        (rebuilt(None, 32.0, None), None),
        (rebuilt(16.0, 32.0, 1.0), None),  # exactly on both bounds
        (rebuilt(15.9, 32.0, 0.2), "L0 15.9, where its files say 32"),
        (rebuilt(64.1, 32.0, 0.2), "L0 64.1, where its files say 32"),
        (rebuilt(0.0, 32.0, None), "L0 0, where its files say 32"),
        (rebuilt(32.0, 32.0, 1.01), "fvu 1.01"),
        (rebuilt(32.0, 32.0, float("nan")), "fvu nan"),
        (rebuilt(320.0, 32.0, 81.0), "fvu 81, L0 320, where its files say 32"),
        (Rebuilt(3.0, most_l0=32.0), None),  # TopK with a ReLU may fire less
        (Rebuilt(65.0, most_l0=32.0), "L0 65, where it can be 32"),
    ],
)
def test_reconstruction_names_what_is_beyond_its_bound(one: Rebuilt, fault: str | None) -> None:
    sound = Findings(rebuilt=rebuilt(32.0, 32.0, 0.1))
    places = {cell(0): sound, cell(0, "h.1"): Findings(rebuilt=one), cell(0, "h.2"): Findings()}
    outcome = reconstruction(places, 1.0, 2.0)
    assert outcome.passed is (fault is None)
    assert outcome.offenders == ({} if fault is None else {"sae@h.1": fault})
    assert reconstruction(places, None, None).passed


def test_findings_survive_a_manifest_also_where_they_are_no_numbers() -> None:
    found = Findings(
        failed={"a": counts((1, 2), (0, 3))}, rebuilt=rebuilt(float("inf"), 3.0, float("nan"))
    )
    again = Findings.model_validate_json(found.model_dump_json(exclude_none=True))
    assert again.failed == found.failed
    assert again.rebuilt is not None
    assert again.rebuilt.l0 == float("inf")
    assert isnan(again.rebuilt.fvu or 0.0)
