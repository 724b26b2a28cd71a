"""The check in the UI lists what ``autointerp stale`` lists; it runs alone, and blocks nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from bench import Bench
from typer.testing import CliRunner

from autointerp_dagster.cli import app
from autointerp_dagster.definitions import build_definitions


@pytest.fixture
def edited(small: Bench, tmp_path: Path) -> Bench:
    """The same store, looked at by a study with another judge and other metrics."""
    overrides = {
        **small.overrides,
        "models": {**small.overrides["models"], "judge": {"model": "fake-2"}},
        "metrics": {"n_bootstrap": 200},
        "store": str(small.folder / "store"),
    }
    return replace(small, folder=tmp_path, overrides=overrides)


def checked(bench: Bench, instance: dg.DagsterInstance) -> dg.AssetCheckEvaluation:
    """The check's own schedule, at its next tick: what it launches, and nothing else."""
    definitions = build_definitions([bench.study])
    schedule = definitions.resolve_schedule_def(f"{bench.name}_up_to_date")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    job = definitions.resolve_job_def(schedule.job_name)
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    result = job.execute_in_process(instance=instance, run_config=quiet)
    assert result.success
    assert result.get_asset_materialization_events() == []
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.check_name == "up_to_date"
    assert evaluation.asset_key.path[-1] == "study_metrics"
    assert not evaluation.blocking
    return evaluation


def values(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    return {name: value.value for name, value in evaluation.metadata.items()}


def test_a_study_that_is_current_passes(small: Bench, instance: dg.DagsterInstance) -> None:
    evaluation = checked(small, instance)
    assert evaluation.passed
    assert values(evaluation) == {"n_out_of_date": 0, "n_by_themselves": 0}
    assert evaluation.description is not None
    assert "nothing is out of date" in evaluation.description


def test_it_warns_with_the_places_and_reasons_of_the_command(
    edited: Bench, instance: dg.DagsterInstance
) -> None:
    evaluation = checked(edited, instance)
    found = values(evaluation)
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    command = CliRunner(env={"COLUMNS": "400"})
    listed = json.loads(command.invoke(app, ["stale", str(edited.path), "--json"]).stdout)
    shown = command.invoke(app, ["stale", str(edited.path)]).stdout
    assert {(one["stage"], place) for one in found["places"] for place in one["places"]} == {
        (one["asset"], one["cell"]) for one in listed["out_of_date"]
    }
    assert found["n_out_of_date"] == len(listed["out_of_date"])
    assert found["n_by_themselves"] == sum(one["is_direct"] for one in listed["out_of_date"])
    reasons = {reason for one in found["places"] for reason in one["why"]}
    assert "parameter: n_bootstrap 100 -> 200" in reasons
    assert all(reason in shown for reason in reasons)
    assert evaluation.description in shown.replace("\n", " ")
    table = evaluation.metadata["out_of_date"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [record.data["stage"] for record in table.records] == [
        one["stage"] for one in found["places"]
    ]


def test_it_is_in_the_graph_beside_study_metrics(small: Bench) -> None:
    graph = build_definitions([small.study]).resolve_asset_graph()
    (key,) = (key for key in graph.asset_check_keys if key.name == "up_to_date")
    assert key == dg.AssetCheckKey(dg.AssetKey([small.name, "study_metrics"]), "up_to_date")


def test_what_cannot_be_looked_at_is_said_and_fails_no_run(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    judge = {
        "source": str(tmp_path / "no"),
        **dict.fromkeys(("model", "base_url", "max_in_flight", "timeout_s")),
    }
    models = {**small.overrides["models"], "judge": judge}
    store = str(small.folder / "store")
    gone = replace(
        small, folder=tmp_path, overrides={**small.overrides, "models": models, "store": store}
    )
    evaluation = checked(gone, instance)
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    assert evaluation.description is not None
    assert "cannot be told: " in evaluation.description
    assert str(tmp_path / "no") in evaluation.description
