"""The walk from a score to what it was made from, on manifests written by hand; nothing is run."""

import io

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.adapters.lineage import Made, lineage_of
from autointerp_dagster.adapters.manifests import Manifest, Provenance, Upstream, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli.lineage import LatentWalk, ScoreWalk
from autointerp_dagster.cli.status import _n_rows
from autointerp_dagster.cli.walk import Walk, judged_window
from autointerp_dagster.cli.why import print_walk, verdict_line
from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS, WINDOWS
from autointerp_dagster.core.tokens import TokenDataset

LAYER = "sae@layers.0"
OWN, OTHER = f"{LAYER}/0000010-0000019", f"{LAYER}/0000000-0000009"


def manifest_of(stage, cell, upstream=(), blobs=(), summary=None):
    above = tuple(
        Upstream(asset=m.stage, cell=m.cell, content_hash=m.content_hash, manifest=m.path)
        for m in upstream
    )
    return Manifest(
        stage=stage, stage_version="1", cell=cell, input_fingerprint=json_hash([stage, cell]),
        content_hash=content_hash_of(blobs, "ok"), complete=True, parameters={}, upstream=above,
        blobs=tuple(blobs), summary=summary or {},
        provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0),
    )  # fmt: skip


@pytest.fixture
def walk(tmp_path):
    """A score whose negatives rest on neighbours, and these on both ranges of the layer."""
    store = Store(tmp_path)
    rows = [
        {"latent": 12, "window_id": 65_536 + 8, "negative_kind": "neighbour", "neighbour": 3},
        {"latent": 13, "window_id": 65_536 + 8, "negative_kind": "neighbour", "neighbour": 4},
        {"latent": 12, "window_id": 8, "negative_kind": "random"},
    ]
    filled = [dict.fromkeys(WINDOWS.columns) | row for row in rows]
    windows = pl.DataFrame(filled, schema=dict(WINDOWS.columns))
    blob = store.put_table(WINDOWS, windows)
    caches = [store.commit(manifest_of("activation_cache", cell)) for cell in (OTHER, OWN)]
    neighbours = store.commit(manifest_of("neighbours", OWN, caches))
    records = manifest_of("latent_records", OWN, (neighbours, caches[1]), [blob])
    score = manifest_of("score_detection", OWN, [store.commit(records)])
    return Walk(store, lineage_of(store, store.commit(score)))


def test_a_walk_names_every_range_that_neighbours_were_counted_on(walk):
    lineage = walk.lineage
    made_from, made = tuple(lineage.made), Made.of(lineage.manifest)
    score = ScoreWalk(made, "no verdict", (), made_from, lineage.external, {}, None)
    out = io.StringIO()
    print_walk(None, LatentWalk("s", LAYER, 12, (score,)), Console(file=out, width=200))
    assert "activation_cache: 2 ranges" in out.getvalue()
    assert {m.cell for m in lineage.made_from["activation_cache"]} == {OWN, OTHER}
    assert [made.asset for made in made_from].count("activation_cache") == 2
    assert all(made.manifest in out.getvalue() for made in (score.made, *made_from))


def test_a_walk_names_the_version_of_the_text(tmp_path):
    store = Store(tmp_path)
    about = {"dataset": "me/texts", "commit": "0" * 40, "files": ["[a]*.parquet"]}
    tokens = store.commit(manifest_of("token_dataset", "all", summary={"corpus": about}))
    score = store.commit(manifest_of("score_detection", OWN, [tokens]))
    walk, out = lineage_of(store, score), io.StringIO()
    walked = ScoreWalk(Made.of(score), "no verdict", (), (), walk.external, walk.text, None)
    print_walk(None, LatentWalk("s", LAYER, 12, (walked,)), Console(file=out, width=200))
    assert "text: dataset me/texts" in out.getvalue()
    assert f"text: commit {'0' * 40}" in out.getvalue()
    assert "text: files ['[a]*.parquet']" in out.getvalue()


def test_the_latent_is_read_from_the_cache_of_its_own_range(walk):
    assert walk.lineage.ancestors["activation_cache"].cell == OWN
    assert walk.lineage.made_from["activation_cache"][0].cell == OWN  # the nearest


def test_a_verdict_names_its_kind_of_negative_and_who_fires_there(walk):
    offsets = np.array([0, 12, 24])
    contexts = pl.DataFrame({"context": [0, 1], "document": [0, 0]})
    dataset = TokenDataset(
        np.zeros(24, np.int32),
        offsets,
        CONTEXTS.conform(_filled(CONTEXTS, contexts)),
        DOCUMENTS.conform(_filled(DOCUMENTS, pl.DataFrame({"document": [0], "doc_id": ["d"]}))),
        0,
    )
    verdict = {
        "variant": "all", "prediction": True, "probability": None, "score": None,
        "predicted": None, "status": "ok", "reason": None, "is_activating": False,
        "negative_kind": "neighbour", "window_id": 65_536 + 8,
    }  # fmt: skip
    lines = [
        verdict_line(judged_window(verdict | changed, dataset, walk.neighbours(12), None), "e")
        for changed in (
            {},
            {"negative_kind": "random", "window_id": 8},
            {"is_activating": True, "negative_kind": None},
        )
    ]
    assert "activating False (neighbour: latent 3 fires here), judge said True" in lines[0]
    assert "activating False (random), judge said True" in lines[1]
    assert "activating True, judge said True" in lines[2]


def test_status_counts_windows_where_there_are_vectors_and_no_table(walk):
    vectors = manifest_of("window_embeddings", "all", summary={"n_windows": 70})
    assert _n_rows(vectors) == 70
    assert _n_rows(walk.lineage.ancestors["latent_records"]) == 3
    assert _n_rows(walk.lineage.ancestors["neighbours"]) == 0


def _filled(table, frame):
    missing = {name: pl.lit(None, kind) for name, kind in table.columns.items()}
    missing = {name: empty for name, empty in missing.items() if name not in frame.columns}
    return frame.with_columns(**missing)
