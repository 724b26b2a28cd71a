"""Studies whose layers turn up: real ticks of the sensor, real runs, real staleness."""

from pathlib import Path

import dagster as dg
import pytest
from bench import SMALL, Bench
from planted import save_coder
from safetensors.torch import load_file, save_file

from autointerp_dagster.adapters.found_layers import FoundLayers
from autointerp_dagster.adapters.study_layers import with_plain_layers
from autointerp_dagster.definitions import build_definitions, build_resources, build_study
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class Watched(Bench):
    """A bench whose study discovers its layers in ``folder/coders``, which tests fill."""

    @property
    def coders(self) -> Path:
        return self.folder / "coders"

    @property
    def study(self) -> Study:
        return with_plain_layers(super().study)

    @property
    def layers(self) -> list[str]:
        return [str(layer) for layer in self.study.layer_keys]

    @property
    def records(self) -> FoundLayers:
        return FoundLayers(self.store, self.name)

    def definitions(self) -> dg.Definitions:
        return build_definitions([self.study])

    def tick(self) -> tuple[str, list[dg.RunRequest]]:
        """One evaluation of the sensor: what it says, and the runs that it asks for."""
        definitions = self.definitions()
        sensor = definitions.resolve_sensor_def(f"{self.name}_new_coders")
        context = dg.build_sensor_context(
            self.instance,
            repository_def=definitions.get_repository_def(),
            resources={"store": StoreResource()},
        )
        found = sensor.evaluate_tick(context)
        return found.skip_message or "", list(found.run_requests or [])

    def launch(self, request: dg.RunRequest) -> None:
        """The run that was asked for, as the daemon would create it."""
        dg.materialize(
            build_study(self.study),
            selection=list(request.asset_selection or ()),
            instance=self.instance,
            resources=build_resources(),
            tags=dict(request.tags),
            run_config=QUIET,
        )

    def follow(self, cursor: object) -> tuple[dict[str, set[str | None]], object]:
        """One tick of what follows by itself: partitions asked for, by asset, and the cursor."""
        definitions = self.definitions()
        found = dg.evaluate_automation_conditions(definitions, self.instance, cursor=cursor)
        keys = {name: dg.AssetKey([self.name, name]) for name in ("layer_metrics", "study_metrics")}
        asked = {name: found.get_requested_partitions(key) for name, key in keys.items()}
        return {name: places for name, places in asked.items() if places}, found.cursor

    def observed(self, layer: str) -> list[str]:
        """The versions of a layer's coder that Dagster was told of, the newest first."""
        where = dg.AssetRecordsFilter(
            dg.AssetKey([self.name, "sparse_coders"]), asset_partitions=[layer]
        )
        records = self.instance.fetch_observations(where, limit=10).records
        events = [record.asset_observation for record in records]
        return [(event.tags or {})["dagster/data_version"] for event in events if event]


@pytest.fixture
def watched(world, server, tmp_path, instance) -> Watched:
    overrides = {
        **SMALL,
        "layers": "discover",
        "discovery": {"settle_s": 0},
        "coders": {"sae": {"path": str(tmp_path / "coders")}},
        "scorers": {"fuzzing": None},
    }
    return Watched(tmp_path, world, server.base_url, instance, overrides)


def test_a_dropped_coder_is_a_layer_with_scores_and_its_successor_makes_them_stale(watched):
    said, runs = watched.tick()
    assert (runs, watched.layers) == ([], [])
    assert "waiting: sae: coders" in said
    cursor = watched.follow(None)[1]
    save_coder(watched.coders / "h.0", "h.0")

    _, (request,) = watched.tick()
    assert (
        watched.layers == ["sae@h.0"] == watched.instance.get_dynamic_partitions("planted_layers")
    )
    assert len(watched.observed("sae@h.0")) == 1
    watched.launch(request)
    ranges = {str(block) for block in watched.study.ranges}
    cells = {cell.split("/")[1] for asset, cell in watched.heads() if asset == "latent_metrics"}
    assert cells == ranges
    assert watched.tick() == ("1 layers; nothing new", [])

    asked, cursor = watched.follow(cursor)
    assert asked == {"layer_metrics": {"sae@h.0"}}
    watched.run(until="layer_metrics")
    assert watched.follow(cursor)[0] == {"study_metrics": {None}}
    watched.run()
    assert set(watched.statuses().values()) == {"FRESH"}
    before = watched.heads()["latent_metrics", str(watched.study.cells[0])]

    weights = watched.coders / "h.0" / "sae.safetensors"
    save_file({k: v * 2 if k == "W_dec" else v for k, v in load_file(weights).items()}, weights)
    said, runs = watched.tick()
    assert (said, runs) == ("1 layers; 1 changed", [])
    assert len(set(watched.observed("sae@h.0"))) == 2
    stale = {name for name, status in watched.statuses().items() if status == "STALE"}
    assert stale == {("activation_cache", str(cell)) for cell in watched.study.cells} | {
        (one.asset, one.cell) for one in watched.out_of_date() if one.is_direct
    }
    assert watched.heads()["latent_metrics", str(watched.study.cells[0])] == before
