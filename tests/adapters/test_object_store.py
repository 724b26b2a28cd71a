"""A store on a server that speaks S3: who else writes there is seen, what fails is said plainly."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
from object_store import BUCKET, ObjectStore, forget_connections

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.found_layers import FoundLayers, Look
from autointerp_dagster.adapters.heads import read_heads
from autointerp_dagster.adapters.llm import Entry, Journal, Reply, SpendFile
from autointerp_dagster.adapters.manifests import Manifest, Part, Provenance, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock, LabelList, Message, Request, Usage
from autointerp_dagster.core.schemas import ACTIVATIONS

CELL = "sae@layers.1/0000000-0000003"
PLACE = ("study", "activation_cache", CELL)
BLOCK = JournalBlock("score_detection", "c0ffee", 0)


def rows(n: int = 3) -> pl.DataFrame:
    frame = pl.DataFrame({"latent": range(n), "context": 1, "position": 2, "activation": 0.5})
    return ACTIVATIONS.conform(frame)


def made(store: Store, finished: str = "2026-01-01") -> Manifest:
    """A cell, from blob to head."""
    blobs = (store.put_table(ACTIVATIONS, rows()),)
    manifest = store.commit(
        Manifest(
            stage="activation_cache",
            stage_version="1",
            cell=CELL,
            input_fingerprint="f",
            content_hash=content_hash_of(blobs, "ok"),
            complete=True,
            parameters={},
            upstream=(),
            blobs=blobs,
            provenance=Provenance(
                study="study", run_id="r", started="", finished=finished, seconds=1.0
            ),
        )
    )
    store.put_part("explanations", Part(name="x", fingerprint="abc", blob=blobs[0]))
    store.set_head(*PLACE, manifest)
    return manifest


def looked(store: Store) -> tuple[object, ...]:
    """All that a run, a plan or a person would look at."""
    return (
        store.head(*PLACE),
        store.find("activation_cache", "f"),
        store.find_part("explanations", "abc"),
        read_heads(store, "study").manifests,
        sorted(list_files(store.root, "heads")),
    )


def test_what_somebody_else_writes_is_seen_at_once_however_often_one_looked_before(
    s3: ObjectStore,
) -> None:
    theirs, mine = Store(s3.new_root()), Store(s3.new_root())
    assert looked(mine) == (None, None, None, {}, [])
    one = made(theirs)
    s3.copy(str(theirs.root), str(mine.root))
    assert looked(mine) == looked(theirs) != (None, None, None, {}, [])
    assert mine.head(*PLACE) == one
    two = made(theirs, "2026-01-02")
    s3.copy(str(theirs.root), str(mine.root))
    assert mine.head(*PLACE) == two == mine.find("activation_cache", "f")
    assert looked(mine) == looked(theirs)


def asked(question: str) -> Request:
    return Request(
        messages=(Message("system", "Count."), Message("user", question)),
        answer=LabelList(2),
        unit="unit",
        block=BLOCK,
        n_shared=1,
    )


def test_the_journal_keeps_replies_prompts_and_merges_there(s3: ObjectStore, tmp_path) -> None:
    root = Store(s3.new_root()).root
    reply = Reply("[1, 0]", "stop", usage=Usage(30, 20, 5, 0.001))
    entries = [Entry.of(f"call {n}", "m", asked(f"question {n}"), reply) for n in range(3)]
    with Journal(root, wal_dir=tmp_path / "one") as one, Journal(root, wal_dir=tmp_path) as two:
        assert two.find("call 0") is None
        for entry in entries:
            one.record(BLOCK, entry).result()
            one.flush()
        assert two.lookup(BLOCK, "call 0") == reply
        assert two.find("call 2") == entries[2]
        assert len([p for p in list_files(root, "journal") if p.endswith(".parquet")]) == 3
        one.compact()
        assert len([p for p in list_files(root, "journal") if p.endswith(".parquet")]) == 1
    with Journal(root, wal_dir=tmp_path) as journal:
        assert [journal.lookup(BLOCK, f"call {n}") for n in range(3)] == [reply] * 3
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_a_segment_that_may_not_be_read_now_is_not_called_damaged(s3: ObjectStore, tmp_path):
    root = Store(s3.new_root()).root
    reply = Reply("[1, 0]", "stop", usage=Usage(30, 20, 5, 0.001))
    with Journal(root, wal_dir=tmp_path) as journal:
        journal.record(BLOCK, Entry.of("call", "m", asked("question"), reply)).result()
    (key,) = (path for path in list_files(root, "journal"))
    blocked = [f"arn:aws:s3:::{root.path}/{key}"]
    with s3.denied(BUCKET, {"Action": "s3:GetObject", "Resource": blocked}):
        journal = Journal(root, wal_dir=tmp_path)
        with pytest.raises(StoreError, match=r"cannot be read.*nothing is paid twice"):
            journal.load(BLOCK)
    assert journal.lookup(BLOCK, "call") == reply


def test_spending_and_found_layers_are_kept_there(s3: ObjectStore) -> None:
    root = s3.new_root()
    spent = [SpendFile(Store(root).root, "study", run) for run in ("a", "b")]
    assert spent[1].read_others().study.usd == 0
    for usd in (1.0, 2.0):
        spent[0].write(Usage(usd=usd))
        assert spent[1].read_others().study.usd == usd
    found = FoundLayers(Store(root), "study")
    assert found.looks() == []
    FoundLayers(Store(root), "study").put_look(Look(by="sensor", time="now"))
    assert [look.by for look in found.looks()] == ["sensor"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Changes the environment that stores are opened in."""

    def change(**variables: str | None) -> None:
        for name, value in variables.items():
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        forget_connections()

    yield change
    monkeypatch.undo()
    forget_connections()


