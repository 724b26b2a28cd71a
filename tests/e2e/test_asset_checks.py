"""Checks: sound results pass them, and nonsense stops a run before anything is made from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import torch
from bench import Bench, Script
from planted import D_MODEL, VOCABULARY, WINDOW_LEN, answer, read_marks
from safetensors.torch import save_file
from typer.testing import CliRunner

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.llm.fake.rule_judge import ChatMessages
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.manifests import Blob, Manifest, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli import app
from autointerp_dagster.core.errors import CheckError
from autointerp_dagster.core.prompts import asked_for, read_question
from autointerp_dagster.core.schemas import SELECTION, WINDOWS, Table
from autointerp_dagster.definitions import build_definitions, build_resources, build_study
from autointerp_dagster.partitions import code_version, partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.resources.measuring import Measuring
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study.checking import checks_of
from autointerp_dagster.study.stages import STAGES, stages_of


def checked(bench: Bench) -> dict[tuple[str, str], Any]:
    """The last evaluation of each check that there was."""
    keys = [
        dg.AssetCheckKey(asset_key(bench.study, stage), check)
        for stage in stages_of(bench.study)
        for check in checks_of(bench.study, stage)
    ]
    records = bench.instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    return {
        (key.asset_key.path[-1], key.name): record.event.dagster_event.event_specific_data
        for key, record in records.items()
    }


def heads_of(bench: Bench, asset: str) -> dict[str, str]:
    """The manifest of every place of an asset."""
    return {place: str(head.path) for (name, place), head in bench.heads().items() if name == asset}


def judged_by(judge: Callable[[ChatMessages], str]) -> Callable[[ChatMessages], str]:
    """A fake model that explains as ever and judges like this."""

    def reply(messages: ChatMessages) -> str:
        is_explaining = asked_for(messages[0]["content"]) == "explanation"
        return answer(messages) if is_explaining else judge(messages)

    return reply


def with_another_judge(small: Bench, folder: Path, instance: dg.DagsterInstance) -> Bench:
    """The small study with all that its judge has no part in."""
    judge = {"max_in_flight": 8, "extra_body": {"top_p": 0.9}}
    return small.copied_to(
        folder, instance, models={"explainer": {"max_in_flight": 8}, "judge": judge}
    )


def test_a_sound_study_passes_every_check(small: Bench) -> None:
    found = checked(small)
    assert found.keys() == {
        (stage.name, check)
        for stage in stages_of(small.study)
        for check in checks_of(small.study, stage)
    }
    assert all(evaluation.passed and evaluation.blocking for evaluation in found.values())
    assert {check for _, check in found} == {
        "schema", "splits_disjoint", "failed_rate", "share_scored", "judge_floor",
    }  # fmt: skip
    assert found["score_detection", "failed_rate"].metadata["n_asked"].value == 160


def test_a_rerun_reads_no_table(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is in the manifests."""

    def refuse(store: Store, blob: Blob) -> bytes:
        raise AssertionError(f"{blob.path} was read")

    monkeypatch.setattr(Store, "verified_bytes", refuse)
    small.run()
    assert all(evaluation.passed for evaluation in checked(small).values())


