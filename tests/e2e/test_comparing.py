"""Studies that extend one another: what they share, and how they are compared."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml
from bench import Bench
from typer.testing import CliRunner, Result

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.cli import app
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.resources.comparing import StudyScores, compare_scores, read_scores

FEWER = {"default": {"n_examples": 1}, "top_tokens": {"n_tokens": 1}}
ITEM = ["coder", "hookpoint", "latent", "explainer"]


@dataclass
class Extending(Bench):
    """A bench whose study file extends another's."""

    base: str = ""
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        path = self.folder / "studies" / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump({"extends": f"{self.base}.yaml", **self.content}))
        return path


def extending(bench: Bench, name: str, **content: Any) -> Extending:
    assert bench.path.is_file()  # written
    inherited = {key: getattr(bench, key) for key in ("folder", "world", "base_url", "instance")}
    return Extending(**inherited, name=name, base=bench.name, content=content)


@pytest.fixture(scope="module")
def base(whole: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The whole study with a store of its own."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield whole.copied_to(tmp_path_factory.mktemp("compare"), instance)


@pytest.fixture(scope="module")
def few(base: Bench, server: FakeLLMServer) -> Bench:
    """The explainers see less: one window in place of twelve, and name one token of eight."""
    bench = extending(base, "few", explainers=FEWER)
    n_asked = len(server.requests)
    bench.run()
    assert len(server.requests) > n_asked
    return bench


@pytest.fixture(scope="module")
def scores(base: Bench) -> StudyScores:
    return read_scores(base.study, base.store)


def compare(*arguments: object) -> Result:
    command = ["compare", *map(str, arguments)]
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, command)


def headline(bench: Bench, scorer: str, subject: str = "own") -> pl.DataFrame:
    rows = bench.table("latent_metrics", "latent_metrics").filter(
        scorer=scorer, subject=subject, variant="all", metric="balanced_accuracy"
    )
    return rows.drop_nulls("value").select(*ITEM, "value")


def test_an_extending_study_shares_what_does_not_depend_on_its_change(
    base: Bench, few: Bench
) -> None:
    mine, theirs = few.heads(), base.heads()
    for (asset, place), head in mine.items():
        if asset in ("token_dataset", "activation_cache", "latent_records"):
            assert head.path == theirs[asset, place].path
            assert head.provenance.run_id == theirs[asset, place].provenance.run_id
            assert head.provenance.study == base.name
    explained = [name for name in mine if name[0] == "explanations" and mine[name].blobs]
    assert {mine[name].provenance.study for name in explained} == {few.name}


