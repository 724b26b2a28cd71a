"""`autointerp gc` on the store of a finished study."""

import json
import os
import time
from pathlib import Path

import dagster as dg
import pytest
from bench import Bench
from typer.testing import CliRunner

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.cache.folders import SpoolFolder
from autointerp_dagster.adapters.verifying import verify
from autointerp_dagster.cli import app


def invoke(*arguments: object) -> tuple[int, str]:
    answer = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(a) for a in arguments])
    return answer.exit_code, answer.output


def make_old(folder: Path, days: float) -> None:
    when = time.time() - days * 24 * 3600
    for path in folder.rglob("*"):
        os.utime(path, (when, when))


def test_what_a_study_left_behind_goes_and_its_results_stay(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOINTERP_SPOOL", str(tmp_path / "spool"))
    bench = small.copied_to(tmp_path, instance)
    root = bench.store.root
    replaced = {str(head.path) for (asset, _), head in bench.heads().items() if "score" in asset}
    for head in (tmp_path / "store" / "heads" / "planted").glob("score_*"):
        for pointer in head.rglob("*-*"):
            pointer.unlink()  # a scorer that nobody wants any more
    for name in ("latent_metrics", "layer_metrics", "study_metrics"):
        for pointer in (tmp_path / "store" / "heads" / "planted" / name).rglob("*"):
            if pointer.is_file():
                pointer.unlink()
    SpoolFolder.new(tmp_path / "spool", "0" * 16).release()
    make_old(tmp_path, 31)

    before = set(list_files(root, ""))
    code, shown = invoke("gc", bench.path)
    assert code == 0
    assert "would delete" in shown
    assert "superseded manifests" in shown
    assert "score_detection" in shown
    assert set(list_files(root, "")) == before

    code, shown = invoke("gc", bench.path, "--delete", "--json")
    assert code == 0
    told = json.loads(shown)
    (store,) = told["stores"]
    gone = {file["path"] for file in store["files"]}
    assert before - set(list_files(root, "")) == gone
    assert replaced <= gone
    assert not any(path.startswith(("heads", "journal")) for path in gone)
    assert [Path(spool["path"]).parent for spool in told["spools"]] == [tmp_path / "spool"]
    assert list((tmp_path / "spool").iterdir()) == []
    assert verify(bench.store, "planted").faults == []

    n_asked = bench.n_events()["score_detection"]
    bench.run()  # answers come from the journal, which is about a coder that is still in use
    assert bench.contents() == small.contents()
    assert bench.n_events()["score_detection"] > n_asked
    code, shown = invoke("gc", bench.path)
    assert "would delete 0 files" in shown


@pytest.mark.parametrize("arguments", [[], ["STUDY", "--all"]])
def test_gc_wants_studies_or_all_of_them(small: Bench, arguments: list[str]) -> None:
    code, shown = invoke("gc", *(a.replace("STUDY", str(small.path)) for a in arguments))
    assert code == 1
    assert "wanted one or more" in shown


def test_all_studies_of_a_folder_that_share_a_store_are_looked_at_once(
    small: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOINTERP_STUDIES", str(small.path.parent))
    monkeypatch.setenv("AUTOINTERP_SPOOL", str(tmp_path))
    code, shown = invoke("gc", "--all", "--json")
    assert code == 0
    assert [store["store"] for store in json.loads(shown)["stores"]] == [str(small.store.root)]
