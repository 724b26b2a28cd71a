"""What a score was made from: the store's walk, Dagster's own records, and the table in the UI."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import dagster as dg
import pytest
from dagster_walk import INPUT_VERSION, DagsterWalk, Event
from toy import H0, H1, Name, Toy
from upath import UPath

from autointerp_dagster.adapters import heads
from autointerp_dagster.adapters.lineage import Lineage, lineage_of
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.core.scorers.detection import VERSION
from autointerp_dagster.core.types import Place
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.resources.showing_lineage import lineage_rows, with_lineage
from autointerp_dagster.study.stages import SCORE_STAGES, STAGES, places_of, stages_of

SCORERS = {"scorers": {"detection": {}, "intruder": {}}, "max_num_latents": 20}
NEIGHBOURS = {"sampling": {"negative_kinds": ["random", "neighbour"]}}
CHANGES = {**SCORERS, **NEIGHBOURS}
JUDGE = "http://127.0.0.1:8000/v1|a/judge"


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """Made twice; in between both coders were trained on, which left ``h.1``'s activations as they
    were. Do not run it again."""
    with dg.DagsterInstance.ephemeral() as kept:
        root = tmp_path_factory.mktemp("twice")
        models = {"score_detection": {"judge": JUDGE}}
        toy = Toy(root / "store", kept, changes=dict(CHANGES), models=models)
        toy.run_all()
        cells = [str(cell) for cell in toy.study.cells if cell.layer == H0]
        stages = [stage.name for stage in stages_of(toy.study) if stage.scope == "cell"]
        toy.versions = {"sparse_coders": "trained on"}
        toy.contents = {(name, cell): f"{name} {cell} anew" for name in stages for cell in cells}
        toy.contents |= {("layer_metrics", str(H0)): "anew", ("study_metrics", "all"): "anew"}
        toy.run_all()
        yield toy


def events(toy: Toy) -> Iterator[tuple[Event, Manifest]]:
    """Each last word on a place in a run, with the manifest that it names."""
    for stage in stages_of(toy.study):
        for place in () if stage.is_external else places_of(toy.study, stage.scope):
            for record in toy.events(stage.name, place):
                event = record.asset_materialization
                if event is not None and "manifest" in event.metadata:
                    tags, path = dict(event.tags or {}), event.metadata["manifest"].value
                    key, version = event.asset_key, tags["dagster/data_version"]
                    named = Event(key, event.partition, version, record.storage_id, tags)
                    yield named, toy.store.manifest(str(path))


def external_and_made(lineage: Lineage) -> dict[Name, str]:
    mine = {(made.asset, made.cell): made.content_hash for made in lineage.made}
    return mine | {(name.split()[0], name.split()[1]): v for name, v in lineage.external.items()}


def test_every_step_names_the_versions_that_dagster_recorded_before_and_after(twice: Toy) -> None:
    recorded, n_steps, superseded = DagsterWalk(twice), 0, set()
    for event, manifest in events(twice):
        assert event.version == manifest.content_hash
        read = {(up.asset, up.cell): up.content_hash for up in manifest.upstream}
        assert {one.name: one.version for one in recorded.inputs(event)} == read, event.name
        for asset in {asset for asset, _ in read}:
            versions = {version for (name, _), version in read.items() if name == asset}
            assert event.tags[f"{INPUT_VERSION}{twice.name}/{asset}"] in versions
        n_steps += len(read)
        if manifest.path != twice.store.head(twice.name, *event.name).path:
            superseded.add(event.name)
    places = {name for name, _ in superseded}
    assert places == {s.name for s in stages_of(twice.study) if s.upstream} - {"token_dataset"}
    assert n_steps > 150


def test_whole_walks_agree_of_old_heads_and_of_new_ones(twice: Toy) -> None:
    recorded, externals = DagsterWalk(twice), []
    for event, manifest in events(twice):
        if event.name[1].startswith(str(H0)):
            walk = lineage_of(twice.store, manifest)
            assert external_and_made(walk) == recorded.below(event), event.name
            externals.append(walk.external[f"sparse_coders {H0}"])
    assert set(externals) == {"sparse_coders sae@h.0 as it was", "trained on"}
    assert len(externals) > 20


def test_an_input_made_anew_with_the_same_content_keeps_the_walk_that_was(twice: Toy) -> None:
    """The one difference: the score was not made again, and its walk is of when it was made."""
    cell = next(cell for cell in twice.study.cells if cell.layer == H1)
    walk = lineage_of(twice.store, twice.head("score_intruder", cell))
    assert walk.external[f"sparse_coders {H1}"] == "sparse_coders sae@h.1 as it was"
    recorded = DagsterWalk(twice)
    key = asset_key(twice.study, STAGES["score_intruder"])
    event = recorded.newest(key, partition_key(cell))
    assert event is not None
    assert recorded.below(event)["sparse_coders", str(H1)] == "trained on"
    read = {(up.asset, up.cell): up.content_hash for up in walk.manifest.upstream}
    assert {one.name: one.version for one in recorded.inputs(event)} == read


def records(value: dg.MetadataValue) -> list[dict[str, str]]:
    """The rows of a table in the UI."""
    assert isinstance(value, dg.TableMetadataValue)
    return [{key: str(cell) for key, cell in record.data.items()} for record in value.records]


def test_scores_and_their_metrics_show_what_they_were_made_from(twice: Toy) -> None:
    for event, _ in events(twice):
        metadata = twice.event(*_place_of(twice, event)).metadata
        assert ("lineage" in metadata) == (event.name[0] in {*SCORE_STAGES, "latent_metrics"})
    cell = twice.study.cells[1]
    head = twice.head("score_detection", cell)
    walk = lineage_of(twice.store, head)
    shown = records(twice.event("score_detection", cell).metadata["lineage"])
    assert shown == lineage_rows(walk)
    made = {row["made from"]: row for row in shown}
    assert list(made) == [
        "score_detection", "explanations", "latent_records", "neighbours", "activation_cache",
        "token_dataset", "sparse_coders", "corpus", "subject_model",
    ]  # fmt: skip
    for asset, manifest in {**walk.ancestors, "score_detection": head}.items():
        row = made[asset]
        assert (row["version"], row["run"]) == (manifest.stage_version, manifest.provenance.run_id)
        assert row["content"] == manifest.content_hash[:12]
    assert made["activation_cache"]["place"] == f"{cell} and 1 more"
    assert made["sparse_coders"]["content"] == "trained on"
    assert made["score_detection"]["asked, read"] == f"judge {JUDGE}, prompt scorer {VERSION}"
    assert made["explanations"]["asked, read"].startswith("prompt explainers.default.version ")


def _place_of(toy: Toy, event: Event) -> tuple[str, Place]:
    name, place = event.name
    scope = STAGES[name].scope
    return name, next(p for p in places_of(toy.study, scope) if str(p) == place)


def test_a_table_has_a_row_per_asset_however_many_ranges_there_are(twice: Toy) -> None:
    walk = lineage_of(twice.store, twice.head("score_detection", twice.study.cells[0]))
    caches = list(walk.made_from["activation_cache"]) * 500
    long = {"explainers": {f"{i:0100}": {"version": "1" * 100} for i in range(200)}}
    texts = [m.model_copy(update={"parameters": long}) for m in walk.made_from["explanations"]]
    many = {**walk.made_from, "activation_cache": caches, "explanations": texts}
    table = lineage_rows(replace(walk, made_from=many))
    assert len(table) == len(lineage_rows(walk))
    assert len(str(table)) < 8_000


def test_a_run_goes_on_where_the_walk_is_broken(toy: Toy) -> None:
    toy.changes = dict(SCORERS)
    stages = [stage.name for stage in stages_of(toy.study) if stage.scope == "cell"]
    toy.run("token_dataset", *stages[: stages.index("score_detection")])
    cell = toy.study.cells[0]
    (toy.root / str(toy.head("activation_cache", cell).path)).unlink()
    toy.run("score_detection")
    shown = toy.event("score_detection", cell).metadata["lineage"].value
    assert str(shown).startswith("cannot be read: ")
    assert "missing" in str(shown)
    others = [other for other in toy.study.cells if other != cell]
    for other in others:
        assert len(records(toy.event("score_detection", other).metadata["lineage"])) > 5


def test_manifests_are_read_once_for_all_cells_of_a_stage(
    twice: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads_of = {cell: twice.head("score_detection", cell) for cell in twice.study.cells}
    done = {cell: (head, {}) for cell, head in heads_of.items()}
    walks = [lineage_of(twice.store, head) for head in heads_of.values()]
    known = [manifest for walk in walks for manifest in walk.made_from["explanations"]]
    paths: list[str] = []
    read = heads.read_files

    def counted(root: UPath, some: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        paths.extend(some)
        return read(root, some)

    monkeypatch.setattr(heads, "read_files", counted)
    shown = with_lineage(twice.store, STAGES["score_detection"], done, known)
    assert all("lineage" in more for _, more in shown.values())
    assert len(paths) == len(set(paths))
    assert {path.split("/")[0] for path in paths} == {
        "latent_records", "neighbours", "activation_cache", "token_dataset",
    }  # fmt: skip
