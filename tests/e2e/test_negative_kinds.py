"""Negatives of all four kinds in one study, from the corpus to the metrics of each kind."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from bench import SMALL, Bench
from planted import WINDOW_LEN, build_world, read_marks
from test_embedding import build_embedder

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.window_vectors import NearestWindows
from autointerp_dagster.core.config import FuzzingConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.latent_records import (
    LatentRecord,
    RecordTables,
    Window,
    records_in_order,
)
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.scorers import ScoringTask, fuzzing
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import window_grid
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.negative_sources import RecordSources
from autointerp_dagster.resources.preflight import check_study
from autointerp_dagster.resources.recording import store_records
from autointerp_dagster.resources.stage_inputs import StageInputs

KINDS = ["random", "neighbour", "similar", "same_token"]

pytestmark = pytest.mark.slow


def overrides(embedder: Path) -> dict[str, Any]:
    models = {"embedder": {"source": str(embedder), "device": "cpu", "query_prefix": ""}}
    sampling = {"negative_kinds": KINDS, "n_negative_test": 20, "n_negative_train": 8}
    return {**SMALL, "latents": [0, 1, 7, 9, 14, 40], "models": models, "sampling": sampling}


@dataclass
class Materialized:
    """The study after one run."""

    bench: Bench

    @cached_property
    def windows(self) -> pl.DataFrame:
        """Of both layers."""
        return self.bench.table("latent_records", "windows")

    @cached_property
    def dataset(self) -> TokenDataset:
        return read_dataset(self.bench.store, self.bench.heads()["token_dataset", "all"])

    @cached_property
    def firing(self) -> dict[tuple[str, int, int], dict[int, float]]:
        """Activations by (hookpoint, latent, window id), by position in the window."""
        found: dict[tuple[str, int, int], dict[int, float]] = {}
        for hookpoint in ("h.0", "h.1"):
            for (asset, place), head in self.bench.heads().items():
                if asset != "activation_cache" or hookpoint not in place or head.status != "ok":
                    continue
                rows = self.bench.store.table(head.blob("activations"))
                for latent, context, position, value in rows.iter_rows():
                    start = position // WINDOW_LEN * WINDOW_LEN
                    key = (hookpoint, latent, context << 16 | start)
                    found.setdefault(key, {})[position - start] = value
        return found

    def records(self) -> Iterator[LatentRecord]:
        """Of every latent that can be explained."""
        for (asset, place), head in self.bench.heads().items():
            if asset == "latent_records" and head.status == "ok":
                layer = LayerKey.parse(place.rsplit("/", maxsplit=1)[0])
                tables = RecordTables(
                    *(self.bench.store.table(head.blob(name)) for name in ("latents", "windows"))
                )
                latents = tables.latents.filter(status="ok")["latent"].to_list()
                yield from records_in_order(tables, self.dataset, layer, latents)

    def neighbour_in(self, record: LatentRecord, window: Window) -> int:
        """Who fires in a negative of kind ``neighbour``."""
        rows = self.windows.filter(
            hookpoint=record.latent.hookpoint,
            latent=record.latent.index,
            window_id=window.window_id,
            negative_kind="neighbour",
        )
        return rows["neighbour"].item()

    def tokens(self, window_id: int) -> list[int]:
        context, start = window_id >> 16, window_id & 0xFFFF
        tokens = self.dataset.context_tokens(context)
        return tokens[max(start, 1) : start + WINDOW_LEN].tolist()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def study(
    server: FakeLLMServer, embedder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Materialized]:
    folder = tmp_path_factory.mktemp("kinds")
    with dg.DagsterInstance.ephemeral() as kept:
        bench = Bench(
            folder, build_world(folder / "world"), server.base_url, kept, overrides(embedder)
        )
        bench.run()
        yield Materialized(bench)


def silent(study: Materialized, kind: str) -> list[dict[str, Any]]:
    rows = study.windows.filter(negative_kind=kind).to_dicts()
    assert len(rows) > 20, kind
    return rows


def test_all_is_made_by_one_run_and_fresh(study: Materialized) -> None:
    assert study.bench.stale() == set()
    counts = study.windows.filter(~pl.col("is_activating"), split="test")
    per_kind = counts.group_by("hookpoint", "latent", "negative_kind").len()
    assert per_kind["len"].max() == 20 // len(KINDS)


def test_no_latent_is_active_in_a_negative_of_its_own(study: Materialized) -> None:
    for kind in KINDS:
        for row in silent(study, kind):
            key = (row["hookpoint"], row["latent"], row["window_id"])
            assert key not in study.firing


def test_a_neighbour_fires_where_it_is_said_to_and_as_it_is_said_to(study: Materialized) -> None:
    near = study.bench.table("neighbours", "neighbours")
    pairs = set(near.select("hookpoint", "latent", "neighbour").iter_rows())
    for row in silent(study, "neighbour"):
        assert (row["hookpoint"], row["latent"], row["neighbour"]) in pairs
        fired = study.firing[row["hookpoint"], row["neighbour"], row["window_id"]]
        expected = [fired.get(i, 0.0) for i in range(WINDOW_LEN)]
        assert row["neighbour_activations"] == pytest.approx(expected)
    others = study.windows.filter(pl.col("negative_kind").ne_missing("neighbour"))
    assert others["neighbour"].null_count() == others.height
    assert others["neighbour_activations"].null_count() == others.height


def test_a_window_of_the_same_token_shows_it(study: Materialized) -> None:
    latents = study.bench.table("latent_records", "latents")
    top = {(h, n): t for h, n, t in latents.select("hookpoint", "latent", "top_tokens").iter_rows()}
    for row in silent(study, "same_token"):
        assert top[row["hookpoint"], row["latent"]][0] in study.tokens(row["window_id"])


def test_a_similar_window_is_among_the_nearest_of_an_activating_one(study: Materialized) -> None:
    grid = window_grid(study.dataset, study.bench.study.sampling)
    head = study.bench.heads()["window_embeddings", "all"]
    search = NearestWindows.read(study.bench.store, head, grid)
    shown = study.windows.filter(is_activating=True)
    ids = shown["window_id"].to_numpy()
    window = np.searchsorted(grid.window_id, ids)
    near: dict[tuple[str, int], set[int]] = {}
    for split in range(3):
        found = search.nearest(window, split)
        for i in np.flatnonzero(grid.split[window] == split).tolist():
            key = (shown["hookpoint"][i], shown["latent"][i])
            near.setdefault(key, set()).update(found[i][found[i] >= 0].tolist())
    for row in silent(study, "similar"):
        at = int(np.searchsorted(grid.window_id, row["window_id"]))
        assert at in near[row["hookpoint"], row["latent"]]


def test_each_distinct_window_was_embedded_once(study: Materialized) -> None:
    summary = study.bench.heads()["window_embeddings", "all"].summary
    grid = window_grid(study.dataset, study.bench.study.sampling)
    shown = {tuple(study.tokens(int(i))) for i in grid.window_id}
    assert summary["n_windows"] == grid.n_windows
    assert summary["n_embedded"] == summary["n_distinct"] == len(shown)


def test_every_kind_is_judged_and_measured_apart(study: Materialized) -> None:
    for scorer in ("detection", "fuzzing"):
        verdicts = study.bench.table(f"score_{scorer}", "verdicts")
        assert set(verdicts["negative_kind"].drop_nulls()) == set(KINDS)
        assert set(verdicts["status"]) == {"ok"}
    metrics = study.bench.table("latent_metrics", "latent_metrics").filter(subject="own")
    for kind in KINDS:
        for scorer in ("detection", "fuzzing"):
            rows = metrics.filter(
                scorer=scorer, variant=f"negatives={kind}", metric="specificity", status="ok"
            )
            assert rows.height > 0
            assert rows["value"].min() == 1.0  # the true explanation, and an ideal judge
    weighted = metrics.filter(metric="precision_weighted", variant="all", status="ok")
    assert weighted["value"].min() == 1.0


def test_false_marks_in_a_neighbours_window_are_where_the_neighbour_fires(
    study: Materialized,
) -> None:
    detokenizer = SubjectModels().of(study.bench.study).detokenizer
    n_seen = 0
    for record in study.records():
        task = ScoringTask(record.latent, "default", "own", record.latent.index, "anything")
        block = JournalBlock("score_fuzzing", "c0de", 0)
        for prompt in fuzzing.prompts_of(record, task, FuzzingConfig(), detokenizer, block):
            for shown in prompt.windows:
                if shown.window.negative_kind == "neighbour":
                    key = (record.latent.hookpoint, study.neighbour_in(record, shown.window))
                    fired = study.firing[(*key, shown.window.window_id)]
                    hidden = WINDOW_LEN - len(shown.window.tokens)
                    visible = np.array([fired.get(i, 0.0) for i in range(hidden, WINDOW_LEN)])
                    _, marks = read_marks(shown.text)
                    assert marks == (visible >= 0.3 * visible.max()).tolist()
                    n_seen += 1
    assert n_seen > 20


def test_blocks_of_latents_change_nothing(study: Materialized) -> None:
    bench = study.bench
    stage = StageInputs.of(bench.store, bench.study, "latent_records")
    sources = RecordSources(stage, bench.study, study.dataset)
    cell = bench.study.cells[0]
    made = store_records(sources, cell, block_rows=1)
    stored = bench.heads()["latent_records", str(cell)].blobs
    assert {b.content_hash for b in made.blobs} == {b.content_hash for b in stored}


def test_a_second_study_with_fewer_kinds_embeds_nothing_anew(
    study: Materialized, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    other = study.bench.copied_to(tmp_path, instance)
    sampling = {**other.overrides["sampling"], "negative_kinds": ["similar"]}
    other.overrides = {**other.overrides, "sampling": sampling}
    other.name = "other"
    before = study.bench.heads()["window_embeddings", "all"]
    other.run(until="latent_records")
    assert other.heads()["window_embeddings", "all"].path == before.path
    assert "neighbours" not in {asset for asset, _ in other.heads()}
    kinds = other.table("latent_records", "windows")["negative_kind"].drop_nulls()
    assert set(kinds) == {"similar"}


def test_a_missing_embedder_is_found_before_anything_is_made(
    server: FakeLLMServer, world: Path, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, world, server.base_url, instance, overrides(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="nowhere"):
        check_study(bench.study, {"window_embeddings"})
    with pytest.raises(ModelError, match="nowhere"):
        bench.run()
    assert bench.heads() == {}
