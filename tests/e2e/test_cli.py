"""The commands, on a study that is done."""

import io
import json
import re
import shutil
import socket
from dataclasses import replace
from types import SimpleNamespace

import polars as pl
import pytest
from bench import SMALL, Bench
from rich.console import Console
from typer.testing import CliRunner

from autointerp_dagster.adapters.lineage import lineage_of
from autointerp_dagster.cli import app
from autointerp_dagster.cli.report import print_report
from autointerp_dagster.cli.walk import Walk
from autointerp_dagster.resources.versions import CHECKOUT


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(a) for a in arguments])


def scored_latent(bench):
    verdicts = bench.table("score_detection", "verdicts")
    row = verdicts.filter((pl.col("subject") == "other") & pl.col("call_id").is_not_null())
    return row.row(0, named=True)


@pytest.mark.parametrize("command", ["run", "status", "why"])
def test_help_says_what_a_command_does_and_names_its_arguments(command):
    answer = invoke(command, "--help")
    assert answer.exit_code == 0
    assert "STUDY" in answer.stdout


def test_why_walks_to_documents_prompts_and_weights(small):
    row = scored_latent(small)
    layer = f"{row['coder']}@{row['hookpoint']}"
    answer = invoke("why", small.path, layer, row["latent"], "--scorer", "detection")
    assert answer.exit_code == 0, answer.output
    head = small.heads()[("score_detection", f"{layer}/{_range_of(small, row['latent'])}")]
    walk = Walk(small.store, lineage_of(small.store, head))
    external = walk.lineage.external
    for name, version in external.items():
        assert f"{name}: hash {version}" in answer.stdout
    assert set(external) >= {"corpus all", "subject_model all", f"sparse_coders {layer}"}
    for stage in ("token_dataset", "activation_cache", "latent_records", "explanations"):
        assert f"{stage}/" in answer.stdout
    documents = walk.dataset().documents["doc_id"].to_list()
    named = re.findall(r"of document '([^']+)'", answer.stdout)
    assert named
    assert set(named) <= set(documents)
    assert "judged by call" in answer.stdout
    assert "promoted by the decoder: '" in answer.stdout
    assert "Description:" in answer.stdout
    assert f"explanation of latent {row['explanation_of']} (other)" in answer.stdout


def test_the_walk_as_json_and_on_the_terminal_are_one(small):
    row = scored_latent(small)
    asked = ("why", small.path, f"{row['coder']}@{row['hookpoint']}", row["latent"])
    walk, shown = json.loads(invoke(*asked, "--json").stdout), invoke(*asked).stdout
    scores, explained = walk["scores"], [e for s in walk["scores"] for e in s["explained"]]
    windows = [window for e in explained for window in e["windows"]]
    calls = [c for c in (*(e["written_by"] for e in explained), *(w["judged_by"] for w in windows))
             if c is not None]  # fmt: skip
    made = [m for s in scores for m in (s["made"], *s["made_from"])]
    assert {s["made"]["asset"] for s in scores} == {"score_detection", "score_fuzzing"}
    assert windows
    assert {m["manifest"] for m in made} == set(re.findall(r"\w+/[0-9a-f]{32}/\w+\.json", shown))
    assert {c["call_id"] for c in calls} == set(re.findall(r" by call (\w+)", shown))
    assert [str(w["window_id"]) for w in windows] == re.findall(r" window (\d+) \(", shown)
    assert [w["document"] for w in windows] == re.findall(r"of document '([^']+)'", shown)
    assert {f"{name}: hash {v}" for s in scores for name, v in s["external"].items()} == set(
        re.findall(r"\w+ [\w@.]+: hash \w+", shown)
    )
    assert all(repr(e["explanation"]) in shown for e in explained)
    assert all(repr(c["messages"][-1]["content"])[:100] in shown for c in calls)
    assert all(f"answered: {c['answer']!r}" in shown for c in calls)
    (activations,) = [s["activations"] for s in scores if s["activations"] is not None]
    assert f"fires on {activations['row']['n_tokens']:,} of {activations['n_kept']:,}" in shown
    assert activations["manifest"] in {m["manifest"] for m in made}


