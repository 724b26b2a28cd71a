"""Questions out as a file, answers in from a file: the same study without a connection."""

import json
import re
import shutil

import dagster as dg
import pytest
from bench import SMALL, Bench
from planted import answer
from typer.testing import CliRunner

from autointerp_dagster.cli import app
from autointerp_dagster.cli.run import Selection, materialize

PROSE = "I would say that the first text fits best."


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(text, body):
    """A completion as vLLM writes it."""
    n_words = sum(len(turn["content"].split()) for turn in body["messages"])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    if body.get("logprobs"):
        tokens = [logprobs(t) for t in text.replace(" ", "")] if text.startswith("[") else []
        choice["logprobs"] = {"content": tokens}
    usage = {"prompt_tokens": n_words, "completion_tokens": len(text.split())}
    return {"choices": [{**choice, "finish_reason": "stop"}], "usage": usage}


def logprobs(token):
    if token not in "01":
        return {"token": token, "logprob": 0.0, "top_logprobs": []}
    top = [{"token": t, "logprob": -0.1 if t == token else -2.3} for t in "01"]
    return {"token": token, "logprob": -0.1, "top_logprobs": top}


def answered(line, text=None):
    body = said(answer(line["body"]["messages"]) if text is None else text, line["body"])
    response = {"status_code": 200, "request_id": "vllm-1", "body": body}
    return {"id": "1", "custom_id": line["custom_id"], "response": response, "error": None}


def run_batch(questions, answers, say=answered):
    """What ``vllm run-batch -i questions -o answers`` does."""
    done = [say(line) for line in lines_of(questions)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in done))


@pytest.fixture(scope="module")
def recorded(world, server, tmp_path_factory):
    """A small study with its records and nothing that a model was asked for. Do not run it."""
    with dg.DagsterInstance.ephemeral() as kept:
        bench = Bench(tmp_path_factory.mktemp("recorded"), world, server.base_url, kept, SMALL)
        bench.run(until="latent_records")
        yield bench


@pytest.fixture
def bench(recorded, tmp_path, instance):
    return recorded.copied_to(tmp_path, instance)


def replay(bench):
    study = bench.study
    materialize(study, Selection.of(study, None, None, None), bench.instance, "replay")


def test_a_study_answered_by_file_equals_one_answered_by_a_server(
    bench, small, server, tmp_path, world, monkeypatch
):
    """Some answers are in a wrong format at first: they are asked again, with the fault quoted."""
    n_asked, seen, rounds = len(server.requests), set(), []

    def say(line):
        question = line["body"]["messages"][-1]["content"]
        is_first = question not in seen and hash_of(line) % 5 == 0
        seen.add(question)
        return answered(line, PROSE if is_first else None)

    monkeypatch.setenv("AUTOINTERP_STUDIES", str(bench.path.parent))
    for number in range(1, 9):
        questions, answers = tmp_path / f"{number}.jsonl", tmp_path / f"{number}-answers.jsonl"
        exported = invoke("batch", "export", bench.path, "--out", questions)
        assert exported.exit_code == 0, exported.output
        if not questions.exists():
            break
        assert f"vllm run-batch -i {questions} -o {answers} --model fake" in exported.stdout
        rounds.append(len(lines_of(questions)))
        run_batch(questions, answers, say)
        imported = invoke("batch", "import", answers)
        assert imported.exit_code == 0, imported.output
        assert f"recorded │ {rounds[-1]}" in " ".join(imported.stdout.split())
    assert "Nothing is left to ask" in exported.stdout
    assert rounds[0] == 4  # explanations first
    assert len(rounds) > 2
    replay(bench)
    assert len(server.requests) == n_asked
    assert all(head.complete for head in bench.heads().values())
    for table in ("explanations", "verdicts"):
        asset = "explanations" if table == "explanations" else "score_detection"
        mine, theirs = (b.table(asset, table) for b in (bench, small))
        decided = ["latent", "hookpoint", "status", "text" if "text" in mine else "prediction"]
        assert mine.select(decided).equals(theirs.select(decided))


def hash_of(line):
    return int(line["custom_id"].split("-")[1][:8], 16)


