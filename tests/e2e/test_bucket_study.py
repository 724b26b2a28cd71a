"""A whole study in a bucket of an S3 server, and the commands that look at it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from bench import Bench
from object_store import ObjectStore
from typer.testing import CliRunner

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.cli import app

pytestmark = pytest.mark.slow


def invoke(*arguments: object) -> tuple[int, str]:
    answer = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(a) for a in arguments])
    return answer.exit_code, answer.output


@pytest.fixture(scope="module")
def remote(
    small: Bench, s3: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """The small study in a bucket; what a run keeps on its own machine is gone by now."""
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as kept:
        patch.setenv("AUTOINTERP_CACHE", str(folder / "cache"))
        overrides = {**small.overrides, "store": s3.new_root()}
        bench = Bench(folder, small.world, small.base_url, kept, overrides)
        bench.run()
        assert list((folder / "cache").rglob("*.jsonl")) == []  # all answers are in the bucket
        shutil.rmtree(folder / "cache")
        yield bench


def test_a_study_in_a_bucket_ends_with_the_same_contents(small: Bench, remote: Bench) -> None:
    assert remote.contents() == small.contents()
    assert remote.stale() == set()
    assert not (remote.folder / "store").exists()


def test_another_machine_makes_nothing_anew_and_asks_nobody(
    remote: Bench, server: FakeLLMServer, instance: dg.DagsterInstance
) -> None:
    before, n_asked = set(list_files(remote.store.root, "")), len(server.requests)
    Bench(remote.folder, remote.world, remote.base_url, instance, remote.overrides).run()
    assert set(list_files(remote.store.root, "")) == before
    assert len(server.requests) == n_asked


def test_the_commands_that_look_at_a_store_look_into_a_bucket(remote: Bench) -> None:
    code, shown = invoke("stale", remote.path)
    assert (code, "nothing is out of date" in shown.lower()) == (0, True), shown
    code, shown = invoke("verify", remote.path)
    assert (code, "all as written" in shown) == (0, True), shown
    code, shown = invoke("status", remote.path)
    assert (code, "score_detection" in shown) == (0, True), shown
    code, shown = invoke("why", remote.path, "sae@h.1", 1, "--scorer", "detection")
    assert code == 0, shown
    assert str(remote.heads()["score_detection", "sae@h.1/0000000-0000015"].path) in shown


def test_gc_deletes_from_a_bucket_what_nothing_needs(remote: Bench, s3: ObjectStore) -> None:
    root, contents = remote.store.root, remote.contents()
    heads = [path for path in list_files(root, "heads/planted") if "metrics" in path]
    for path in heads:  # stages that nobody wants any more
        (root / path).unlink()
    s3.make_old(str(root), 31)
    before = set(list_files(root, ""))
    code, shown = invoke("gc", remote.path, "--json")
    assert code == 0, shown
    assert set(list_files(root, "")) == before
    code, shown = invoke("gc", remote.path, "--json", "--delete")
    assert code == 0, shown
    gone = {file["path"] for file in json.loads(shown)["stores"][0]["files"]}
    assert {path.split("/")[0] for path in gone} == {
        "blobs", "latent_metrics", "layer_metrics", "study_metrics"
    }  # fmt: skip
    assert before - set(list_files(root, "")) == gone
    remote.run()
    assert remote.contents() == contents
    assert invoke("verify", remote.path)[0] == 0


def test_a_bucket_that_is_not_there_is_one_plain_error_of_every_command(
    remote: Bench, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    overrides = {**remote.overrides, "store": "s3://no-such-bucket/store"}
    lost = Bench(tmp_path, remote.world, remote.base_url, instance, overrides)
    for command in ("run", "status", "stale", "verify", "gc"):
        code, shown = invoke(command, lost.path)
        assert code == 1, (command, shown)
        assert "StoreError" in shown, (command, shown)
        assert "there is no bucket 'no-such-bucket'. Make it" in shown, (command, shown)
