"""What the report says in words of a study's comparisons; no study is run."""

import polars as pl
import pytest

from autointerp_dagster.cli.report import (
    _coders_table,
    _floors_table,
    _interval_name,
    _medians_table,
    _warnings,
)
from autointerp_dagster.core.schemas import LAYER_METRICS, STUDY_METRICS
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.study import load_study

STUDY = """\
models:
  subject: {source: ./model}
  explainer: {base_url: "http://127.0.0.1:1/v1", model: m}
  base_lm: {source: ./model}
  embedder: {source: ./embedder, query_prefix: ''}
corpus: {kind: files, path: texts}
coders:
  sae: {path: saes}
layers: [layers.0]
max_num_latents: 100
explainers:
  default: {kind: default}
scorers: {detection: {}, surprisal: {}, embedding: {}, intervention: {}}
metrics: {confidence: 0.9}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY)
    return load_study(path)


def comparisons(scorer, n, lo):
    row = dict.fromkeys(STUDY_METRICS.columns) | {
        "comparison": "subject", "a": "own", "b": "other", "explainer": "default",
        "scorer": scorer, "statistic": "mean_difference", "value": 0.1, "lo": lo, "hi": 0.3, "n": n,
    }  # fmt: skip
    return pl.DataFrame([row], schema=dict(STUDY_METRICS.columns))


@pytest.mark.parametrize(
    ("scorer", "who"),
    [
        ("detection", "this judge"),
        ("surprisal", "this base model"),
        ("intervention", "this base model"),
        ("embedding", "this embedder"),
    ],
)
def test_who_is_too_weak_is_named_by_what_it_is(study, scorer, who):
    (line,) = _warnings(study, comparisons(scorer, 12, -0.1))
    assert line.startswith(f"[yellow]{scorer}, default: {who} is too weak[/]")


def test_too_few_floors_are_said_to_be_too_few(study):
    (line,) = _warnings(study, comparisons("detection", 3, -0.1))
    assert "too few floors to tell" in line
    assert "3 latents" in line
    assert _warnings(study, comparisons("detection", 5, 0.1)) == []


def test_intervals_are_named_by_the_studys_confidence_and_an_unknown_chance_is_blank(study):
    assert _interval_name(study) == "90 % interval"
    table = _floors_table(comparisons("detection", 12, 0.1), _interval_name(study))
    assert "90 % interval" in [column.header for column in table.columns]
    row = dict.fromkeys(LAYER_METRICS.columns) | {
        "explainer": "default", "scorer": "intervention", "subject": "own", "variant": "all",
        "metric": "mean_nats", "statistic": "median", "value": 0.2, "lo": 0.1, "hi": 0.3, "n": 9,
        "n_failed": 0, "status": "ok",
    }  # fmt: skip
    medians = pl.DataFrame([row], schema=dict(LAYER_METRICS.columns))
    table = _medians_table(LayerKey("sae", "layers.0"), study, medians)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["chance"] == [""]
    assert cells["90 % interval"] == ["0.10 to 0.30"]


def test_coders_are_shown_against_each_other_with_the_interval():
    row = dict.fromkeys(STUDY_METRICS.columns) | {
        "comparison": "coder", "a": "neurons", "b": "sae", "explainer": "default",
        "scorer": "fuzzing", "statistic": "median_difference", "value": -0.15, "lo": -0.2,
        "hi": -0.1, "p": 0.001, "n": 40,
    }  # fmt: skip
    table = _coders_table(pl.DataFrame([row], schema=dict(STUDY_METRICS.columns)), "95 % interval")
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["coders"] == ["neurons - sae"]
    assert cells["a - b"] == ["-0.150"]
    assert cells["95 % interval"] == ["-0.200 to -0.100"]
