"""The neighbours stage: what a killed run has found is kept, and windows are drawn in groups."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from toy import range_tags

from autointerp_dagster.adapters.datasets import write_dataset
from autointerp_dagster.adapters.manifests import Blob, Manifest, Provenance, content_hash_of
from autointerp_dagster.adapters.shards import write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import Cell, Place
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.neighbouring import WINDOWS_AT_ONCE, Neighbouring
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study

WIDTH, RANGE, N_CELLS = 24, 6, 4


class KilledError(Exception):
    """As a kill."""


class Progress:
    """Notes what is done; stops a run before an item."""

    def __init__(self, dies_in: str = "", number: int = 0, dies_before: int = 0) -> None:
        self.done: list[str] = []
        self._dies_in, self._number, self._dies_before = dies_in, number, dies_before

    def __call__(self, items: Iterable[Any], *, description: str, **_: Any) -> Iterator[Any]:
        self.done.append(description.split()[-1])
        dies = self.done[-1] == self._dies_in and self.n(self._dies_in) == self._number
        for at, item in enumerate(items):
            if dies and at == self._dies_before:
                raise KilledError
            yield item

    def n(self, description: str) -> int:
        """How often something was done."""
        return self.done.count(description)


class World:
    """A corpus and the cache of one layer as a store has them."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.store, self.instance = Store(folder), instance
        self.study = Study.model_validate(
            {
                "name": "s",
                "models": {"subject": {"source": "none"}, "explainer": {"source": "none"}},
                "corpus": {"kind": "embedded"},
                "coders": {"sae": {"path": "none"}},
                "layers": ["h.0"],
                "max_num_latents": WIDTH,
                "range_size": RANGE,
                "explainers": {"default": {"kind": "default"}},
                "floors": {"donor_block": RANGE},
                "tokens": {"context_len": 16},
                "sampling": {"window_len": 4},
                "neighbours": {"n_neighbours": 3, "n_windows": 5},
            }
        )
        dataset = corpus()
        self._commit("token_dataset", "all", write_dataset(self.store, dataset))
        activations = layer_activations(dataset)
        counts = activations.group_by("latent").agg(
            n_tokens=pl.len(),
            n_contexts=pl.col("context").n_unique(),
            max_activation=pl.col("activation").max(),
        )
        for cell in self.cells:
            latents = range(cell.range.start, cell.range.stop)
            mine = activations.filter(pl.col("latent").is_in(list(latents)))
            n_rows = np.bincount(mine["latent"].to_numpy(), minlength=WIDTH)[latents.start :][
                :RANGE
            ]
            blobs = write_shard(self.store, [mine], n_rows)
            blobs.append(self.store.put_table(FIRING_COUNTS, FIRING_COUNTS.conform(counts)))
            self._commit("activation_cache", cell, blobs)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return self.study.cells

    def _commit(self, stage: str, place: str | Place, blobs: list[Blob]) -> None:
        manifest = self.store.commit(
            Manifest(
                stage=stage, stage_version="2", cell=str(place), input_fingerprint="f",
                content_hash=content_hash_of(blobs, "ok"), complete=True, parameters={},
                upstream=(), blobs=tuple(blobs),
                provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0.0),
            )
        )  # fmt: skip
        self.store.set_head("s", stage, str(place), manifest)

    def run(self, progress: Progress, windows_at_once: int = WINDOWS_AT_ONCE) -> None:
        config = self.study.finds_neighbours
        assert config is not None

        @stage_asset(self.study, "neighbours")
        def neighbours(
            context: dg.AssetExecutionContext, store: StoreResource
        ) -> Iterator[dg.MaterializeResult]:
            with store.stage(context, self.study, "neighbours") as stage:
                Neighbouring(
                    stage, self.study, config, Coders(), progress, windows_at_once
                ).commit_cells()
                yield from stage.report()

        dg.materialize(
            [neighbours],
            instance=self.instance,
            resources={"store": StoreResource(root=str(self.store.root))},
            tags=range_tags(self.cells[0], self.cells[-1]),
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )

    def heads(self) -> list[Manifest | None]:
        return [self.store.head("s", "neighbours", str(cell)) for cell in self.cells]

    def checksums(self) -> list[list[str]]:
        return [[blob.checksum for blob in head.blobs] for head in self.heads() if head]

    def n_found(self) -> int:
        return len(list(Path(str(self.store.root)).glob("parts/neighbours/*.json")))


def corpus() -> TokenDataset:
    texts = [Document(f"{i}", f"{i}") for i in range(30)]
    config = TokenConfig(n_tokens=10_000, context_len=16, min_visible=8)
    return build_token_dataset(
        texts, lambda batch: [[int(text) + 1] * 15 for text in batch], 0, config
    )


def layer_activations(dataset: TokenDataset) -> pl.DataFrame:
    rng = np.random.default_rng(1)
    n_contexts = len(dataset.offsets) - 1
    latent, context, position = np.nonzero(rng.random((WIDTH, n_contexts, 16)) < 0.1)
    kept = position > 0
    columns = {"latent": latent, "context": context, "position": position}
    frame = pl.DataFrame({name: values[kept] for name, values in columns.items()})
    return ACTIVATIONS.conform(frame.with_columns(activation=pl.lit(1.5, dtype=pl.Float32)))


@pytest.fixture
def world(tmp_path: Path, instance: dg.DagsterInstance) -> World:
    return World(tmp_path / "store", instance)


@pytest.fixture
def whole(tmp_path: Path, instance: dg.DagsterInstance) -> World:
    """What a run makes that nothing stops."""
    made = World(tmp_path / "whole", instance)
    made.run(Progress())
    assert len(made.checksums()) == N_CELLS
    assert all(head.summary["n_windows"] > RANGE for head in made.heads() if head)
    return made


def test_a_run_killed_in_its_search_keeps_the_cells_that_were_searched(
    world: World, whole: World
) -> None:
    with pytest.raises(KilledError):
        world.run(Progress("cofiring", 1, dies_before=3))
    assert world.n_found() == 3
    world.run(Progress())
    assert world.checksums() == whole.checksums()
    assert world.n_found() == N_CELLS


def test_a_run_killed_in_its_last_pass_searches_nothing_again_and_keeps_what_was_committed(
    world: World, whole: World
) -> None:
    first = Progress("windows", N_CELLS)
    with pytest.raises(KilledError):
        world.run(first, windows_at_once=1)
    assert [head is not None for head in world.heads()] == [True] * (N_CELLS - 1) + [False]
    rest = Progress()
    world.run(rest, windows_at_once=1)
    assert rest.n("firings") == 0
    assert rest.n("windows") == 1
    assert world.checksums() == whole.checksums()


@pytest.mark.parametrize(("at_once", "n_passes"), [(1, 4), (WIDTH * 5, 1)])
def test_windows_drawn_for_some_cells_at_a_time_are_the_same(
    world: World, whole: World, at_once: int, n_passes: int
) -> None:
    progress = Progress()
    world.run(progress, windows_at_once=at_once)
    assert progress.n("windows") == n_passes
    assert progress.n("firings") == 2
    assert world.checksums() == whole.checksums()
