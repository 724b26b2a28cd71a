"""What a plan says is what a run then sends, and what it costs."""

import json

import dagster as dg
import pytest
from bench import SMALL, Bench
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from autointerp_dagster.adapters.llm.counting import TOKENS_PER_MESSAGE
from autointerp_dagster.cli import app
from autointerp_dagster.resources import planning
from autointerp_dagster.resources.planning import plan_study

PRICES = {"usd_per_1m_prompt": 2.0, "usd_per_1m_cached": 0.5, "usd_per_1m_completion": 8.0}


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


def plan_of(bench):
    study = bench.study
    return plan_study(study, bench.store, study.cells)


def by_stage(plan):
    return {stage.stage: stage for stage in plan.stages}


def stage_of(body):
    return "explanations" if "logprobs" not in body else "scores"


def n_words(body):
    return sum(len(turn["content"].split()) for turn in body["messages"])


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    """Counts words, as the fake server does."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def recorded(world, server, tmp_path_factory, word_tokenizer):
    """A small study with its records and nothing that a model was asked for. Do not run it."""
    model = {**PRICES, "tokenizer": str(word_tokenizer)}
    overrides = {**SMALL, "models": {"explainer": model, "judge": model}}
    with dg.DagsterInstance.ephemeral() as kept:
        bench = Bench(tmp_path_factory.mktemp("recorded"), world, server.base_url, kept, overrides)
        bench.run(until="latent_records")
        yield bench


@pytest.fixture
def bench(recorded, tmp_path, instance):
    return recorded.copied_to(tmp_path, instance)


def test_a_run_sends_what_was_planned(bench, server):
    before = plan_of(bench)
    n_asked = len(server.requests)
    bench.run(until="explanations")
    explaining = server.requests[n_asked:]
    between = plan_of(bench)
    n_asked = len(server.requests)
    bench.run()
    scoring = server.requests[n_asked:]
    after = plan_of(bench)

    planned = by_stage(before)["explanations"]
    assert planned.n_requests == len(explaining) == 4
    n_messages = sum(len(body["messages"]) for body in explaining)
    words = sum(map(n_words, explaining))
    assert planned.prompt_tokens == words + TOKENS_PER_MESSAGE * n_messages

    scores = [stage for stage in between.stages if stage.stage != "explanations"]
    assert sum(stage.n_requests for stage in scores) == len(scoring) > 20
    n_messages = sum(len(body["messages"]) for body in scoring)
    words = sum(map(n_words, scoring))
    total = sum(stage.prompt_tokens for stage in scores)
    assert total == words + TOKENS_PER_MESSAGE * n_messages
    assert by_stage(between)["explanations"].n_requests == 0

    # Scores were counted right before there was an explanation.
    for name in ("score_detection", "score_fuzzing"):
        assert by_stage(before)[name].n_requests == by_stage(between)[name].n_requests
    assert [stage.n_requests for stage in after.stages] == [0, 0, 0]
    assert [stage.n_pending_cells for stage in after.stages] == [0, 0, 0]


def test_a_prefix_cache_has_all_but_the_first_static_part_and_each_units_windows(bench):
    stage = by_stage(plan_of(bench))["score_detection"]
    assert 0.5 < stage.shared_tokens / stage.prompt_tokens < 1
    usd = 2 * stage.prompt_tokens + 8 * stage.completion_tokens
    assert stage.usd == pytest.approx(usd / 1e6)
    assert stage.usd_cached == pytest.approx((usd - 1.5 * stage.shared_tokens) / 1e6)


def test_what_the_journal_knows_is_not_planned_again(bench):
    bench.run(until="score_detection")
    n_before = by_stage(plan_of(bench))["score_detection"].n_requests
    assert n_before == 0
    more = {**bench.overrides, "latents": [0, 1, 5, 7, 9]}
    wider = Bench(bench.folder, bench.world, bench.base_url, bench.instance, more)
    stages = by_stage(plan_of(wider))
    assert stages["explanations"].n_requests == 1
    assert stages["explanations"].n_known == 4  # of the two cells that have to be made again
    assert stages["score_detection"].n_known > 0


def test_a_sample_of_latents_stands_for_all(bench, monkeypatch):
    whole = by_stage(plan_of(bench))["score_detection"]
    monkeypatch.setattr(planning, "N_COUNTED", 4)
    plan = plan_of(bench)
    sampled = by_stage(plan)["score_detection"]
    assert sampled.n_requests == whole.n_requests
    assert 0 < sampled.n_counted < whole.n_counted
    assert sampled.prompt_tokens == pytest.approx(whole.prompt_tokens, rel=0.1)
    assert any("50.00% of the latents" in note for note in plan.notes)


def test_the_command_prints_tables_and_json(bench):
    poor = Bench(
        bench.folder, bench.world, bench.base_url, bench.instance,
        {**bench.overrides, "budget": {"usd": 1e-6, "study_tokens": 10**9}},
    )  # fmt: skip
    shown = invoke("plan", poor.path)
    assert shown.exit_code == 0, shown.output
    for said in ("score_detection", "too small", "suffices", "tokenizer", "half of max_tokens",
                 "20 tokens, a guess", "asked again"):  # fmt: skip
        assert said in shown.stdout
    content = json.loads(invoke("plan", poor.path, "--json").stdout)
    assert content["total"]["n_requests"] == sum(s["n_requests"] for s in content["stages"])
    assert {b["name"]: b["suffices"] for b in content["budgets"]} == {
        "budget.usd": False,
        "budget.study_tokens": True,
    }


def test_without_records_the_command_that_makes_them_is_named(world, server, tmp_path, instance):
    bench = Bench(tmp_path, world, server.base_url, instance, SMALL)
    n_asked = len(server.requests)
    answer = invoke("plan", bench.path)
    assert answer.exit_code == 1
    assert "autointerp run planted --until latent_records" in answer.stderr
    assert len(server.requests) == n_asked


def with_overrides(bench, **overrides):
    return Bench(
        bench.folder, bench.world, bench.base_url, bench.instance, {**bench.overrides, **overrides}
    )


def test_each_explainer_is_counted_for_itself_while_none_has_answered(recorded):
    chat = {"kind": "default", "n_examples": 12}
    one = plan_of(with_overrides(recorded, explainers={"default": chat, "top_tokens": None}))
    two = {"default": chat, "other": {**chat, "n_examples": 11}, "top_tokens": None}
    both = plan_of(with_overrides(recorded, explainers=two))
    for stage, n_stages in (("explanations", 2), ("score_detection", 2), ("score_fuzzing", 2)):
        counted = by_stage(both)[stage]
        assert counted.n_requests == n_stages * by_stage(one)[stage].n_requests
        assert counted.n_known == 0


def test_a_study_that_asks_no_model_has_an_empty_plan(recorded):
    embedder = {"source": "embedded:all-minilm-l6-v2", "query_prefix": ""}
    silent = with_overrides(
        recorded,
        models={"embedder": embedder},
        explainers={"default": None, "top_tokens": {"kind": "top_tokens"}},
        scorers={"detection": None, "fuzzing": None, "embedding": {}},
    )
    assert plan_of(silent).stages == ()
    assert invoke("plan", silent.path).exit_code == 0


def test_interventions_are_asked_for_where_questions_rest_on_them(recorded):
    model = {"base_url": recorded.base_url, "model": "base", **PRICES}
    steering = with_overrides(
        recorded,
        models={**recorded.overrides["models"], "base_lm": model},
        explainers={"output": {"kind": "output"}, "top_tokens": None},
        scorers={"intervention": {}},
    )
    answer = invoke("plan", steering.path)
    assert answer.exit_code == 1
    assert "no up-to-date interventions" in answer.stderr
    assert "--until interventions" in answer.stderr
