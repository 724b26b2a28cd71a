"""Studies whose layers turn up: real ticks of the sensor, real runs, real staleness."""

import logging
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from bench import SMALL, Bench
from planted import D_MODEL, save_coder
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from autointerp_dagster.adapters.found_layers import FoundLayers
from autointerp_dagster.adapters.study_layers import with_plain_layers
from autointerp_dagster.cli import app
from autointerp_dagster.core.errors import CoderError, StoreError, StudyError
from autointerp_dagster.definitions import build_definitions, build_resources, build_study, defs
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
        with dg.build_sensor_context(
            self.instance,
            repository_def=definitions.get_repository_def(),
            resources={"store": StoreResource()},
        ) as context:
            found = sensor.evaluate_tick(context)
        return found.skip_message or "", list(found.run_requests or [])

    def night(self, hour: int = 2) -> tuple[str, list[dg.RunRequest]]:
        """One tick of the schedule, likewise."""
        definitions = self.definitions()
        schedule = definitions.resolve_schedule_def(f"{self.name}_nightly")
        with dg.build_schedule_context(
            self.instance,
            scheduled_execution_time=datetime(2026, 11, 29, hour, tzinfo=UTC),
            repository_def=definitions.get_repository_def(),
            resources={"store": StoreResource()},
        ) as context:
            found = schedule.evaluate_tick(context)
        return found.skip_message or "", list(found.run_requests or [])

    def lapse(self) -> None:
        """Whatever a look claimed, it claimed long ago."""
        for path in self.folder.glob("store/discovery/*/claims/*/*.json"):
            os.utime(path, (0, 0))

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


def range_of(request: dg.RunRequest) -> tuple[str, str]:
    tags = request.tags
    return tags["dagster/asset_partition_range_start"], tags["dagster/asset_partition_range_end"]


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


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """On disk: a schedule's tick opens the instance anew."""
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as kept:
        yield kept


def test_the_night_launches_what_is_new_under_one_budget_and_leaves_a_summary(watched, durable):
    watched.instance = durable
    watched.overrides["discovery"] = {"settle_s": 0, "nightly": {"tokens": 1, "cron": "30 1 * * *"}}
    save_coder(watched.coders / "h.0", "h.0")
    save_coder(watched.coders / "h.1", "h.1")
    (watched.coders / "h.9").mkdir()
    (watched.coders / "h.9" / "cfg.json").write_text("{}")
    _, runs = watched.night()
    assert [range_of(run) for run in runs] == [
        (f"sae@{h}|0000000-0000015", f"sae@{h}|0000048-0000063") for h in ("h.0", "h.1")
    ]
    assert {run.tags["autointerp/budget"] for run in runs} == {"planted_nightly_20261129T0200"}
    (seen,) = watched.records.looks()
    assert (seen.by, seen.found, seen.launched) == (
        "schedule",
        ("sae@h.0", "sae@h.1"),
        ("sae@h.0", "sae@h.1"),
    )
    assert list(seen.waiting) == ["sae@h.9"]

    watched.launch(runs[0])
    cells = {asset: head for (asset, _), head in watched.heads().items() if not head.complete}
    assert {"explanations", "latent_metrics"} <= cells.keys()  # one token buys nothing
    watched.lapse()
    _, runs = watched.night(hour=3)  # goes on with what was cut short, under another budget
    assert [range_of(run)[0].split("|")[0] for run in runs] == ["sae@h.0", "sae@h.1"]
    assert {run.tags["autointerp/budget"] for run in runs} == {"planted_nightly_20261129T0300"}
    watched.overrides["discovery"] = {"settle_s": 0}
    watched.launch(watched.night(hour=4)[1][0])
    assert all(head.complete for head in watched.heads().values())
    watched.lapse()
    assert [run.tags["autointerp/new_layers"][:7] for run in watched.night(5)[1]] == ["sae@h.1"]


