"""Whatever happens to a file that a score rests on is found, and named by place and path."""

import hashlib
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.hashing import table_hash, tensor_file_hash, tensors_hash
from autointerp_dagster.adapters.manifests import (
    Blob,
    Manifest,
    Provenance,
    Upstream,
    content_hash_of,
    fingerprint_of,
)
from autointerp_dagster.adapters.parquet import table_file_hash
from autointerp_dagster.adapters.shards import write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.verifying import Verified, discard, verify
from autointerp_dagster.core.schemas import ACTIVATIONS, TABLES

CODER = "c" * 64
CELL = "sae@h.0/0000000-0000003"
EXTERNAL = Upstream(asset="sparse_coders", cell="sae@h.0", content_hash=CODER)


def activations(n: int) -> pl.DataFrame:
    position = np.arange(n)
    frame = {"latent": position // 9, "context": 1, "position": position % 9, "activation": 0.5}
    return ACTIVATIONS.conform(pl.DataFrame(frame))


def commit(store: Store, stage: str, cell: str, blobs: list[Blob], above: list[Manifest]):
    upstream = (
        *(Upstream(asset=m.stage, cell=m.cell, content_hash=m.content_hash, manifest=m.path)
          for m in above),
        *([EXTERNAL] if stage == "activation_cache" else []),
    )  # fmt: skip
    manifest = Manifest(
        stage=stage, stage_version="1", cell=cell, complete=True, parameters={"k": 1},
        input_fingerprint=fingerprint_of(stage, "1", cell, {"k": 1}, upstream),
        content_hash=content_hash_of(tuple(blobs), "ok"), upstream=upstream, blobs=tuple(blobs),
        provenance=Provenance(
            study="s", run_id=uuid.uuid4().hex, started="", finished="2026", seconds=0
        ),
    )  # fmt: skip
    return store.commit(manifest)


@dataclass
class Small:
    """Tokens, a cache and a score with its journal; and a second study that shares the cache."""

    store: Store
    tokens: Manifest
    cache: Manifest
    score: Manifest
    segment: str


def build(root: UPath) -> Small:
    store = Store(root)
    tensors = store.put_tensors("tokens", {"tokens": np.arange(9, dtype=np.int32)})
    tokens = commit(store, "token_dataset", "all", [tensors], [])
    shard = write_shard(store, [activations(30)], np.array([9, 9, 9, 3]))
    cache = commit(store, "activation_cache", CELL, shard, [tokens])
    table = store.put_table(ACTIVATIONS, activations(3), name="verdicts/default")
    score = commit(store, "score_detection", CELL, [table], [cache, tokens])
    for manifest in (tokens, cache, score):
        store.set_head("s", manifest.stage, manifest.cell, manifest)
    call = b"what was asked and answered"
    name = hashlib.blake2b(call, digest_size=16).hexdigest()
    segment = f"journal/score_detection/{CODER}/0/{name}.parquet"
    for path in (segment, f"journal-templates/{name}.json"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(call)
    return Small(store, tokens, cache, score, segment)


@pytest.fixture(params=["local", "memory"])
def small(request, tmp_path) -> Small:
    root = tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return build(UPath(root))


def files_of(store: Store) -> list[str]:
    return sorted(list_files(store.root, ""))


def named(found: Verified) -> set[str]:
    return {fault.path for fault in found.faults}


def test_an_untouched_store_has_no_fault(small: Small) -> None:
    found = verify(small.store, "s")
    assert found.faults == []
    assert (found.n_manifests, found.n_blobs, found.n_segments) == (3, 4, 2)
    assert found.n_bytes == sum(b.n_bytes for m in found.manifests.values() for b in m.blobs)


@pytest.fixture(scope="module")
def kept() -> Small:
    """Is damaged, looked at and mended again, over and over."""
    return build(UPath(f"memory://{uuid.uuid4().hex}"))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_byte_that_is_changed_is_found_and_its_file_is_named(
    kept: Small, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(files_of(kept.store)))
    file = kept.store.root / path
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content.strip()) - 1))  # a head ends with white space
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(changed)
    found = verify(kept.store, "s")
    file.write_bytes(content)
    if path.startswith("heads/"):
        assert [fault.cell for fault in found.faults] == [path.split("/", 3)[3]]
    else:
        assert path in named(found)


@pytest.mark.parametrize("n", range(12))
def test_any_file_that_is_lost_is_found_unless_nothing_names_it(kept: Small, n: int) -> None:
    path = files_of(kept.store)[n]
    file = kept.store.root / path
    content = file.read_bytes()
    file.unlink()
    found = verify(kept.store, "s")
    file.write_bytes(content)
    assert len(files_of(kept.store)) == 12
    if path.startswith(("heads/", "journal")):
        assert found.faults == []
    else:
        assert [(fault.path, fault.is_there) for fault in found.faults] == [(path, False)]


def test_a_head_that_holds_anything_at_all_is_told(small: Small) -> None:
    head = small.store.root / f"heads/s/score_detection/{CELL}"
    for content in (b"", b"\0\xff", b"../../etc/passwd", b"blobs", b"a" * 5000):
        head.write_bytes(content)
        (fault,) = verify(small.store, "s").faults
        assert (fault.kind, fault.asset, fault.cell) == ("head", "score_detection", CELL)


def test_a_head_that_points_at_another_place_is_found(small: Small) -> None:
    small.store.set_head("s", "score_detection", CELL, small.cache)
    (fault,) = verify(small.store, "s").faults
    assert (fault.kind, fault.asset, fault.cell) == ("head", "score_detection", CELL)
    assert fault.text == f"points at activation_cache {CELL}"