def test_as_many_windows_are_walked_as_are_asked_for(small):
    row = scored_latent(small)
    layer = f"{row['coder']}@{row['hookpoint']}"
    asked = ("why", small.path, layer, row["latent"], "--scorer", "detection", "--json")
    for n in (0, 10**6):
        (score,) = json.loads(invoke(*asked, "--windows", n).stdout)["scores"]
        for explained in score["explained"]:
            assert len(explained["windows"]) == min(n, explained["n_windows"])
            assert explained["n_windows"] > 4


def test_why_still_explains_an_old_score_after_a_newer_run(world, server, tmp_path, instance):
    bench = Bench(tmp_path, world, server.base_url, instance, SMALL)
    bench.run()
    row = scored_latent(bench)
    layer, place = f"{row['coder']}@{row['hookpoint']}", None
    place = f"{layer}/{_range_of(bench, row['latent'])}"
    old = bench.heads()[("score_detection", place)]
    newer = Bench(
        tmp_path,
        world,
        server.base_url,
        instance,
        {**SMALL, "sampling": {"n_test": 12, "n_negative_test": 12}},
    )
    newer.run()
    assert newer.heads()[("score_detection", place)].path != old.path
    answer = invoke("why", newer.path, layer, row["latent"], "--manifest", old.path)
    assert answer.exit_code == 0, answer.output
    assert old.path in answer.stdout
    assert f"window {row['window_id']}" in answer.stdout or "more windows" in answer.stdout


def test_status_counts_what_is_done(small):
    answer = invoke("status", small.path)
    n_cells = len(small.study.cells)
    assert re.search(rf"score_detection\W+{n_cells}/{n_cells}", answer.stdout)
    assert re.search(r"study_metrics\W+1/1", answer.stdout)


def test_of_a_finished_study_nothing_is_out_of_date(small):
    answer = invoke("stale", small.path)
    assert answer.stdout == f"planted: nothing is out of date ({len(small.heads())} places).\n"
    said = json.loads(invoke("stale", small.path, "--json").stdout)
    assert said == {"study": "planted", "n_places": len(small.heads()), "out_of_date": []}


def test_an_edited_study_is_told_what_it_makes_out_of_date(small, tmp_path):
    metrics = {"metrics": {"n_bootstrap": 200}}
    edited = replace(small, folder=tmp_path, overrides={**small.overrides, **metrics})
    path = edited.path
    path.write_text(path.read_text().replace(str(tmp_path / "store"), str(small.folder / "store")))
    shown = invoke("stale", path).stdout
    assert "parameter: n_bootstrap 100 -> 200" in shown
    assert "3 by themselves, 0 because" in shown
    listed = json.loads(invoke("stale", path, "--json").stdout)["out_of_date"]
    by_asset = {one["asset"]: one for one in listed}
    assert set(by_asset) == {"layer_metrics", "study_metrics"}
    (cause,) = [c for c in by_asset["layer_metrics"]["causes"] if c["kind"] == "parameter"]
    assert (cause["key"], cause["old"], cause["new"]) == ("n_bootstrap", 100, 200)
    assert by_asset["layer_metrics"]["is_direct"]
    dry = invoke("run", path, "--stale", "--dry-run").stdout
    assert re.search(rf"layer_metrics\W+{len(small.study.layer_keys)}\W", dry)
    assert "score_detection" not in dry


def report_of(bench, **limits):
    console = Console(file=io.StringIO(), width=200)
    print_report(bench.study, bench.store, console, **limits)
    return console.file.getvalue()


