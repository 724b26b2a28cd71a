"""A study that lost files is told so, and gets them back without asking or computing more."""

from pathlib import Path

import dagster as dg
from bench import Bench
from typer.testing import CliRunner

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.verifying import verify
from autointerp_dagster.cli import app


def invoke(*arguments: object) -> tuple[int, str]:
    answer = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(a) for a in arguments])
    return answer.exit_code, answer.output


def test_a_finished_study_is_as_it_was_written(small: Bench) -> None:
    code, shown = invoke("verify", small.path)
    assert code == 0
    assert "all as written" in shown
    found = verify(small.store, "planted")
    assert found.n_segments > 0
    assert found.manifests.keys() >= {head.path for head in small.heads().values()}


def test_what_is_damaged_is_named_discarded_and_made_again(
    small: Bench, instance: dg.DagsterInstance, server: FakeLLMServer, tmp_path: Path
) -> None:
    bench = small.copied_to(tmp_path, instance)
    root, heads = tmp_path / "store", bench.heads()
    first, second, third = (str(cell) for cell in bench.study.cells[:3])
    verdicts = root / heads["score_fuzzing", first].blobs[0].path
    verdicts.unlink()
    table = root / heads["latent_records", second].blob("latents").path
    table.write_bytes(table.read_bytes()[:-1])
    cache = root / str(heads["activation_cache", third].path)
    cache.write_text(cache.read_text() + " ")

    code, shown = invoke("verify", bench.path)
    assert code == 1
    assert "3 faults" in shown
    for path in (table, verdicts, cache):
        assert str(path.relative_to(root)) in shown
    layer, block = first.split("/")
    assert f"autointerp run planted --layers {layer} --ranges {block}" in shown
    assert invoke("verify", bench.path, "--layers", "sae@h.1")[0] == 0

    code, shown = invoke("verify", bench.path, "--discard")
    assert code == 1
    assert f"deleted {cache.relative_to(root)}" in shown
    assert "deleted score_fuzzing/" in shown  # it rests on the lost manifest
    assert not table.exists()
    n_asked = len(server.requests)
    bench.run()
    assert verify(bench.store, "planted").faults == []
    assert bench.contents() == small.contents()
    assert len(server.requests) == n_asked
    assert bench.stale() == set()
