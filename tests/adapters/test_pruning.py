"""Pruning takes what nothing needs, and nothing else, whatever happens meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.manifests import (
    Manifest,
    Part,
    Provenance,
    Upstream,
    content_hash_of,
    fingerprint_of,
)
from autointerp_dagster.adapters.pruning.deleting import clock_of, prune
from autointerp_dagster.adapters.pruning.survey import DAY_S, Doomed, Survey
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.verifying import verify
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.types import silent

CELL = "sae@h.0/0000000-0000003"
STAGES = ("activation_cache", "latent_records", "explanations", "score_detection")


def rows(n: int) -> pl.DataFrame:
    """A table that differs for every ``n``."""
    frame = {"latent": [n], "context": [1], "position": [1], "activation": [0.5]}
    return ACTIVATIONS.conform(pl.DataFrame(frame))


def commit(
    store: Store, stage: str, n: int, above: Iterable[Manifest] = (), coder: str = "c0de"
) -> Manifest:
    """A manifest of its own for every ``n``; reads and writes as a stage does."""
    upstream = (
        *(Upstream(asset=m.stage, cell=m.cell, content_hash=m.content_hash, manifest=m.path)
          for m in above),
        *([Upstream(asset="sparse_coders", cell="sae@h.0", content_hash=coder)]
          if stage == STAGES[0] else []),
    )  # fmt: skip
    blobs = (store.put_table(ACTIVATIONS, rows(n)),)
    return store.commit(
        Manifest(
            stage=stage, stage_version="1", cell=CELL, complete=True, parameters={"n": n},
            input_fingerprint=fingerprint_of(stage, "1", CELL, {"n": n}, upstream),
            content_hash=content_hash_of(blobs, "ok"), upstream=upstream, blobs=blobs,
            provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0),
        )
    )  # fmt: skip


def put_part(store: Store, n: int) -> Part:
    part = Part(name="default", fingerprint=f"{n:032x}", blob=store.put_table(ACTIVATIONS, rows(n)))
    store.put_part("score_detection", part)
    return part


def write(store: Store, path: str) -> str:
    (store.root / path).parent.mkdir(parents=True, exist_ok=True)
    (store.root / path).write_bytes(b"something")
    return path


def make_old(store: Store, path: str, days: float) -> None:
    file = store.root / path
    if store.root.protocol == "memory":
        file.fs.store[file.path].modified = datetime.now(UTC) - timedelta(days=days)
        file.fs.store[file.path].created = file.fs.store[file.path].modified
    else:
        when = time.time() - days * DAY_S
        os.utime(file.path, (when, when))


def make_all_old(store: Store, days: float) -> None:
    for path in list_files(store.root, ""):
        make_old(store, path, days)


def files_of(store: Store) -> set[str]:
    return set(list_files(store.root, ""))


def pruned(store: Store, **options: float) -> set[str]:
    """The paths that a pruning deletes, which must be those that it said."""
    survey = Survey(store, **options)
    found, before = survey.look(), files_of(store)
    assert files_of(store) == before  # a look touches nothing
    removed = {doomed.path for doomed in prune(survey, found)}
    assert removed == set(found.doomed) == before - files_of(store)
    return removed


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path: Path) -> Store:
    return Store(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@dataclass
class World:
    """A random store, and what an oracle says must stay."""

    store: Store = field(default_factory=lambda: Store(f"memory://{uuid.uuid4().hex}"))
    manifests: list[Manifest] = field(default_factory=list)
    heads: dict[str, Manifest] = field(default_factory=dict)
    """By study."""


ages = st.sampled_from([0.5, 2.0, 29.0, 31.0, 400.0])


def drawn_world(draw: st.DrawFn) -> World:
    world = World()
    for number in range(draw(st.integers(1, 8))):
        stage = draw(st.integers(0, len(STAGES) - 1))
        below = [m for m in world.manifests if STAGES.index(m.stage) < stage]
        above = draw(st.lists(st.sampled_from(below), max_size=3)) if below else []
        content = draw(st.integers(0, 5))
        manifest = commit(world.store, STAGES[stage], 10 * number + content, above)
        world.manifests.append(manifest)
        if draw(st.booleans()):
            study = draw(st.sampled_from(["s", "t"]))
            world.store.set_head(study, manifest.stage, CELL, manifest)
            world.heads[f"{study}/{manifest.stage}"] = manifest
    for number in draw(st.lists(st.integers(0, 90), max_size=3)):
        put_part(world.store, number)
    for name in draw(st.lists(st.sampled_from("abc"), max_size=2)):
        write(world.store, f"blobs/{name}{name}/{name}.parquet")
        write(world.store, f"heads/s/score_fuzzing/sae@h.0/.{name}.tmp")
    for path in sorted(files_of(world.store)):
        make_old(world.store, path, draw(ages))
    return world


def needed(world: World) -> set[str]:
    """What must stay, by the rules as they are written in the documents, in the plainest way."""
    age = {path: time.time() - f.written for path, f in list_files(world.store.root, "").items()}
    by_path = {str(m.path): m for m in world.manifests}
    stay = {path for path in age if age[path] < DAY_S}
    stay |= {path for path in age if path.startswith("heads/") and not path.endswith(".tmp")}
    todo = [m for m in world.manifests if age[str(m.path)] < 30 * DAY_S] + [*world.heads.values()]
    named = {path for path in age if path.startswith("parts/") and age[path] < 30 * DAY_S}
    while todo:
        manifest = todo.pop()
        named |= {str(manifest.path), *(blob.path for blob in manifest.blobs)}
        todo += [by_path[str(up.manifest)] for up in manifest.upstream if up.manifest]
    for path in [path for path in age if path.startswith("parts/")]:
        blob = Part.from_json((world.store.root / path).read_bytes()).blob.path
        if path in named:
            named.add(blob)
        elif blob in named:
            named.add(path)
    return (stay | named) & age.keys()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_needed_stays_and_everything_else_goes(data: st.DataObject) -> None:
    world = drawn_world(data.draw)
    before, stay = files_of(world.store), needed(world)
    # A piece whose table a kept piece shares may stay or go; nobody else may.
    removed = pruned(world.store)
    assert removed.isdisjoint(stay)
    assert {path for path in before - stay - removed if not path.startswith("parts/")} == set()
    for study in ("s", "t"):
        assert verify(world.store, study).faults == []
    for place, manifest in world.heads.items():
        study, stage = place.split("/")
        head = world.store.head(study, stage, CELL)
        assert head is not None
        assert head.path == manifest.path
        assert world.store.table(head.blobs[0]).height == 1
    assert pruned(world.store) == set()


def test_a_superseded_manifest_is_kept_for_30_days_after_its_head_left_it(store: Store) -> None:
    old, new = commit(store, STAGES[0], 1), commit(store, STAGES[0], 2)
    store.set_head("s", STAGES[0], CELL, old)
    make_all_old(store, 400)
    store.set_head("s", STAGES[0], CELL, new)
    assert pruned(store) == set()  # written long ago, superseded now
    make_all_old(store, 29)
    assert pruned(store) == set()
    make_all_old(store, 31)
    assert pruned(store) == {old.path, old.blobs[0].path}
    assert pruned(store, superseded_s=2 * DAY_S) == set()


def test_superseded_manifests_go_earlier_where_that_is_asked(store: Store) -> None:
    old, new = commit(store, STAGES[0], 1), commit(store, STAGES[0], 2)
    store.set_head("s", STAGES[0], CELL, old)
    store.set_head("s", STAGES[0], CELL, new)
    make_all_old(store, 3)
    assert pruned(store) == set()
    assert pruned(store, superseded_s=2 * DAY_S) == {old.path, old.blobs[0].path}


def test_nothing_young_goes_however_short_superseded_ones_are_kept(store: Store) -> None:
    commit(store, STAGES[0], 1)
    store.put_table(ACTIVATIONS, rows(2))
    write(store, "blobs/.autointerp-1.tmp")
    assert pruned(store, superseded_s=0.0) == set()


def test_answers_stay_as_long_as_anything_kept_is_about_their_coder(store: Store) -> None:
    kept = commit(store, STAGES[0], 1, coder="aa")
    store.set_head("s", STAGES[0], CELL, kept)
    commit(store, STAGES[0], 2, coder="bb")
    names = [f"journal/{stage}/{coder}/0/1.parquet" for stage, coder in [
        ("explanations", "aa"), ("explanations", "bb"), ("score_fuzzing", "bb"),
        ("explanations", "cc"), ("judge_calibration", "judge_pack_1"), ("probe", ""),
    ]]  # fmt: skip
    for path in [*names, "journal-templates/1.json", "journal-wal/1.jsonl", "journal-wal/1.odd",
                 "batches/1.parquet", "spend/s/run/1.json"]:  # fmt: skip
        write(store, path)
    make_all_old(store, 40)
    make_old(store, names[3], 5)
    gone = {path for path in pruned(store) if "/" in path and not path.startswith("blobs")}
    assert {path for path in gone if path.startswith(("journal", "spend", "batch"))} == {
        names[1], names[2],
    }  # fmt: skip


def test_layers_that_were_found_stay(store: Store) -> None:
    make_old(store, write(store, "discovery/abc/layers/sae@h.1.json"), 400)
    assert pruned(store) == set()


def test_a_new_answer_keeps_all_answers_about_its_coder(store: Store) -> None:
    for path in ("journal/explanations/bb/0/1.parquet", "journal/score_fuzzing/bb/7/2.parquet"):
        make_old(store, write(store, path), 40)
    make_old(store, write(store, "journal/explanations/bb/3/3.parquet"), 1)
    assert pruned(store) == set()


def test_what_killed_processes_left_goes_after_a_day(store: Store) -> None:
    left = [
        "blobs/.autointerp-0a.tmp", "heads/s/a/.c.1.tmp", "journal/explanations/a/0/.1.tmp",
        "journal-wal/.1.jsonl.new", "spend/s/run/.1.json.2.tmp", "parts/a/.1.json.2.tmp",
    ]  # fmt: skip
    for path in left:
        make_old(store, write(store, path), 1.5)
    for path in ("blobs/.autointerp-0b.tmp", "journal-wal/.2.jsonl.new"):
        make_old(store, write(store, path), 0.5)
    assert pruned(store) == set(left)


def test_a_store_of_which_something_cannot_be_read_is_left_alone(store: Store) -> None:
    head = commit(store, STAGES[0], 1)
    store.set_head("s", STAGES[0], CELL, head)
    store.put_table(ACTIVATIONS, rows(7))
    (store.root / str(head.path)).write_bytes(b"{}")
    make_all_old(store, 40)
    with pytest.raises(StoreError, match="nothing is deleted"):
        Survey(store).look()
    (store.root / f"heads/s/{STAGES[0]}/{CELL}").write_bytes(b"\0 no path")
    with pytest.raises(StoreError, match="nothing is deleted"):
        Survey(store).look()


def test_a_manifest_that_is_lost_is_told_and_stops_nothing(store: Store) -> None:
    lost = commit(store, STAGES[0], 1)
    store.set_head("s", STAGES[0], CELL, lost)
    (store.root / str(lost.path)).unlink()
    make_all_old(store, 40)
    assert Survey(store).look().lost == (lost.path,)
    assert pruned(store) == {lost.blobs[0].path}


def acting(action: Callable[[], object], after: int = 0) -> Callable[..., Iterator[object]]:
    """A ``Progress`` that does something once so many items have gone by."""

    def progress(items: Iterable[object], **_: object) -> Iterator[object]:
        for number, item in enumerate(items):
            yield item
            if number == after:
                action()

    return progress


def garbage(store: Store) -> list[Manifest]:
    """A chain of manifests that nothing needs, the last made from the others."""
    chain: list[Manifest] = []
    for number, stage in enumerate(STAGES):
        chain.append(commit(store, stage, number, chain))
    return chain


@pytest.mark.parametrize("taken", range(4))
@pytest.mark.parametrize("after", [-1, 0, 1, 2, 3])
def test_what_a_run_takes_up_while_others_go_is_whole(store: Store, taken: int, after: int) -> None:
    """A run links a manifest after so many of those that may go are gone, or finds it gone."""
    chain = garbage(store)
    make_all_old(store, 40)
    survey = Survey(store)
    found = survey.look()
    links: list[bool] = []

    def link() -> None:
        links.append(store.link("s", STAGES[taken], CELL, chain[taken]))

    if after < 0:
        link()
    prune(survey, found, acting(link, after))
    # Those made from others go first, so the last of the chain is the first to go.
    assert links == [taken < len(chain) - 1 - after]
    assert verify(store, "s").faults == []
    assert verify(store, "s").n_manifests == (taken + 1 if links[0] else 0)


def test_a_run_that_writes_what_is_about_to_go_keeps_it(store: Store) -> None:
    old = [store.put_table(ACTIVATIONS, rows(n)) for n in range(3)]
    part = put_part(store, 9)
    unused = commit(store, STAGES[1], 4)
    make_all_old(store, 40)
    survey = Survey(store)
    found = survey.look()
    assert len(found.doomed) == 7

    def run() -> None:
        manifest = commit(store, STAGES[0], 0)
        assert manifest.blobs == (old[0],)
        store.set_head("s", STAGES[0], CELL, manifest)
        assert store.take_part("score_detection", part.fingerprint) == part

    removed = {doomed.path for doomed in prune(survey, found, acting(run))}
    assert removed == {unused.path, unused.blobs[0].path, old[1].path, old[2].path}
    assert verify(store, "s").faults == []
    assert store.table(part.blob).height == 1


@pytest.mark.parametrize("after", range(8))
def test_stopped_anywhere_it_leaves_a_whole_store_and_goes_on(store: Store, after: int) -> None:
    head = commit(store, STAGES[0], 77)
    store.set_head("s", STAGES[0], CELL, head)
    garbage(store)
    make_all_old(store, 40)
    survey = Survey(store)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(survey, survey.look(), acting(stop, after))
    left = [p for p in files_of(store) if p.endswith(".json")]
    for path in left:  # whoever links one of these finds all that it names
        manifest = store.manifest(path)
        named = [up.manifest for up in manifest.upstream if up.manifest]
        assert {*named, *(blob.path for blob in manifest.blobs)} <= files_of(store)
    pruned(store)
    assert files_of(store) == {
        f"heads/s/{STAGES[0]}/{CELL}", str(head.path), head.blobs[0].path,
    }  # fmt: skip


KILLED = """
import sys
from autointerp_dagster.adapters.pruning.deleting import prune
from autointerp_dagster.adapters.pruning.survey import Survey
from autointerp_dagster.adapters.storage import Store
survey = Survey(Store(sys.argv[1]))
found = survey.look()
print("ready", flush=True)
prune(survey, found)
"""


def test_killed_by_the_system_it_leaves_a_whole_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(300):
        kept = commit(store, STAGES[0], 2 * number)
        commit(store, STAGES[0], 2 * number + 1)
        store.set_head("s", STAGES[0], f"sae@h.{number}", kept.model_copy())
    make_all_old(store, 40)
    n_garbage, n_left = 600, []
    for pause in (0.01, 0.03):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert {fault.kind for fault in verify(store, "s").faults} <= {"head"}  # of other places
        n_left.append(len(files_of(store)) - 900)
    assert n_garbage >= n_left[0] >= n_left[1]
    for path in files_of(store):
        if path.rsplit("/", 1)[-1].startswith("."):
            make_old(store, path, 2)
    prune(survey := Survey(store), survey.look())
    assert len(files_of(store)) == 900


def test_beside_a_run_that_takes_up_what_is_going_nothing_is_lost(tmp_path: Path) -> None:
    """Two threads, the same 200 old tables: one commits them again, the other prunes."""
    store = Store(tmp_path)
    for number in range(200):
        store.put_table(ACTIVATIONS, rows(number))
        commit(store, STAGES[1], 1000 + number)
    make_all_old(store, 40)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for number in range(200):
                manifest = commit(store, STAGES[0], number)
                store.set_head(f"s{number}", STAGES[0], CELL, manifest)
        except BaseException as error:  # noqa: BLE001 told by the main thread
            failures.append(error)

    writer = threading.Thread(target=run)
    writer.start()
    removed: list[Doomed] = []
    while writer.is_alive():
        survey = Survey(store)
        removed += prune(survey, survey.look(), silent)
    writer.join()
    assert failures == []
    assert len(removed) >= 200
    for number in range(200):
        assert verify(store, f"s{number}").faults == []


def test_the_store_s_clock_is_asked_without_leaving_anything(store: Store) -> None:
    store.put_table(ACTIVATIONS, rows(1))
    before = files_of(store)
    assert abs(clock_of(store)) < 60
    assert files_of(store) == before


def test_a_store_that_does_not_exist_has_nothing_to_prune(tmp_path: Path) -> None:
    missing = Store(UPath(tmp_path / "missing"))
    assert clock_of(missing) == 0.0
    assert pruned(missing) == set()
    assert not (tmp_path / "missing").exists()
