"""A live ``dagster dev``, driven through GraphQL as the browser does it."""

import dagster as dg
import pytest
from bench import SMALL
from live import STARTING_S, LiveDagster, wait_for
from planted import write_study

from autointerp_dagster.study import load_study

RUNNING_S = 240

LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}"""
RUN = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
NODES = """
query { assetNodes {
  assetKey { path } groupName isPartitioned isObservable description kinds
  dependencyKeys { path } } }"""
STALE = """
query ($key: AssetKeyInput!, $partition: String!) {
  assetNodeOrError(assetKey: $key) { ... on AssetNode {
    staleStatus(partition: $partition)
    assetMaterializations(partitions: [$partition], limit: 1) {
      metadataEntries { label } tags { key value } } } } }"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory, world, server):
    folder = tmp_path_factory.mktemp("studies")
    overrides = {**SMALL, "store": str(folder / "store")}
    return write_study(folder, world, server.base_url, **overrides)


@pytest.fixture(scope="module")
def live(tmp_path_factory, studies):
    started = LiveDagster(tmp_path_factory.mktemp("live"), studies.parent)
    wait_for(started.is_up, STARTING_S)
    yield started
    started.stop()


def test_the_graph_shows_the_stages_in_order(live, studies):
    study = load_study(studies)
    nodes = {tuple(node["assetKey"]["path"]): node for node in live.ask(NODES)["assetNodes"]}
    inputs = {
        key[1]: {dependency["path"][1] for dependency in node["dependencyKeys"]}
        for key, node in nodes.items()
    }
    assert inputs["token_dataset"] == {"subject_model", "corpus"}
    assert inputs["activation_cache"] == {"subject_model", "sparse_coders", "token_dataset"}
    assert inputs["latent_records"] == {"token_dataset", "activation_cache"}
    assert "latent_records" in inputs["explanations"]
    assert inputs["score_detection"] == {"token_dataset", "latent_records", "explanations"}
    assert inputs["latent_metrics"] > {"explanations", "score_detection"}
    assert inputs["layer_metrics"] == {"latent_records", "latent_metrics"}
    assert inputs["study_metrics"] == {"latent_metrics", "layer_metrics"}
    assert {node["groupName"] for node in nodes.values()} == {study.name}
    assert all(node["description"] for node in nodes.values())
    assert nodes[(study.name, "sparse_coders")]["isObservable"]


def test_one_cell_materializes_from_the_dialog_to_latent_metrics(live, studies):
    study = load_study(studies)
    cell = study.cells[-1]
    key = dg.MultiPartitionKey({"layer": str(cell.layer), "range": str(cell.range)})
    stages = ["token_dataset", "activation_cache", "latent_records", "explanations"]
    stages += [f"score_{name}" for name in study.scorers.asked] + ["latent_metrics"]
    params = {
        "selector": {
            "repositoryLocationName": "autointerp_dagster.definitions",
            "repositoryName": "__repository__",
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [{"path": [study.name, stage]} for stage in stages],
        },
        "runConfigData": "{}",
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": str(key)}]},
    }
    launched = live.ask(LAUNCH, params=params)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]

    def is_over() -> bool:
        return live.ask(RUN, id=run_id)["runOrError"]["status"] in ("SUCCESS", "FAILURE")

    wait_for(is_over, RUNNING_S)
    assert live.ask(RUN, id=run_id)["runOrError"]["status"] == "SUCCESS"
    for stage in stages[1:]:
        node = live.ask(STALE, key={"path": [study.name, stage]}, partition=str(key))
        found = node["assetNodeOrError"]
        assert found["staleStatus"] == "FRESH", stage
        labels = {entry["label"] for entry in found["assetMaterializations"][0]["metadataEntries"]}
        assert {"manifest", "seconds", "dagster/row_count"} <= labels


def test_it_stops_when_it_is_told_to(tmp_path, studies):
    started = LiveDagster(tmp_path, studies.parent)
    wait_for(started.is_up, STARTING_S)
    started.stop()
    assert not started.is_up()