def test_a_judge_that_never_answers_stops_the_run_until_the_bounds_are_moved(
    small: Bench,
    instance: dg.DagsterInstance,
    server: FakeLLMServer,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script.answer = judged_by(lambda messages: "I would rather talk about something else.")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    bench = with_another_judge(small, tmp_path, instance)
    one_cell = ["--layers", "sae@h.0", "--ranges", "0000000-0000015"]
    told = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["run", str(bench.path), *one_cell])
    assert told.exit_code == 1
    (line,) = [line for line in told.output.splitlines() if line.startswith("CheckError")]
    assert line.startswith(
        "CheckError planted: score_detection: failed_rate: found default 1.000 [0.342, 1.000] of "
        "80 answers failed (unparsable 80); sae@h.0/0000000-0000015 default: 1.000 ["
    )
    assert "; wanted a share of at most 0.2. Read some with" in line
    assert heads_of(bench, "latent_metrics") == heads_of(small, "latent_metrics")

    with pytest.raises(CheckError, match="score_detection: failed_rate"):
        bench.run()
    judged = heads_of(bench, "score_detection")
    assert not judged.items() & heads_of(small, "score_detection").items()

    # Refused again by a run that makes nothing anew, and what there is is shown all the same.
    n_asked = len(server.requests)
    with pytest.raises(CheckError, match="score_detection: failed_rate"):
        bench.run()
    assert len(server.requests) == n_asked
    assert manifests_shown(bench, "score_detection") == judged
    assert not checked(bench)["score_detection", "failed_rate"].passed

    bench.overrides["checks"] = {"failed_rate": None, "share_scored": 0.9}  # of few latents
    with pytest.raises(CheckError, match="latent_metrics: share_scored") as refused:
        bench.run()
    assert "detection default 0.000 [0.000, 0.490] of 4" in str(refused.value)
    assert heads_of(bench, "latent_metrics") != heads_of(small, "latent_metrics")
    assert heads_of(bench, "layer_metrics") == heads_of(small, "layer_metrics")

    # Nothing is made from it by a run of its own either, as that of Dagster's automation.
    for layer in bench.study.layer_keys:
        with pytest.raises(CheckError, match="layer_metrics is not made from latent_metrics"):
            dg.materialize(
                build_study(bench.study),
                selection=[asset_key(bench.study, STAGES["layer_metrics"])],
                partition_key=partition_key(layer),
                instance=instance,
                resources=build_resources(),
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
    assert heads_of(bench, "layer_metrics") == heads_of(small, "layer_metrics")

    bench.overrides["checks"] = {"failed_rate": None, "share_scored": None}
    bench.run()
    assert heads_of(bench, "score_detection") == judged
    assert heads_of(bench, "layer_metrics") != heads_of(small, "layer_metrics")
    assert bench.stale() == set()


def manifests_shown(bench: Bench, asset: str) -> dict[str, str]:
    """Of each place, the manifest that the newest event of Dagster names."""
    key, shown = asset_key(bench.study, STAGES[asset]), {}
    for cell in bench.study.cells:
        where = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[str(partition_key(cell))])
        (record,) = bench.instance.fetch_materializations(where, limit=1).records
        event = record.asset_materialization
        assert event is not None
        shown[str(cell)] = event.metadata["manifest"].value
    return shown


def tampered(
    bench: Bench, asset: str, table: Table, change: Callable[[pl.DataFrame], pl.DataFrame]
) -> Manifest:
    """Puts another table in the place of the first that has rows, as if the stage had made it."""
    for (name, place), head in bench.heads().items():
        blob = next((blob for blob in head.blobs if blob.name == table.name), None)
        if name != asset or blob is None or not blob.n_rows or blob.n_rows < 2:
            continue
        new = bench.store.put_table(table, change(bench.store.table(blob)))
        blobs = tuple(new if old == blob else old for old in head.blobs)
        content_hash = content_hash_of(blobs, head.status)
        (cell,) = [cell for cell in bench.study.cells if str(cell) == place]
        stage = StageInputs.of(bench.store, bench.study, asset)
        findings = Measuring(stage).findings(cell, blobs)
        changed = head.model_copy(
            update={"blobs": blobs, "content_hash": content_hash, "findings": findings}
        )
        (bench.folder / "store" / str(head.path)).unlink()
        kept = bench.store.commit(changed)
        bench.store.set_head(bench.name, asset, place, kept)
        return kept
    raise AssertionError(f"no {table.name} in {asset}")


