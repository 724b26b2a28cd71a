"""A study whose runs Dagster keeps in a real Postgres, as ``deploy/gpu_node`` has it."""

import shutil
from pathlib import Path

import dagster as dg
import pytest
from bench import Bench

from autointerp_dagster.resources.versions import CHECKOUT


def test_a_study_through_postgres_has_its_runs_events_and_statuses_there(
    small: Bench, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOINTERP_POSTGRES_URL", postgres)
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(CHECKOUT / "deploy" / "gpu_node" / "dagster.yaml", home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        bench = small.copied_to(tmp_path, instance)
        # Every cell is in the store already: this is about what Dagster is told.
        bench.run(layers=["sae@h.1"], until="latent_records")
    assert list(home.glob("**/*.db")) == []
    with dg.DagsterInstance.from_config(str(home)) as again:  # another process sees the same
        bench.instance = again
        assert {run.status for run in again.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
        n_events, statuses = bench.n_events(), bench.statuses()
    n_ranges = len(bench.study.ranges)
    assert n_events["activation_cache"] == n_events["latent_records"] == 2 * n_ranges
    cells = [str(cell) for cell in bench.study.cells]
    found = {cell: statuses["latent_records", cell] for cell in cells}
    assert found == {cell: "FRESH" if cell.startswith("sae@h.1/") else "MISSING" for cell in cells}