def test_a_fault_names_the_place_that_rests_on_the_file(small: Small) -> None:
    for manifest in (small.cache, small.score):
        (small.store.root / manifest.blobs[0].path).write_bytes(b"short")
    (small.store.root / str(small.tokens.path)).write_bytes(b"{}")
    found = {(f.kind, f.asset, f.cell): f.text for f in verify(small.store, "s").faults}
    assert set(found) == {
        ("blob", "activation_cache", CELL), ("blob", "score_detection", CELL),
        ("manifest", "token_dataset", "all"),
    }  # fmt: skip
    assert "its 5 bytes are not the" in found["blob", "score_detection", CELL]


def test_only_what_the_chosen_heads_rest_on_is_read(small: Small) -> None:
    (small.store.root / small.score.blobs[0].path).unlink()
    found = verify(small.store, "s", {("activation_cache", CELL)})
    assert (found.faults, found.n_manifests) == ([], 2)
    assert verify(small.store, "another").n_manifests == 0


def test_a_content_hash_that_is_not_the_content_s_is_found(small: Small) -> None:
    lying = small.score.blobs[0].model_copy(update={"content_hash": "0" * 32})
    manifest = commit(small.store, "score_detection", CELL, [lying], [small.cache])
    small.store.set_head("s", "score_detection", CELL, manifest)
    (fault,) = verify(small.store, "s").faults
    assert (fault.path, fault.text) == (
        lying.path, "its content hash is not the one of its manifest",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parameters": {"k": 2}}, "its fingerprint is not"),
        ({"content_hash": "0" * 32}, "its content hash is not that of its blobs"),
        ({"upstream": (Upstream(asset="token_dataset", cell="all", content_hash="0" * 32,
                                manifest="PATH"),)}, "names another content of token_dataset all"),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_found(small: Small, change, text: str) -> None:
    for up in change.get("upstream", ()):
        change = {"upstream": (up.model_copy(update={"manifest": small.tokens.path}),)}
    wrong = small.score.model_copy(update=change)
    if "upstream" in change:
        fingerprint = fingerprint_of("score_detection", "1", CELL, {"k": 1}, wrong.upstream)
        wrong = wrong.model_copy(update={"input_fingerprint": fingerprint})
    stored = small.store.commit(wrong)
    small.store.set_head("s", "score_detection", CELL, stored)
    (fault,) = verify(small.store, "s").faults
    assert fault.path == stored.path
    assert text in fault.text


def test_discarding_deletes_what_is_damaged_and_what_rests_on_a_lost_manifest(
    small: Small,
) -> None:
    sister = commit(small.store, "score_detection", CELL, [], [small.cache, small.tokens])
    assert str(sister.path).rsplit("/", 1)[0] == str(small.score.path).rsplit("/", 1)[0]
    before = set(files_of(small.store))
    (small.store.root / str(small.cache.path)).unlink()
    (small.store.root / small.tokens.blobs[0].path).write_bytes(b"damaged")
    removed = discard(small.store, verify(small.store, "s"))
    assert set(removed) == {small.score.path, sister.path, small.tokens.blobs[0].path}
    assert before - set(files_of(small.store)) == {*removed, small.cache.path}


def test_a_damaged_answer_is_reported_and_never_deleted(small: Small) -> None:
    (small.store.root / small.segment).write_bytes(b"other")
    found = verify(small.store, "s")
    assert [(f.kind, f.asset, f.path) for f in found.faults] == [
        ("journal", "score_detection", small.segment)
    ]
    assert discard(small.store, found) == []
    assert (small.store.root / small.segment).exists()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_hash_of_an_empty_table_s_file_is_the_table_s(tmp_path, table) -> None:
    blob = Store(tmp_path).put_table(table, table.empty())
    with (tmp_path / blob.path).open("rb") as file:
        assert table_file_hash(file) == table_hash(table.empty()) == blob.content_hash


@pytest.mark.parametrize("n", [1, 131_072, 300_000])
def test_the_hash_of_a_table_s_file_is_the_table_s(tmp_path, n: int) -> None:
    blob = Store(tmp_path).put_table(ACTIVATIONS, activations(n))
    with (tmp_path / blob.path).open("rb") as file:
        assert table_file_hash(file) == blob.content_hash


arrays = st.dictionaries(
    st.text("abc/", min_size=1, max_size=3),
    st.tuples(
        st.sampled_from(["<f4", "<f2", "<i8", "<i4", "|u1", "<u8", "|b1"]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    min_size=1,
)


@given(arrays)
@settings(deadline=None)
def test_the_hash_of_a_tensor_file_is_the_arrays(described: dict) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    tensors = {name: np.ones(shape, dtype=kind) for name, (kind, shape) in described.items()}
    blob = store.put_tensors("some", tensors)
    with (store.root / blob.path).open("rb") as file:
        assert tensor_file_hash(file) == tensors_hash(tensors)
    first = sorted(tensors)[0]
    with (store.root / blob.path).open("rb") as file:
        assert tensor_file_hash(file, [first]) == tensors_hash({first: tensors[first]})


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_files(tmp_path, traced: None) -> None:
    store = Store(tmp_path)
    blob = store.put_tensors("large", {"large": np.zeros(12_000_000, dtype=np.float32)})
    head = commit(store, "token_dataset", "all", [blob], [])
    store.set_head("s", "token_dataset", "all", head)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    assert verify(store, "s").faults == []
    _, peak = tracemalloc.get_traced_memory()
    assert blob.n_bytes == pytest.approx(48e6, rel=0.01)
    assert peak - before < 20e6