def test_a_window_in_another_split_lets_no_step_below_run(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    bench = small.copied_to(tmp_path, instance)
    other = pl.when(pl.col("split") == "test").then(pl.lit("train")).otherwise("split")
    wrong = tampered(
        bench,
        "latent_records",
        WINDOWS,
        lambda windows: WINDOWS.conform(
            windows.with_columns(
                split=pl.when(pl.int_range(pl.len()) < 100).then(other).otherwise("split")
            )
        ),
    )
    study = bench.study
    cells = study.cells
    result = dg.materialize(  # as the UI does: other steps go on
        build_study(study),
        selection=[
            asset_key(study, STAGES[name])
            for name in ("latent_records", "explanations", "score_detection")
        ],
        instance=instance,
        resources=build_resources(),
        tags={
            "dagster/asset_partition_range_start": str(partition_key(cells[0])),
            "dagster/asset_partition_range_end": str(partition_key(cells[-1])),
        },
        raise_on_error=False,
    )
    assert not result.success
    steps = {
        step: [e.event_type_value for e in result.all_events if e.step_key == step]
        for step in ("planted__latent_records", "planted__explanations", "planted__score_detection")
    }
    assert "STEP_FAILURE" in steps["planted__latent_records"]
    assert "STEP_START" not in steps["planted__explanations"]
    assert "STEP_START" not in steps["planted__score_detection"]
    found = checked(bench)["latent_records", "splits_disjoint"]
    assert not found.passed
    assert found.metadata["n_wrong"].value > 0
    assert str(wrong.path) in found.metadata["places"].value
    assert checked(bench)["latent_records", "schema"].passed
    assert manifests_shown(bench, "latent_records")[wrong.cell] == wrong.path


def test_a_table_out_of_order_is_named_with_its_cell(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    bench = small.copied_to(tmp_path, instance)
    wrong = tampered(bench, "explanations", SELECTION, lambda rows: rows.reverse())
    with pytest.raises(CheckError) as refused:
        bench.run(until="explanations")
    assert str(refused.value).startswith("planted: explanations: schema: found 1 places with")
    assert f"{wrong.cell}: selection: rows are not sorted by key (manifest {wrong.path})" in str(
        refused.value
    )


def test_a_judge_that_knows_the_truth_whatever_the_explanation_is_found_out(
    small: Bench, instance: dg.DagsterInstance, script: Script, tmp_path: Path
) -> None:
    """As when prompts give the answer away."""
    script.answer = judged_by(TellTale(small))
    bench = with_another_judge(small, tmp_path, instance)
    bench.overrides["checks"] = {"judge_floor": 0.05}  # there are few latents
    with pytest.raises(CheckError, match="score_detection: judge_floor: found a balanced accuracy"):
        bench.run(until="score_detection")
    assert checked(bench)["score_detection", "failed_rate"].passed


def save_rebuilder(folder: Path, scale: float) -> None:
    """A TopK autoencoder that gives back ``scale`` times what it reads: two latents a dimension.

    Four dimensions of the planted stream are not zero, so four latents fire on every token.
    """
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    tensors = {
        "encoder.weight": both,
        "encoder.bias": torch.zeros(2 * D_MODEL),
        "W_dec": both * scale,
        "b_dec": torch.zeros(D_MODEL),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "num_latents": 2 * D_MODEL, "k": 4, "d_in": D_MODEL}
    (folder / "cfg.json").write_text(json.dumps(config))


def test_a_coder_of_another_scale_stops_the_run_at_the_activation_cache(
    world: Path, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    for hookpoint, scale in {"h.0": 1.0, "h.1": 10.0}.items():
        save_rebuilder(tmp_path / "coders" / hookpoint, scale)
    overrides = {
        "coders": {"sae": {"path": str(tmp_path / "coders")}},
        "max_num_latents": 2 * D_MODEL,
        "range_size": 2 * D_MODEL,
        "floors": {"sample": 0},
        "checks": {"fvu": 1.0, "l0": 2.0},
    }
    bench = Bench(tmp_path, world, "http://127.0.0.1:9", instance, overrides)
    with pytest.raises(CheckError) as refused:
        bench.run(until="latent_records")
    # Ten times too large, it is wrong by 9 x: 81 times the variance, and more for the mean.
    found = checked(bench)["activation_cache", "reconstruction"]
    assert found.metadata["fvu sae@h.0"].value < 0.01
    assert found.metadata["fvu sae@h.1"].value > 81
    assert found.metadata["l0 sae@h.0"].value == pytest.approx(4, rel=0.02)
    assert str(refused.value).startswith("planted: activation_cache: reconstruction: found fvu ")
    assert "; sae@h.1: fvu 1" in str(refused.value)
    assert heads_of(bench, "latent_records") == {}
    cached = heads_of(bench, "activation_cache")

    bench.overrides["checks"] = {"fvu": 200.0, "l0": 2.0}
    bench.run(until="latent_records")
    assert heads_of(bench, "activation_cache") == cached
    assert len(heads_of(bench, "latent_records")) == 2


class TellTale:
    """Says which windows activate the latent that they were drawn for."""

    def __init__(self, bench: Bench) -> None:
        dataset = read_dataset(bench.store, bench.heads()["token_dataset", "all"])
        windows = bench.table("latent_records", "windows").filter("is_activating", split="test")
        self.activating = {
            " ".join(VOCABULARY[t] for t in dataset.context_tokens(c)[s : s + WINDOW_LEN] if t)
            for c, s in windows.select("context", "start").iter_rows()
        }

    def __call__(self, messages: ChatMessages) -> str:
        question = read_question(messages[-1]["content"])
        shown = [" ".join(read_marks(window)[0]) for window in question.windows]
        return json.dumps([int(window in self.activating) for window in shown])


def test_bounds_are_no_parameter_of_any_result(small: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path, small.world, small.base_url, small.instance, {**small.overrides})
    other.overrides["checks"] = {"failed_rate": 0.5, "judge_floor": None, "l0": 3.0}
    for stage in stages_of(small.study):
        assert code_version(other.study, stage) == code_version(small.study, stage)


def test_checks_that_are_switched_off_are_not_there(small: Bench, tmp_path: Path) -> None:
    bounds = dict.fromkeys(("failed_rate", "share_scored", "judge_floor", "fvu", "l0"))
    off = Bench(tmp_path, small.world, small.base_url, small.instance, {**small.overrides})
    off.overrides["checks"] = bounds
    graph = build_definitions([off.study]).resolve_asset_graph()
    left = {"schema", "splits_disjoint", "up_to_date"}
    assert {key.name for key in graph.asset_check_keys} == left