USES: dict[str, Callable[[Store], object]] = {
    "a head is read": lambda store: store.head(*PLACE),
    "heads are listed": lambda store: read_heads(store, "study"),
    "a cell is looked for": lambda store: store.find("activation_cache", "f"),
    "a part is looked for": lambda store: store.find_part("explanations", "abc"),
    "a table is written": lambda store: store.put_table(ACTIVATIONS, rows()),
    "frames are written": lambda store: store.put_frames(ACTIVATIONS, [rows()]),
    "layers are read": lambda store: FoundLayers(store, "study").layers(),
    "answers are read": lambda store: Journal(store.root, wal_dir=Path(os.devnull)).load(BLOCK),
    "spending is read": lambda store: SpendFile(store.root, "study", "r").read_others(),
    "spending is written": lambda store: SpendFile(store.root, "study", "r").write(Usage(usd=1.0)),
}


def said(root: str, use: Callable[[Store], object]) -> str:
    with pytest.raises(StoreError) as caught:
        use(Store(root))
    assert "secret" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_bucket_that_is_not_there_is_no_empty_store(s3: ObjectStore, use) -> None:
    assert "no bucket 'nowhere'. Make it, or correct" in said("s3://nowhere/store", use)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_denied_access_is_said(s3: ObjectStore, use) -> None:
    s3.client.create_bucket(Bucket="theirs")
    everything = {"Action": "s3:*", "Resource": ["arn:aws:s3:::theirs", "arn:aws:s3:::theirs/*"]}
    with s3.denied("theirs", everything):
        assert "access denied. Check the credentials and that they may" in said("s3://theirs", use)


@pytest.mark.parametrize("name", ["a head is read", "heads are listed", "a table is written"])
def test_an_endpoint_that_does_not_answer_is_said(s3: ObjectStore, elsewhere, name) -> None:
    elsewhere(AWS_ENDPOINT_URL="http://127.0.0.1:1", AWS_MAX_ATTEMPTS="1")
    text = said(f"s3://{BUCKET}/x", USES[name])
    assert "does not answer. Check the network and the address" in text
    assert "AWS_ENDPOINT_URL" in text


def test_missing_credentials_are_said(s3: ObjectStore, elsewhere) -> None:
    elsewhere(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_EC2_METADATA_DISABLED="true")
    text = said(f"s3://{BUCKET}/x", USES["a head is read"])
    assert "no credentials were found. Set AWS_ACCESS_KEY_ID" in text


@pytest.mark.parametrize(("root", "remedy"), [("gs://bucket", "[gcs]"), ("odd://x", "Use s3://")])
def test_a_url_that_nothing_here_opens_is_said_before_anything_runs(root, remedy) -> None:
    with pytest.raises(StoreError, match="cannot be opened here") as caught:
        Store(root)
    assert remedy in str(caught.value)