def test_looks_at_the_same_moment_ask_for_one_run(watched, durable, monkeypatch):
    watched.instance = durable
    save_coder(watched.coders / "h.0", "h.0")
    _, (request,) = watched.tick()
    save_coder(watched.coders / "h.1", "h.1")
    _, (other,) = watched.night()  # the sensor's run is not yet made
    assert range_of(other)[0].startswith("sae@h.1|")
    assert watched.tick() == ("2 layers; nothing new", [])
    watched.lapse()  # nobody made the runs
    assert [range_of(run) for run in watched.tick()[1]] == [range_of(request), range_of(other)]

    watched.lapse()
    claim = FoundLayers.claim_launches

    def claim_late(*arguments: Any) -> set[str]:
        for run in (request, other):  # this look knows of no run, and now there are two
            watched.launch(run)
        return claim(*arguments)

    monkeypatch.setattr(FoundLayers, "claim_launches", claim_late)
    assert watched.tick() == ("2 layers; nothing new", [])


def test_a_broken_coder_is_an_event_once_and_blocks_no_other(watched):
    save_coder(watched.coders / "h.0", "h.0")
    weights = watched.coders / "h.0" / "sae.safetensors"
    save_file(load_file(weights) | {"b_dec": torch.full((D_MODEL,), torch.nan)}, weights)
    save_coder(watched.coders / "h.1", "h.1")
    _, (request,) = watched.tick()
    assert range_of(request)[0].startswith("sae@h.1|")
    for _ in range(2):
        watched.lapse()
        assert watched.tick()[1] == [request]
    key = dg.AssetKey(["planted", "sparse_coders"])
    records = watched.instance.fetch_observations(key, limit=20).records
    events = [record.asset_observation for record in records]
    shown = [event.metadata["broken"].value for event in events if event and not event.partition]
    assert len(shown) == 1
    assert "not finite" in shown[0]["sae@h.0"]
    (seen,) = watched.records.looks()
    assert (list(seen.broken), seen.line) == (["sae@h.0"], "1 layers; 1 launched, 1 broken")


def test_a_commit_on_the_hub_is_a_new_layer_or_a_new_version(watched, hub):
    watched.overrides["coders"] = {"sae": {"path": None, "repo": "me/saes"}}
    save_coder(watched.coders / "h.0", "h.0")
    hub.add("me/saes", watched.coders)
    _, (request,) = watched.tick()
    assert range_of(request)[0].startswith("sae@h.0|")
    watched.launch(request)
    weights = watched.coders / "h.0" / "sae.safetensors"
    save_file(load_file(weights) | {"b_dec": torch.ones(D_MODEL)}, weights)
    save_coder(watched.coders / "h.1", "h.1")
    hub.add("me/saes", watched.coders)
    _, (request,) = watched.tick()
    assert range_of(request)[0].startswith("sae@h.1|")
    assert [len(set(watched.observed(layer))) for layer in watched.layers] == [2, 1]
    statuses = watched.statuses()
    assert statuses["activation_cache", str(watched.study.cells[0])] == "STALE"


def test_a_new_layer_and_its_baselines_are_one_rectangle(watched):
    watched.overrides["coders"] = {
        **watched.overrides["coders"],
        "random": {"format": "random", "like": "sae"},
        "pca": {"format": "pca", "k": 8},
    }
    save_coder(watched.coders / "h.1", "h.1")
    save_coder(watched.coders / "h.0", "h.0")
    _, runs = watched.tick()
    assert [range_of(run) for run in runs] == [
        (f"sae@{h}|0000000-0000015", f"pca@{h}|0000048-0000063") for h in ("h.0", "h.1")
    ]


def test_a_run_that_fails_is_not_asked_for_again(watched):
    save_coder(watched.coders / "h.0", "h.0")
    _, (request,) = watched.tick()
    shutil.rmtree(watched.coders / "h.0")
    save_coder(watched.coders / "h.1", "h.1")
    with pytest.raises(CoderError, match=r"no coder of 'h\.0'"):
        watched.launch(request)
    _, (other,) = watched.tick()
    assert other.tags["autointerp/new_layers"].startswith("sae@h.1/")


