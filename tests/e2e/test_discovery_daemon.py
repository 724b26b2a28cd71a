"""The newcomer's way: drop a coder's folder, switch the sensor on in the UI, find its scores."""

import polars as pl
import pytest
from bench import SMALL
from live import STARTING_S, LiveDagster, wait_for
from planted import save_coder, write_study

from autointerp_dagster.adapters.found_layers import FoundLayers
from autointerp_dagster.adapters.heads import read_heads
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.schemas import LAYER_METRICS

RUNNING_S = 300

SWITCH_ON = """
mutation ($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { __typename ... on PythonError { message } } }"""
TICKS = """
query ($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) { ... on Sensor { sensorState {
    status ticks(limit: 20) { status skipReason runIds error { message } } } } } }"""
RUNS = """
query { runsOrError(filter: {tags: [{key: "autointerp/discovering", value: "planted"}]}) {
  ... on Runs { results { status tags { key value } } } } }"""
LAYERS = """
query { assetNodeOrError(assetKey: {path: ["planted", "layer_metrics"]}) { ... on AssetNode {
  partitionKeys partitionDefinition { type } } } }"""
SELECTOR = {
    "repositoryLocationName": "autointerp_dagster.definitions",
    "repositoryName": "__repository__",
    "sensorName": "planted_new_coders",
}


@pytest.mark.slow
def test_a_dropped_folder_is_scored_once_the_sensor_is_on(tmp_path, world, server):
    write_study(
        tmp_path,
        world,
        server.base_url,
        **SMALL,
        layers="discover",
        discovery={"settle_s": 2, "every_s": 5},
        coders={"sae": {"path": str(tmp_path / "coders")}},
        scorers={"fuzzing": None},
    )
    store = Store(tmp_path / "store")
    (tmp_path / "live").mkdir()
    live = LiveDagster(tmp_path / "live", tmp_path / "studies")

    def ticks() -> list[dict]:
        answer = live.ask(TICKS, selector=SELECTOR)
        return answer["sensorOrError"]["sensorState"]["ticks"]

    def is_made(stage: str, place: str) -> bool:
        return (stage, place) in read_heads(store, "planted").manifests

    try:
        wait_for(live.is_up, STARTING_S)
        started = live.ask(SWITCH_ON, selector=SELECTOR)["startSensor"]
        assert started["__typename"] == "Sensor", started
        wait_for(lambda: any("no such folder" in (t["skipReason"] or "") for t in ticks()), 90)

        save_coder(tmp_path / "coders" / "h.0", "h.0")
        wait_for(lambda: is_made("study_metrics", "all"), RUNNING_S)
        assert is_made("layer_metrics", "sae@h.0")
        assert [tick for tick in ticks() if tick["status"] == "FAILURE"] == []
        (run,) = live.ask(RUNS)["runsOrError"]["results"]
        assert run["status"] == "SUCCESS"
        node = live.ask(LAYERS)["assetNodeOrError"]
        assert (node["partitionKeys"], node["partitionDefinition"]["type"]) == (
            ["sae@h.0"],
            "DYNAMIC",
        )
        (seen,) = FoundLayers(store, "planted").looks()
        assert (seen.by, seen.n_layers) == ("sensor", 1)
        head = store.head("planted", "layer_metrics", "sae@h.0")
        assert head is not None
        metrics = store.table(head.blob(LAYER_METRICS.name))
        assert metrics.filter(pl.col("value").is_not_null())["coder"].unique().to_list() == ["sae"]
    finally:
        live.stop()
