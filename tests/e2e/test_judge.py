"""`autointerp judge` against judges behind HTTP: good, foolish, faulty and absent ones."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from autointerp_dagster.adapters.llm.fake.rule_judge import rule_judge
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.cli import app
from autointerp_dagster.core.calibration import RULES

IDEAL = rule_judge({rule.description: rule.fits for rule in RULES})
ARGUMENTS = ("--windows", "3", "--scorer", "detection")


def study_file(folder, base_url, **more):
    price = {"usd_per_1m_prompt": 1.0, "usd_per_1m_completion": 2.0}
    content = {
        "models": {
            "subject": {"source": "nowhere"},
            "explainer": {"base_url": "http://127.0.0.1:9/v1", "model": "nobody"},
            "judge": {"base_url": base_url, "model": "fake", **price},
        },
        "corpus": {"kind": "embedded"},
        "coders": {"sae": {"format": "sparsify", "path": "nowhere"}},
        "layers": ["layers.1"],
        "max_num_latents": 1000,
        "sampling": {"n_test": 10, "n_negative_test": 20, "window_len": 16},
        "tokens": {"context_len": 64},
        "explainers": {"top_tokens": {"kind": "top_tokens"}},
        "scorers": {"detection": {"windows_per_prompt": 3, "n_examples": 15}},
        "floors": {"sample": 200, "donor_block": 1000},
        "metrics": {"n_bootstrap": 100},
        "store": str(folder / "store"),
        **more,
    }
    path = folder / "known.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["judge", *map(str, arguments)])


def as_json(path, *arguments):
    answer = invoke(path, "--json", *(arguments or ARGUMENTS))
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What an ideal judge got: the report, the report of a second run, and the requests."""
    folder = tmp_path_factory.mktemp("ideal")
    with FakeLLMServer(IDEAL, p_answer=0.9) as server:
        path = study_file(folder, server.base_url)
        first = as_json(path, "--windows", "3")
        n_requests = len(server.requests)
        second = as_json(path, "--windows", "3")
        shown = invoke(path, "--windows", "3")
        assert len(server.requests) == n_requests
    return first, second, shown, n_requests


def test_an_ideal_judge_is_usable_at_both_tasks(asked):
    first = asked[0]
    assert [s["report"]["scorer"] for s in first["scorers"]] == ["detection", "fuzzing"]
    for scorer in first["scorers"]:
        report = scorer["report"]
        overall = report["kinds"][0]
        assert report["usability"] == "usable"
        assert report["failures"] == {}
        assert overall["ceiling"]["value"] >= 0.99
        assert overall["floor"]["value"] == 0.5
        assert overall["auroc"]["value"] >= 0.99
    assert [s["is_of_study"] for s in first["scorers"]] == [True, False]


def test_what_it_cost_is_scaled_to_the_study(asked):
    detection = asked[0]["scorers"][0]
    # 18 latents x 2 descriptions x 6 windows, 3 in a prompt; the study has 10 + 15 windows for
    # 1,000 latents and 200 floors.
    assert detection["n_prompts"] == 72
    assert detection["n_windows_of_study"] == 25
    assert detection["n_descriptions_of_study"] == 1200
    cost, per_1000 = detection["cost"], detection["per_1000"]
    usd = (cost["prompt_tokens"] + 2 * cost["completion_tokens"]) / 1e6
    assert cost["usd"] == pytest.approx(usd)
    assert per_1000["usd"] == pytest.approx(usd / 36 * 25 / 6 * 1000)
    assert detection["of_study"]["usd"] == pytest.approx(usd / 36 * 25 / 6 * 1200)
    assert cost["seconds"] > 0
    assert asked[0]["scorers"][1]["of_study"] is None


def test_asking_again_is_free_and_says_the_same(asked):
    first, second, shown, n_requests = asked
    assert n_requests == 72 + 18 * 2 * 2
    for before, after in zip(first["scorers"], second["scorers"], strict=True):
        assert after["report"] == before["report"]
        assert after["n_known"] == after["n_prompts"]
        assert after["cost"]["usd"] == pytest.approx(before["cost"]["usd"])
        assert after["cost"]["seconds"] is None
    assert shown.exit_code == 0
    assert re.search(r"detection: usable; with true descriptions", shown.stdout)
    assert "The journal answered" in shown.stdout


@pytest.mark.parametrize(
    ("answer", "options", "reason", "usability"),
    [
        (lambda messages: "I would say the first.", {}, "unparsable", "unusable"),
        (lambda messages: "[0, 1, 0, 1]", {}, "unparsable", "unusable"),
        (lambda messages: "[1, 1, 1]", {}, None, "unusable"),
        (IDEAL, {"faults": lambda number: "refusal"}, "refused", "unusable"),
        (IDEAL, {"rejects": ("logprobs", "top_logprobs")}, None, "usable"),
        (IDEAL, {"ignores": ("logprobs", "top_logprobs")}, None, "usable"),
    ],
    ids=["prose", "too many labels", "always yes", "refusals", "no log-probs", "ignored log-probs"],
)
def test_a_judge_is_described_as_it_is(tmp_path, answer, options, reason, usability):
    with FakeLLMServer(answer, **options) as server:
        (scorer,) = as_json(study_file(tmp_path, server.base_url))["scorers"]
    report = scorer["report"]
    assert report["failures"] == ({} if reason is None else {reason: report["n_verdicts"]})
    assert report["usability"] == usability
    if "ignores" in options or "rejects" in options:
        assert report["kinds"][0]["auroc"]["value"] is None
        assert report["kinds"][0]["ceiling"]["value"] >= 0.99


def test_the_budget_of_the_study_is_kept(tmp_path):
    with FakeLLMServer(IDEAL) as server:
        path = study_file(tmp_path, server.base_url, budget={"tokens": 2000})
        (scorer,) = as_json(path)["scorers"]
    assert scorer["report"]["usability"] == "undecided"
    assert set(scorer["report"]["failures"]) == {"budget"}
    assert scorer["cost"]["prompt_tokens"] + scorer["cost"]["completion_tokens"] <= 2000


def test_a_dead_endpoint_is_a_message_and_exit_code_1(tmp_path):
    answer = invoke(study_file(tmp_path, "http://127.0.0.1:9/v1"), *ARGUMENTS)
    assert answer.exit_code == 1
    assert "127.0.0.1:9" in answer.stderr
    assert "Traceback" not in answer.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scorer", "embedding"), "no scorer 'embedding' whose judge labels windows"),
        (("--windows", "100000"), "Ask for fewer windows"),
    ],
)
def test_a_wrong_argument_is_named_without_a_traceback(tmp_path, arguments, message):
    answer = invoke(study_file(tmp_path, "http://127.0.0.1:9/v1"), *arguments)
    assert answer.exit_code == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.output