def test_a_new_instance_is_told_of_layers_and_versions_and_asks_for_nothing_done(watched):
    save_coder(watched.coders / "h.1", "h.1")
    _, (request,) = watched.tick()
    watched.launch(request)
    save_coder(watched.coders / "week_2" / "h.1", "h.1")
    _, (request,) = watched.tick()
    watched.launch(request)
    with dg.DagsterInstance.ephemeral() as fresh:
        fresh.add_dynamic_partitions("planted_layers", ["sae@by_hand"])
        watched.instance = fresh
        assert watched.tick() == ("2 layers; nothing new", [])
        layers = fresh.get_dynamic_partitions("planted_layers")
        assert layers == ["sae@h.1", "sae@week_2:h.1"] == watched.layers
        assert [len(watched.observed(layer)) for layer in layers] == [1, 1]


def test_a_layer_that_was_added_by_hand_is_refused_before_anything_is_made(watched):
    watched.instance.add_dynamic_partitions("planted_layers", ["sae@h.0"])
    save_coder(watched.coders / "h.0", "h.0")
    tags = {"dagster/partition": "sae@h.0|0000000-0000015"}
    request = dg.RunRequest(asset_selection=[dg.AssetKey(["planted", "latent_records"])], tags=tags)
    with pytest.raises(StudyError, match="is of no layer of the study"):
        watched.launch(request)


def test_the_commands_see_the_layers_that_were_found(watched, monkeypatch):
    home = watched.folder / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setenv("DAGSTER_HOME", str(home))

    def said(*arguments: object) -> str:
        runner = CliRunner(env={"COLUMNS": "400"})
        answer = runner.invoke(app, [str(argument) for argument in arguments])
        if answer.exception is not None and not isinstance(answer.exception, SystemExit):
            raise answer.exception
        return answer.output

    path = watched.path
    assert "nobody has looked yet" in said("status", path)
    assert "no layer is registered yet" in said("run", path)
    save_coder(watched.coders / "h.0", "h.0")
    save_coder(watched.coders / "h.1", "h.1")
    (watched.coders / "h.1" / "sae.safetensors").unlink()
    found = said("discover", path)
    assert "1 layers; 1 new, 1 waiting" in found
    assert "waiting: sae@h.1: " in found
    said("run", path)
    assert "new: sae@h.0" in said("status", path)
    assert "nothing is out of date" in said("stale", path)
    assert "score_detection" in said("why", path, "sae@h.0", 1)
    assert "0/4" in said("plan", path)
    assert "all as written" in said("verify", path)
    save_coder(watched.coders / "h.1", "h.1")
    assert "1 new" in said("discover", path)
    stale = said("stale", path)
    assert "sae@h.1/0000000-0000015" in stale
    said("run", path, "--stale")
    assert logging.getLogger("autointerp_dagster").handlers == []  # lines go into no other output
    assert "nothing is out of date" in said("stale", path)
    said("discover", path, "--forget", "sae@h.1")
    assert watched.layers == ["sae@h.0"]
    assert "no layer 'sae@h.1'" in said("discover", path, "--forget", "sae@h.1")


def test_a_study_without_folder_or_store_loads_and_blocks_no_other(watched, monkeypatch):
    monkeypatch.setenv("AUTOINTERP_STUDIES", str(watched.path.parent))
    loaded = defs()
    dg.Definitions.validate_loadable(loaded)
    names = {schedule.name for schedule in loaded.schedules or ()}
    assert names == {"planted_nightly", "planted_up_to_date"}
    layers = watched.folder / "store" / "discovery" / "planted" / "layers"
    layers.mkdir(parents=True)
    (layers / "sae@h.0.json").write_text("{")
    dg.Definitions.validate_loadable(defs())
    with pytest.raises(StoreError, match=r"h\.0\.json: damaged\. Delete it"):
        watched.tick()
