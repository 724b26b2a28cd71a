"""Neither ranges, concurrency, order of answers nor interruptions change a result."""

import random
import shutil
from pathlib import Path

import dagster as dg
from bench import Bench, Script, in_flight
from planted import N_DOCUMENTS, NUM_LATENTS, build_world, write_corpus
from polars.testing import assert_frame_equal

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.types import Cell

STAGE_TABLES = (
    ("activation_cache", "activations"),
    ("latent_records", "latents"),
    ("latent_records", "windows"),
    ("explanations", "selection"),
    ("explanations", "donors"),
    ("explanations", "explanations"),
    ("score_detection", "verdicts"),
    ("score_fuzzing", "verdicts"),
    ("latent_metrics", "latent_metrics"),
    ("layer_metrics", "layer_metrics"),
    ("study_metrics", "study_metrics"),
)


def test_one_range_or_four_give_the_same_tables_from_the_same_prompts(
    whole: Bench, instance: dg.DagsterInstance, server: FakeLLMServer, tmp_path: Path
) -> None:
    """The journal is shared: had one prompt differed by a byte, it would have been sent."""
    n_asked = len(server.requests)
    one_range = whole.copied_to(tmp_path, instance, range_size=64)
    one_range.run()
    assert len(one_range.study.ranges) == 1
    for asset, table in STAGE_TABLES:
        assert_frame_equal(one_range.table(asset, table), whole.table(asset, table))
    assert len(server.requests) == n_asked
    alone = {("layer_metrics", "sae@h.0"), ("layer_metrics", "sae@h.1"), ("study_metrics", "all")}
    whole_contents, contents = whole.contents(), one_range.contents()
    assert {contents[name] == whole_contents[name] for name in alone} == {True}


def test_many_requests_answered_in_any_order_give_the_same_contents(
    small: Bench,
    instance: dg.DagsterInstance,
    server: FakeLLMServer,
    script: Script,
    lots: random.Random,
    tmp_path: Path,
) -> None:
    """Defect 11: results depended on the order in which concurrent requests ended."""
    n_asked, server.max_open = len(server.requests), 0
    script.latency_s = lambda number: lots.uniform(0.0, 0.08)
    overrides = {**small.overrides, "models": in_flight(32)}
    many = Bench(tmp_path, small.world, small.base_url, instance, overrides)
    many.run()
    assert server.max_open > 4
    assert len(server.requests) > n_asked
    assert many.contents() == small.contents()


def test_batch_size_of_the_subject_model_changes_nothing(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    models = {"subject": {"batch_size": 7}}
    overrides = {**small.overrides, "models": models}
    other = Bench(tmp_path, small.world, small.base_url, instance, overrides)
    other.run(until="latent_records")
    contents = small.contents()
    assert {name: contents[name] for name in other.contents()} == other.contents()


def test_cells_made_one_by_one_in_reverse_are_those_of_one_run(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    bench = small.copied_to(tmp_path, instance)
    for asset in ("activation_cache", "latent_records", "latent_metrics"):
        _forget(bench, asset)
    cells = [cell for cell in bench.study.cells if str(cell.layer) == "sae@h.1"]
    for cell in reversed(cells):
        bench.run([str(cell.layer)], [str(cell.range)], until="latent_metrics")
    contents, expected = bench.contents(), small.contents()
    remade = [("latent_metrics", str(cell)) for cell in cells]
    assert [contents[name] for name in remade] == [expected[name] for name in remade]
    assert {name: expected[name] for name in contents} == contents


def _forget(bench: Bench, asset: str) -> None:
    """Removes an asset's manifests, so that its cells must be made again."""
    folder = bench.folder / "store"
    shutil.rmtree(folder / asset)
    shutil.rmtree(folder / "heads" / bench.name / asset)


def test_a_document_more_leaves_earlier_windows_in_their_split(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Defect 1: the split is an attribute of the document, so growth of the corpus moves none."""
    world = build_world(tmp_path / "world")
    write_corpus(world / "corpus", N_DOCUMENTS + 8)
    grown = Bench(tmp_path, world, small.base_url, instance, small.overrides)
    grown.run(until="latent_records")
    split_of = _splits(grown)
    shared = [(context, split) for context, split in _splits(small).items() if context in split_of]
    assert len(shared) > 100
    assert all(split_of[context] == split for context, split in shared)


def _splits(bench: Bench) -> dict[int, str]:
    rows = bench.table("latent_records", "windows").select("context", "split").unique()
    splits = dict(rows.iter_rows())
    assert len(splits) == rows.height  # a context is in one split, whatever the latent
    return splits


def test_no_text_that_the_explainer_read_is_judged(whole: Bench) -> None:
    """Defect 1, on whole documents: no document gives windows to two splits."""
    windows = whole.table("latent_records", "windows").select("context", "split").unique()
    dataset = whole.heads()["token_dataset", "all"]
    contexts = whole.store.table(dataset.blob("contexts")).select("context", "document")
    splits = windows.join(contexts, on="context").select("document", "split").unique()
    assert splits["document"].is_unique().all()
    assert set(splits["split"]) == {"train", "select", "test"}


def test_cells_are_addressed_by_layer_and_range(whole: Bench) -> None:
    """Defect 10: what belongs to one layer is never read as another's."""
    for cell in whole.study.cells:
        head = whole.heads()["latent_records", str(cell)]
        if head.status == "ok":
            latents = whole.store.table(head.blob("latents"))
            assert latents["hookpoint"].unique().to_list() == [cell.layer.hookpoint]
            assert latents["latent"].to_list() == list(range(cell.range.start, _stop(cell)))


def _stop(cell: Cell) -> int:
    return min(cell.range.stop, NUM_LATENTS[cell.layer.hookpoint])
