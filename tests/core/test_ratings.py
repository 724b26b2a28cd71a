from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from metric_builders import LAYER, make_metric, make_metrics
from scipy import stats

from autointerp_dagster.adapters.ratings import read_ratings
from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.metrics.ratings import (
    Agreement,
    rated_items,
    rater_agreement,
    ratings_agreement,
)

CONFIG = MetricsConfig(n_bootstrap=300)
HEADER = "coder,hookpoint,latent,explainer,rating\n"


def rate(ratings: list[float], rater: str = "", **columns: Any) -> list[dict[str, Any]]:
    known = {"coder": LAYER.coder, "hookpoint": LAYER.hookpoint, "explainer": "default"}
    return [
        {**known, "latent": latent, "rater": rater, "rating": rating, **columns}
        for latent, rating in enumerate(ratings)
    ]


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    kinds = {"latent": pl.UInt32, "rating": pl.Float64}
    return pl.DataFrame(rows).cast({k: v for k, v in kinds.items()})


def scores(values: list[float | None], **columns: Any) -> list[dict[str, Any]]:
    return [make_metric(latent, value, **columns) for latent, value in enumerate(values)]


def agreement(
    ratings: list[dict[str, Any]], metrics: list[dict[str, Any]]
) -> dict[tuple[str, str | None], Agreement]:
    found = ratings_agreement(table(ratings), make_metrics(metrics), CONFIG)
    return {(row.scorer, row.explainer): row for row in found}


def csv(folder: Path, content: str | bytes) -> Path:
    path = folder / "ratings.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_one_raters_agreement_is_spearmans_correlation() -> None:
    rng = np.random.default_rng(0)
    rating, value = rng.integers(1, 5, 40).astype(float), rng.random(40)
    value = value + rating / 4
    row = agreement(rate(rating.tolist()), scores(value.tolist()))["detection", "default"]
    assert row.spearman == pytest.approx(stats.spearmanr(rating, value).statistic)
    assert row.lo is not None
    assert row.hi is not None
    assert row.lo < row.spearman < row.hi
    assert (row.n, row.n_unscored, row.metric) == (40, 0, "balanced_accuracy")


def test_the_interval_agrees_with_fishers_where_that_holds() -> None:
    rng = np.random.default_rng(5)
    first = rng.normal(size=300)
    second = first + rng.normal(size=300)
    row = agreement(rate(first.tolist()), scores(second.tolist()))["detection", "default"]
    assert row.spearman is not None
    half = 1.96 * np.sqrt((1 + row.spearman**2 / 2) / 297)  # Bonett and Wright 2000
    wanted = np.tanh(np.arctanh(row.spearman) + np.array([-half, half]))
    assert (row.lo, row.hi) == pytest.approx(wanted, abs=0.03)


def test_raters_scales_do_not_matter() -> None:
    # Ranks 1 2 3 of three ratings are .25 .5 .75 on any scale.
    rows = rate([1, 2, 3], "a") + rate([100, 70, 90], "b")
    items = rated_items(table(rows))
    assert items["rating"].to_list() == pytest.approx([0.5, 0.375, 0.625])
    stretched = rate([10, 20, 30], "a") + rate([5, 1, 2], "b")
    assert rated_items(table(stretched)).equals(items)


def test_ties_share_their_rank() -> None:
    items = rated_items(table(rate([2, 2, 4])))
    assert items["rating"].to_list() == pytest.approx([1.5 / 4, 1.5 / 4, 3 / 4])


def test_raters_among_themselves_are_compared_over_shared_items() -> None:
    rows = rate([1, 2, 3, 4], "a") + rate([1, 2, 4, 3], "b") + rate([1, 2], "c")
    found = rater_agreement(table(rows))
    assert found.spearman == pytest.approx(stats.spearmanr([1, 2, 3, 4], [1, 2, 4, 3]).statistic)
    assert (found.n_raters, found.n_items, found.n_pairs) == (3, 4, 1)
    assert rater_agreement(table(rate([1, 2, 3]))).spearman is None


def test_explainers_are_pooled_and_apart() -> None:
    ratings = rate([1, 2, 3]) + rate([6, 5, 4], explainer="top_tokens")
    metrics = scores([0.1, 0.2, 0.3]) + scores([0.4, 0.5, 0.6], explainer="top_tokens")
    found = agreement(ratings, metrics)
    assert [row.explainer for row in found.values()] == [None, "default", "top_tokens"]
    assert found["detection", "default"].spearman == pytest.approx(1)
    assert found["detection", "top_tokens"].spearman == pytest.approx(-1)
    assert found["detection", None].n == 6
    expected = stats.spearmanr([1, 2, 3, 6, 5, 4], [1, 2, 3, 4, 5, 6]).statistic
    assert found["detection", None].spearman == pytest.approx(expected)


def test_a_latents_explanations_are_resampled_together() -> None:
    """Copies of an item are no more evidence: the interval is as wide as without them."""
    rng = np.random.default_rng(1)
    rating = rng.random(30)
    value = rating + rng.random(30)
    names = ["default", "e1", "e2", "e3"]
    ratings = [row for name in names for row in rate(rating.tolist(), explainer=name)]
    metrics = [row for name in names for row in scores(value.tolist(), explainer=name)]
    found = agreement(ratings, metrics)
    pooled, alone = found["detection", None], found["detection", "default"]
    assert pooled.spearman == pytest.approx(alone.spearman)
    assert (pooled.hi or 0) - (pooled.lo or 0) == pytest.approx(
        (alone.hi or 0) - (alone.lo or 0), rel=0.25
    )