def test_lines_are_those_of_openais_batch_api(bench, tmp_path):
    out = tmp_path / "out.jsonl"
    assert invoke("batch", "export", bench.path, "--out", out).exit_code == 0
    for line in lines_of(out):
        assert set(line) == {"custom_id", "method", "url", "body"}
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert line["body"]["model"] == "fake"
    ids = [line["custom_id"] for line in lines_of(out)]
    assert len(set(ids)) == len(ids)
    assert not list(tmp_path.glob("*.part"))


def test_what_is_sent_by_file_is_what_a_run_would_send(bench, server, tmp_path):
    out = tmp_path / "out.jsonl"
    invoke("batch", "export", bench.path, "--out", out)
    n_asked = len(server.requests)
    bench.run(until="explanations")
    sent = [body["messages"] for body in server.requests[n_asked:]]
    filed = [line["body"]["messages"] for line in lines_of(out)]
    assert sorted(map(json.dumps, filed)) == sorted(map(json.dumps, sent))


def test_a_file_takes_no_more_requests_than_asked_for(bench, tmp_path):
    out = tmp_path / "out.jsonl"
    answer = invoke("batch", "export", bench.path, "--out", out, "--max-requests", 3)
    assert answer.exit_code == 0
    assert [len(lines_of(tmp_path / n)) for n in ("out.jsonl", "out-2.jsonl")] == [3, 1]
    again = invoke("batch", "export", bench.path, "--out", out)
    assert again.exit_code == 1
    assert "exists already" in again.stderr


def test_answers_count_though_the_study_has_changed_meanwhile(bench, tmp_path, server, instance):
    """Another price, another prompt size: what was paid stays paid, and is found when asked for."""
    out, answers = tmp_path / "out.jsonl", tmp_path / "answers.jsonl"
    invoke("batch", "export", bench.path, "--out", out)
    run_batch(out, answers)
    changed = {
        **bench.overrides,
        "explainers": {**SMALL["explainers"], "default": {"n_examples": 3}},
    }
    Bench(bench.folder, bench.world, bench.base_url, instance, changed).path  # noqa: B018
    imported = invoke("batch", "import", answers, "--study", bench.folder / "studies/planted.yaml")
    assert "recorded │ 4" in " ".join(imported.stdout.split()), imported.output
    n_asked = len(server.requests)
    bench.run(until="explanations")  # as it was
    assert len(server.requests) == n_asked


def test_lines_without_an_answer_are_counted_and_the_others_kept(bench, tmp_path):
    out, answers = tmp_path / "out.jsonl", tmp_path / "answers.jsonl"
    invoke("batch", "export", bench.path, "--out", out)
    first, second, third, fourth = lines_of(out)
    failed = {"custom_id": second["custom_id"], "response": None, "error": {"message": "no [bold]"}}
    busy = {**answered(third), "response": {"status_code": 500, "body": {"error": "busy"}}}
    strange = {**answered(fourth), "custom_id": "../../x-1"}
    lines = [answered(first), failed, busy, strange, answered(first), [1]]
    text = "\n".join(map(json.dumps, lines)) + '\n{"custom_id": "cut sho'
    answers.write_text(text)
    imported = invoke("batch", "import", answers, "--study", bench.path)
    assert imported.exit_code == 0, imported.output
    shown = " ".join(imported.stdout.split())
    for row in ("recorded │ 1", "known already │ 1", "failed │ 4", "unknown │ 1"):
        assert row in shown
    assert "line 2: " in imported.stdout
    assert "no [bold]" in imported.stdout  # as it is, not as markup
    assert "line 3: HTTP 500" in imported.stdout
    assert "line 7: not JSON; the file may be cut short" in imported.stdout
    rest = invoke("batch", "export", bench.path, "--out", tmp_path / "rest.jsonl")
    assert len(lines_of(tmp_path / "rest.jsonl")) == 2
    assert "Left out: 1 that were exported before" in rest.stdout  # nothing is known of line 4
    invoke("batch", "export", bench.path, "--out", tmp_path / "every.jsonl", "--again")
    assert len(lines_of(tmp_path / "every.jsonl")) == 3