def test_two_studies_are_compared_latent_by_latent(base: Bench, few: Bench) -> None:
    answer = compare(base.path, few.path, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["baseline"] == base.name
    rows = {(r["scorer"], r["explainer"], r["measure"]): r for r in found["differences"]}
    for scorer in ("detection", "fuzzing"):
        pairs = headline(base, scorer).join(headline(few, scorer), on=ITEM, suffix="_few")
        for explainer in FEWER:
            mine = pairs.filter(explainer=explainer)
            row = rows[scorer, explainer, "score"]
            assert row["n_pairs"] == mine.height > 10
            assert row["difference"] == pytest.approx((mine["value_few"] - mine["value"]).mean())
            assert row["lo"] <= row["difference"] <= row["hi"]
            assert rows[scorer, explainer, "lift"]["n_pairs"] > 0
        # One word of a class of eight; the whole class is found in a single window, too.
        assert rows[scorer, "top_tokens", "score"]["hi"] < 0
    assert found["changes"] == {
        "few": [
            "explanations: explainers.top_tokens.n_tokens 8 -> 1",
            "explanations: explainers.default.n_examples 12 -> 1",
        ]
    }
    assert all("fewer than 30 pairs" in warning for warning in found["warnings"])


def test_the_comparison_is_shown_as_a_table(base: Bench, few: Bench) -> None:
    answer = compare(base.path, few.path, "--layers", "sae@h.1")
    assert answer.exit_code == 0, answer.output
    assert "few against planted, paired over latents" in answer.stdout
    assert "explainers.default.n_examples 12 -> 1" in answer.stdout
    assert "(Holm)" in answer.stdout
    n_pairs = headline(base, "detection").filter(hookpoint="h.1", explainer="default").height
    assert f"({n_pairs}, {n_pairs})" in answer.stdout


def test_a_study_that_was_never_run_says_what_to_run(base: Bench) -> None:
    later = extending(base, "later", explainers={"default": {"n_examples": 2}})
    answer = compare(base.path, later.path)
    assert answer.exit_code == 1
    assert "study later: latent_metrics was never materialized" in answer.stderr
    assert "`autointerp run later` makes it" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE"], "wanted two studies or more"),
        (["BASE", "BASE"], "two have one name"),
        (["BASE", "FEW", "--layers", "sae@nowhere"], "no layer 'sae@nowhere'"),
        (["BASE", "--ratings", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_a_wrong_argument_is_named(
    base: Bench, few: Bench, arguments: list[str], message: str
) -> None:
    known = {"BASE": base.path, "FEW": few.path}
    answer = compare(*(known.get(argument, argument) for argument in arguments))
    assert answer.exit_code == 1
    assert message in answer.stderr


def test_an_edited_study_file_is_warned_of(base: Bench, few: Bench) -> None:
    edited = extending(base, "few", explainers={"default": {"n_examples": 3}})
    answer = compare(base.path, edited.path)
    assert few.path.is_file()  # written back
    assert "few: the scores were made with another explanations than the study says" in (
        answer.stdout
    )


def test_latents_of_other_weights_are_not_paired(scores: StudyScores, few: Bench) -> None:
    other = read_scores(few.study, few.store)
    key = ("sparse_coders", "sae@h.1")
    retrained = replace(other, external={**other.external, key: frozenset({"other weights"})})
    with pytest.raises(StudyError, match=r"at sae@h\.1 have different weights"):
        compare_scores(scores, [retrained])


def test_another_judge_and_other_text_are_warned_of(scores: StudyScores, few: Bench) -> None:
    other = read_scores(few.study, few.store)
    manifests = tuple(
        m.model_copy(update={"parameters": {**m.parameters, "judge": "another"}})
        if m.stage == "score_fuzzing"
        else m.model_copy(update={"content_hash": "other text"})
        if m.stage == "token_dataset"
        else m
        for m in other.manifests
    )
    found = compare_scores(scores, [replace(other, manifests=manifests)])
    warnings = "\n".join(found.warnings)
    assert "planted and few: score_fuzzing asked another judge" in warnings
    assert "not the same token_dataset" in warnings
    assert "score_detection" not in warnings


def test_explainers_of_other_names_have_nothing_to_compare(scores: StudyScores, few: Bench) -> None:
    other = read_scores(few.study, few.store)
    renamed = other.latent_metrics.with_columns(explainer=pl.col("explainer") + "_2")
    with pytest.raises(StudyError, match="Explainers are matched by name"):
        compare_scores(scores, [replace(other, latent_metrics=renamed)])


def test_the_order_of_the_other_studies_changes_no_row(scores: StudyScores, few: Bench) -> None:
    second = read_scores(few.study, few.store)
    third = replace(second, study=second.study.model_copy(update={"name": "third"}))
    there, back = compare_scores(scores, [second, third]), compare_scores(scores, [third, second])
    assert sorted(there.rows, key=str) == sorted(back.rows, key=str)


def test_human_ratings_are_correlated_with_every_scorer(base: Bench, tmp_path: Path) -> None:
    value = headline(base, "detection").rename({"value": "rating"})
    texts = base.table("explanations", "explanations").select(*ITEM, explanation="text")
    rows = value.join(texts, on=ITEM).sort(ITEM)
    assert rows.height > 10
    path = tmp_path / "ratings.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows.columns)
        writer.writeheader()
        writer.writerows(rows.to_dicts())
        writer.writerow({**rows.row(0, named=True), "latent": 999_999})
    answer = compare(base.path, "--ratings", path, "--json")
    assert answer.exit_code == 0, answer.output
    (rated,) = json.loads(answer.stdout)["ratings"]
    found = {(row["scorer"], row["explainer"]): row for row in rated["agreements"]}
    assert found["detection", None]["spearman"] == pytest.approx(1)
    assert found["detection", None]["n"] == rows.height
    assert {scorer for scorer, _ in found} == {"detection", "fuzzing"}
    assert rated["n_other_text"] == 0
    (unexplained,) = rated["unexplained"]
    assert unexplained.startswith(f"line {rows.height + 2}: sae@h.0 latent 999999")


def test_ratings_of_another_text_are_dropped_and_counted(base: Bench, tmp_path: Path) -> None:
    texts = base.table("explanations", "explanations").filter(explainer="default")
    texts = texts.drop_nulls("text").select(*ITEM, explanation="text").with_row_index("rating")
    changed = texts.with_columns(
        explanation=pl.when(pl.col("rating") < 2)
        .then(pl.lit("something else"))
        .otherwise(pl.lit(" ") + pl.col("explanation"))
    )
    path = tmp_path / "ratings.csv"
    changed.write_csv(path)
    answer = compare(base.path, "--ratings", path)
    assert answer.exit_code == 0, answer.output
    assert "2 dropped: they rate another text" in answer.stdout
    assert f"{texts.height - 2} items used" in answer.stdout


def test_ratings_of_no_known_explanation_are_refused(base: Bench, tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text("coder,hookpoint,latent,explainer,rating\nsae,h.9,1,default,2\n")
    answer = compare(base.path, "--ratings", path)
    assert answer.exit_code == 1
    assert "none of 1 ratings is of one of its explanations" in answer.stderr