def test_items_without_a_score_are_counted_apart() -> None:
    found = agreement(rate([1, 2, 3, 4]), scores([0.1, 0.2, None, 0.3]))
    assert (found["detection", "default"].n, found["detection", "default"].n_unscored) == (3, 1)


@pytest.mark.parametrize(
    ("ratings", "values"), [([1, 2], [0.1, 0.2]), ([3, 3, 3], [0.1, 0.2, 0.3])]
)
def test_too_few_items_or_equal_ratings_have_no_correlation(
    ratings: list[float], values: list[float | None]
) -> None:
    row = agreement(rate(ratings), scores(values))["detection", "default"]
    assert (row.spearman, row.lo, row.hi, row.n) == (None, None, None, len(values))


def test_every_scorer_of_explanations_is_compared_by_its_headline() -> None:
    metrics = [
        *scores([0.1, 0.2, 0.3]),
        *scores([0.3, 0.2, 0.1], scorer="embedding", metric="auroc"),
        *scores([0.3, 0.2, 0.1], scorer="intruder", metric="accuracy", explainer=None),
    ]
    found = agreement(rate([1, 2, 3]), metrics)
    assert {scorer for scorer, _ in found} == {"detection", "embedding"}
    assert found["embedding", None].spearman == pytest.approx(-1)


def test_agreement_does_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(2)
    ratings = table(rate(rng.random(20).tolist(), "a") + rate(rng.random(20).tolist(), "b"))
    metrics = make_metrics(scores(rng.random(20).tolist()))
    shuffled = ratings.sample(fraction=1, shuffle=True, seed=1)
    assert ratings_agreement(shuffled, metrics[::-1], CONFIG) == ratings_agreement(
        ratings, metrics, CONFIG
    )
    assert rater_agreement(shuffled) == rater_agreement(ratings)


def test_a_file_is_read_with_its_lines(tmp_path: Path) -> None:
    path = csv(
        tmp_path,
        b"\xef\xbb\xbfrating,rater,explanation,coder,hookpoint,latent,explainer\r\n"
        b'3.5,ann,"two lines,\r\nand a comma",sae,layers.1,7,default\r\n'
        b"\r\n"
        b"-1,bob,,sae,layers.1,7,default\r\n",
    )
    rows = read_ratings(path).to_dicts()
    assert [(r["rating"], r["rater"], r["latent"], r["line"]) for r in rows] == [
        (3.5, "ann", 7, 2),
        (-1.0, "bob", 7, 5),
    ]
    assert [r["explanation"] for r in rows] == ["two lines,\nand a comma", None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sae,layers.1,7,default,good", "ratings.csv:2: rating: got 'good'"),
        ("sae,layers.1,7,default,nan", "ratings.csv:2: rating: got 'nan'"),
        ("sae,layers.1,7,default,inf", "ratings.csv:2: rating: got 'inf'"),
        ("sae,layers.1,7,default,", "ratings.csv:2: rating: got ''"),
        ("sae,layers.1,-7,default,1", "ratings.csv:2: latent: got '-7'"),
        ("sae,layers.1,7.0,default,1", "ratings.csv:2: latent: got '7.0'"),
        ("sae,layers.1,99999999999,default,1", "ratings.csv:2: latent: got"),
        ("sae,,7,default,1", "ratings.csv:2: hookpoint: empty"),
        ("sae,layers.1,7,default", "ratings.csv:2: 4 cells, wanted 5"),
        ("sae,layers.1,7,default,1,2", "ratings.csv:2: 6 cells, wanted 5"),
        ('sae,layers.1,7,"default,1', "ratings.csv:2: no CSV"),
        ("", "no ratings"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        read_ratings(csv(tmp_path, HEADER + line))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("coder,hookpoint,latent,explainer", "missing ['rating']"),
        (HEADER.strip() + ",grade", "unknown ['grade']"),
        (HEADER.strip() + ",rating", "given twice ['rating']"),
        (HEADER.replace(",", ";"), "separated by commas"),
        ("", "missing"),
    ],
)
def test_columns_are_checked(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        read_ratings(csv(tmp_path, header + "\nsae,layers.1,7,default,1\n"))
    assert message in str(caught.value)


def test_a_rater_rates_an_item_once(tmp_path: Path) -> None:
    row = "sae,layers.1,7,default,1,ann\n"
    header = HEADER.strip() + ",rater\n"
    with pytest.raises(StudyError, match=r"csv:4: the same rater .* line 2"):
        read_ratings(csv(tmp_path, header + row + row.replace("ann", "bob") + row))


def test_all_mistakes_are_told_at_once_up_to_a_limit(tmp_path: Path) -> None:
    lines = "".join(f"sae,layers.1,{n},default,x\n" for n in range(30))
    with pytest.raises(StudyError) as caught:
        read_ratings(csv(tmp_path, HEADER + lines))
    told = str(caught.value).split("\n")
    assert (len(told), told[-1]) == (21, "... and 10 more.")


def test_other_bytes_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="not UTF-8 at byte"):
        read_ratings(csv(tmp_path, b"coder\xff"))
    with pytest.raises(StudyError, match="cannot be read"):
        read_ratings(tmp_path / "nowhere.csv")
    with pytest.raises(StudyError, match="rating: got"):
        read_ratings(csv(tmp_path, HEADER + "sae,layers.1,7,default,\0\n"))