def test_a_report_has_every_latent_that_was_not_skipped(small):
    shown = report_of(small)
    explained = small.table("explanations", "explanations")
    for row in explained.iter_rows(named=True):
        is_shown = re.search(rf"\W{row['latent']} {row['explainer']}", shown) is not None
        same = (pl.col("latent") == row["latent"]) & (pl.col("status") != "skipped")
        assert is_shown == (explained.filter(same).height > 0)
    assert (explained["status"] == "skipped").any()
    assert "not shown" not in shown


def test_a_report_of_many_latents_shows_some_of_every_layer(small):
    shown = report_of(small, max_latents=2)
    explained = small.table("explanations", "explanations").filter(pl.col("status") != "skipped")
    n_latents = explained.select("hookpoint", "latent").n_unique()
    assert len(re.findall(r"\d default", shown)) == explained["hookpoint"].n_unique() == 2
    assert f"{n_latents - 2} more latents are not shown" in shown
    assert "autointerp why STUDY LAYER LATENT" in shown


def test_a_dry_run_says_what_there_is_and_changes_nothing(world, server, tmp_path, instance):
    bench = Bench(tmp_path, world, server.base_url, instance, SMALL)
    answer = invoke("run", bench.path, "--dry-run")
    assert answer.exit_code == 0
    assert re.search(rf"activation_cache\W+{len(bench.study.cells)}\W+0", answer.stdout)
    assert bench.heads() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("why", "PATH", "sae@nowhere", 0), "no layer 'sae@nowhere'. It has:"),
        (("why", "PATH", "LAYER", 10**6), "beyond max_num_latents"),
        (("why", "PATH", "LAYER", 0, "--scorer", "x"), "no scorer 'x'. There are:"),
        (("run", "PATH", "--until", "x"), "no stage 'x'. It has:"),
        (("run", "PATH", "--layers", "x"), "no layer 'x'. It has:"),
        (("status", "nowhere"), "no such study"),
    ],
)
def test_a_wrong_argument_is_named_without_a_traceback(small, arguments, message):
    known = {"PATH": small.path, "LAYER": small.study.layer_keys[0]}
    answer = invoke(*(known.get(a, a) for a in arguments))
    assert answer.exit_code == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.output


def _range_of(bench, latent):
    return next(r for r in bench.study.ranges if r.start <= latent < r.stop)


def test_records_of_dagster_that_cannot_be_used_are_told_in_a_line(small, tmp_path, monkeypatch):
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "runs.db").write_bytes(b"no database " * 1000)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    answer = invoke("run", small.path)
    assert answer.exit_code == 1
    assert re.fullmatch(
        rf"RecordsError {tmp_path}: Dagster's records cannot be read or written: DatabaseError: "
        r".*file is not a database, [\d.]+ MB are free\. Name another folder in DAGSTER_HOME, .*\n",
        answer.output,
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:hidden@127.0.0.1:{port}/x", "OperationalError: .* refused"),
        ("postgresql//me:hidden@127.0.0.1:{port}/x", "ArgumentError: "),
    ],
)
def test_a_postgres_that_does_not_answer_is_told_in_a_line(
    tmp_path, monkeypatch, small, url, message
):
    postgres = pytest.importorskip("dagster_postgres.utils")
    no_waiting = SimpleNamespace(sleep=lambda seconds: None)  # between Dagster's six attempts
    monkeypatch.setattr(postgres, "time", no_waiting)
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
        monkeypatch.setenv("AUTOINTERP_POSTGRES_URL", url.format(port=nobody.getsockname()[1]))
        shutil.copy(CHECKOUT / "deploy" / "gpu_node" / "dagster.yaml", tmp_path)
        answer = invoke("run", small.path)
    assert answer.exit_code == 1
    assert re.search(f"RecordsError {tmp_path}: .*{message}", answer.stderr)
    assert "See that the server in" in answer.stderr
    assert "Free space" not in answer.stderr
    assert "hidden" not in answer.output