def test_the_advice_of_an_import_can_be_followed_as_it_is(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOINTERP_STUDIES", str(bench.path.parent))
    monkeypatch.chdir(tmp_path)
    assert invoke("batch", "export", "planted").exit_code == 0
    run_batch(tmp_path / "planted-batch.jsonl", tmp_path / "planted-batch-answers.jsonl")
    imported = invoke("batch", "import", "planted-batch-answers.jsonl")
    assert "Next: `autointerp batch export planted`" in imported.stdout
    exported = invoke("batch", "export", "planted")
    assert exported.exit_code == 0, exported.output
    assert "autointerp batch import planted-batch-2-answers.jsonl" in exported.stdout
    assert lines_of(tmp_path / "planted-batch-2.jsonl")


def test_what_is_being_answered_is_not_asked_twice_unless_told_to(bench, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    invoke("batch", "export", bench.path, "--out", first, "--max-requests", 3)
    export = ("batch", "export", bench.path, "--out", second)
    answer = invoke(*export)
    assert answer.exit_code == 0
    assert not second.exists()
    assert "Left out: 4 that were exported before and are not answered yet" in answer.stdout
    assert re.search(rf"3 in batch [0-9a-f]{{8}} \({first}\)", answer.stdout)
    assert "Nothing is left to ask" not in answer.stdout
    assert invoke(*export, "--again").exit_code == 0
    assert ids_of(second) == ids_of(first) | ids_of(tmp_path / "first-2.jsonl")


def ids_of(path):
    return {line["custom_id"].split("-")[1] for line in lines_of(path)}


def test_a_name_that_is_taken_ends_an_export_before_it_has_begun(bench, tmp_path):
    out, taken = tmp_path / "out.jsonl", tmp_path / "out-2.jsonl"
    taken.touch()
    answer = invoke("batch", "export", bench.path, "--out", out, "--max-requests", 3)
    assert answer.exit_code == 1
    assert f"{taken}: exists already" in answer.stderr
    assert not out.exists()
    assert not list((tmp_path / "store").glob("batches/*"))


def test_a_file_that_cannot_be_written_is_named(bench, tmp_path):
    answer = invoke("batch", "export", bench.path, "--out", "/proc/nope/x.jsonl")
    assert answer.exit_code == 1
    assert "StoreError /proc/nope/x.jsonl: cannot be written" in answer.stderr


def test_an_import_of_nothing_usable_fails(bench, tmp_path):
    answers = tmp_path / "answers.jsonl"
    for text in ("", "[" * 200_000, '{"custom_id": "00000000-1"}'):
        answers.write_text(text)
        imported = invoke("batch", "import", answers, "--study", bench.path)
        assert imported.exit_code == 1
        assert "No line could be used." in imported.stdout


def test_an_import_looks_past_a_broken_study_and_names_it(bench, tmp_path, monkeypatch):
    out, answers = tmp_path / "out.jsonl", tmp_path / "answers.jsonl"
    invoke("batch", "export", bench.path, "--out", out)
    run_batch(out, answers)
    broken = bench.path.with_name("a_broken.yaml")
    broken.write_text("layers: [\n")
    monkeypatch.setenv("AUTOINTERP_STUDIES", str(broken.parent))
    imported = invoke("batch", "import", answers)
    assert imported.exit_code == 0, imported.output
    assert f"Skipped: {broken}" in imported.stderr
    assert "--study" in imported.stderr
    bench.path.unlink()
    nothing = invoke("batch", "import", answers)
    assert nothing.exit_code == 1
    assert "no study there that can be read" in nothing.stderr


def test_a_journal_that_cannot_be_written_is_not_blamed_on_the_file(bench, tmp_path):
    out, answers = tmp_path / "out.jsonl", tmp_path / "answers.jsonl"
    invoke("batch", "export", bench.path, "--out", out)
    run_batch(out, answers)
    shutil.rmtree(tmp_path / "store" / "journal-wal", ignore_errors=True)
    (tmp_path / "store" / "journal-wal").write_text("no folder")
    imported = invoke("batch", "import", answers, "--study", bench.path)
    assert imported.exit_code == 1
    assert "answers.jsonl" not in imported.stderr
    assert "journal-wal" in imported.stderr
    missing = invoke("batch", "import", tmp_path / "nowhere.jsonl", "--study", bench.path)
    assert "nowhere.jsonl: cannot be read" in missing.stderr


def test_openais_own_batches_are_uploaded(bench, tmp_path):
    there = {"base_url": "https://api.openai.com/v1", "model": "gpt-x"}
    models = {**bench.overrides, "models": {"explainer": there, "judge": there}}
    other = Bench(bench.folder, bench.world, bench.base_url, bench.instance, models)
    answer = invoke("batch", "export", other.path, "--out", tmp_path / "out.jsonl")
    assert answer.exit_code == 0, answer.output
    assert "vllm" not in answer.stdout
    assert f"Upload {tmp_path / 'out.jsonl'} as a batch of the OpenAI API" in answer.stdout
    assert f"autointerp batch import {tmp_path / 'out-answers.jsonl'}" in answer.stdout


def test_a_study_that_asks_no_model_says_so(bench, tmp_path):
    silent = {
        "explainers": {"default": None, "top_tokens": {"kind": "top_tokens"}},
        "scorers": {"detection": None, "fuzzing": None, "embedding": {}},
        "models": {"embedder": {"source": "embedded:all-minilm-l6-v2"}},
    }
    other = Bench(bench.folder, bench.world, bench.base_url, bench.instance,
                  {**bench.overrides, **silent})  # fmt: skip
    answer = invoke("batch", "export", other.path, "--out", tmp_path / "out.jsonl")
    assert answer.exit_code == 0, answer.output
    assert "No stage of study planted asks a language model." in answer.stdout
    assert "Nothing is left" not in answer.stdout
    planned = invoke("plan", other.path)
    assert planned.exit_code == 0, planned.output
    assert "No stage of study planted asks a language model." in planned.stdout


def test_importing_twice_records_once(bench, tmp_path):
    out, answers = tmp_path / "out.jsonl", tmp_path / "answers.jsonl"
    invoke("batch", "export", bench.path, "--out", out)
    run_batch(out, answers)
    invoke("batch", "import", answers, "--study", bench.path)
    again = invoke("batch", "import", answers, "--study", bench.path)
    assert "known already │ 4" in " ".join(again.stdout.split())


def test_a_model_in_this_process_cannot_be_asked_by_file(bench, tmp_path):
    local = {**bench.overrides, "models": {"judge": {"source": "x", "base_url": None,
             "model": None, "timeout_s": None}}}  # fmt: skip
    other = Bench(bench.folder, bench.world, bench.base_url, bench.instance, local)
    answer = invoke("batch", "export", other.path, "--out", tmp_path / "out.jsonl")
    assert answer.exit_code == 1
    assert "models.judge: a model in this process" in answer.stderr
    wrong = invoke("batch", "export", bench.path, "--stage", "corpus")
    assert "asks no language model" in wrong.stderr


def test_a_replay_of_nothing_needs_no_server_and_says_what_it_lacks(world, tmp_path, instance):
    bench = Bench(tmp_path, world, "http://127.0.0.1:9/v1", instance, SMALL)
    replay(bench)
    cut_short = {asset for (asset, _), head in bench.heads().items() if not head.complete}
    assert "explanations" in cut_short
    reasons = bench.table("explanations", "explanations")["reason"].drop_nulls().to_list()
    assert reasons.count("not_recorded") == 4


def test_a_replay_makes_lost_results_again_without_a_server(small, tmp_path, instance):
    """The journal of a study whose server is gone; its results are lost."""
    gone = {"base_url": "http://127.0.0.1:9/v1", "alias": small.base_url}
    models = {"models": {"explainer": gone, "judge": gone}}
    bench = small.copied_to(tmp_path, instance, **models)
    for asset in ("explanations", "score_detection", "score_fuzzing"):
        for folder in (asset, f"parts/{asset}", f"heads/planted/{asset}"):
            shutil.rmtree(tmp_path / "store" / folder)
    replay(bench)
    assert bench.contents() == small.contents()
