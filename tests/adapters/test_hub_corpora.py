"""A dataset of the hub: which files it means, what is fetched of them, and what can go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autointerp_dagster.adapters.corpora import Corpus, open_corpus
from autointerp_dagster.adapters.corpora import hub as hub_module
from autointerp_dagster.adapters.corpora import texts as texts_module
from autointerp_dagster.core.config import HubCorpusConfig, TokenConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset

REPO = "me/texts"


class Dataset:
    """A dataset being written, and the hub it is pushed to."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder = folder
        self.hub = hub

    def parquet(self, path: str, texts: list[str], **options: Any) -> "Dataset":
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {"id": list(range(len(texts))), "text": texts, "url": ["x" * 50] * len(texts)}
        )
        pq.write_table(table, self.folder / path, **options)
        return self

    def text(self, path: str, content: str) -> "Dataset":
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(content)
        return self

    def card(self, **head: Any) -> "Dataset":
        return self.text("README.md", f"---\n{json.dumps(head)}\n---\nAbout.")

    def push(self, revision: str = "main", gated: bool = False) -> str:
        return self.hub.add(REPO, self.folder, kind="datasets", revision=revision, gated=gated)


@pytest.fixture
def dataset(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(hub_module, "BLOCK_BYTES", 1 << 16)  # so that small files are large
    monkeypatch.setattr(texts_module, "BUFFER_BYTES", 1 << 14)
    return Dataset(tmp_path / "dataset", hub)


def corpus_of(**config: Any) -> Corpus:
    return open_corpus(HubCorpusConfig(kind="hub", repo=REPO, **config))


def texts_of(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents() if isinstance(document, Document)]


def complaint(corpus: Corpus) -> str:
    with pytest.raises(CorpusError) as raised:
        list(corpus.documents())
    return str(raised.value)


# Which files


def test_shards_come_in_the_order_of_their_names(dataset: Dataset) -> None:
    for shard in (2, 0, 1):
        dataset.parquet(f"data/train-0000{shard}-of-00003.parquet", [f"a{shard}", f"b{shard}"])
    dataset.parquet("data/test-00000-of-00001.parquet", ["no"]).push()
    documents = list(corpus_of().documents())
    assert [d.doc_id for d in documents][:3] == [
        "data/train-00000-of-00003.parquet:0",
        "data/train-00000-of-00003.parquet:1",
        "data/train-00001-of-00003.parquet:0",
    ]
    assert texts_of(corpus_of()) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert texts_of(corpus_of(split="test")) == ["no"]


def test_the_card_says_which_files_a_configuration_and_a_split_are(dataset: Dataset) -> None:
    dataset.card(
        configs=[
            {"config_name": "en", "data_files": [
                {"split": "train", "path": ["en/b.parquet", "en/a*"]},
                {"split": "held_out", "path": "en/c.parquet"},
            ]},
            {"config_name": "de", "data_files": "de/*.parquet", "default": True},
            {"config_name": "fr", "data_dir": "fr"},
        ]
    )  # fmt: skip
    for path in ("en/a1", "en/a0", "en/b", "en/c", "de/x", "fr/train", "fr/test"):
        dataset.parquet(f"{path}.parquet", [path])
    dataset.push()
    assert texts_of(corpus_of(name="en")) == ["en/b", "en/a0", "en/a1"]
    assert texts_of(corpus_of(name="en", split="held_out")) == ["en/c"]
    assert texts_of(corpus_of()) == ["de/x"]
    assert texts_of(corpus_of(name="fr")) == ["fr/train"]
    assert texts_of(corpus_of(name="fr", split="test")) == ["fr/test"]


def test_the_hubs_own_parquet_branch_is_read_by_folders(dataset: Dataset) -> None:
    dataset.parquet("en/train/0000.parquet", ["a"]).parquet("en/train/0001.parquet", ["b"])
    dataset.parquet("en/test/0000.parquet", ["c"]).parquet("de/partial-train/0000.parquet", ["d"])
    dataset.push(revision="refs/convert/parquet")
    branch = "refs/convert/parquet"
    assert texts_of(corpus_of(revision=branch, name="en")) == ["a", "b"]
    assert texts_of(corpus_of(revision=branch, name="en", split="test")) == ["c"]
    assert texts_of(corpus_of(revision=branch, name="de")) == ["d"]
    assert "folders de, en, which may be configurations" in complaint(corpus_of(revision=branch))


def test_patterns_name_files_whatever_the_card_says(dataset: Dataset) -> None:
    dataset.card(configs=[{"config_name": "all", "data_files": "x/*"}])
    for path in ("x/1/a", "x/1/deep/b", "x/2/c", "y/d"):
        dataset.parquet(f"{path}.parquet", [path])
    dataset.push()
    assert texts_of(corpus_of(files=["y/*.parquet", "x/1/*.parquet"])) == ["y/d", "x/1/a"]
    assert texts_of(corpus_of(files=["x/1/**/*.parquet"])) == ["x/1/a", "x/1/deep/b"]
    assert texts_of(corpus_of(files=["x/?/[ac].parquet"])) == ["x/1/a", "x/2/c"]
    assert texts_of(corpus_of(files=["./y/d.parquet"])) == ["y/d"]


def test_files_whose_names_tell_no_split_are_the_training_split(dataset: Dataset) -> None:
    dataset.parquet("b.parquet", ["b"]).parquet("a.parquet", ["a"]).parquet("_c.parquet", ["c"])
    dataset.card(license="mit").push()
    assert texts_of(corpus_of()) == ["a", "b"]
    assert "splits train, wanted 'test'. Set corpus.split" in complaint(corpus_of(split="test"))


def test_a_split_goes_by_any_of_its_names(dataset: Dataset) -> None:
    dataset.parquet("x/dev.parquet", ["v"]).parquet("x/train.parquet", ["t"])
    dataset.parquet("x/wiki-00000-of-00001.parquet", ["w"]).push()
    assert texts_of(corpus_of(split="validation")) == ["v"]
    assert texts_of(corpus_of(split="val")) == ["v"]
    assert texts_of(corpus_of(split="wiki")) == ["w"]
    assert texts_of(corpus_of()) == ["t"]


def test_lines_of_json_are_streamed_too(dataset: Dataset) -> None:
    lines = "".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(1000)).encode()
    (dataset.folder / "en").mkdir(parents=True)
    with pa.CompressedOutputStream(
        pa.OSFile(str(dataset.folder / "en/train.00000.json.gz"), "wb"), "gzip"
    ) as file:
        file.write(lines)
    dataset.push()
    corpus = corpus_of(files=["en/train.*.json.gz"], column="body")
    assert texts_of(corpus) == [f"text {i}" for i in range(1000)]


def test_a_folder_is_listed_page_by_page_and_no_other_is(dataset: Dataset) -> None:
    for i in range(7):
        dataset.parquet(f"sample/10BT/{i}.parquet", [str(i)]).parquet(f"data/{i}.parquet", ["no"])
    dataset.push()
    dataset.hub.page_len = 3
    assert texts_of(corpus_of(files=["sample/10BT/*.parquet"])) == [str(i) for i in range(7)]
    listings = [asked.path for asked in dataset.hub.asked if "/tree/" in asked.path]
    assert listings
    assert all("sample%2F10BT" in path or "sample/10BT" in path for path in listings)
    assert not any("recursive=true" in path.lower() for path in listings)


# What is fetched


def big(dataset: Dataset, n_shards: int = 4) -> list[str]:
    """Shards of many blocks, in row groups; returns all texts."""
    rng = np.random.default_rng(0)
    texts = []
    for shard in range(n_shards):
        mine = [rng.bytes(1000).hex() for _ in range(300)]
        dataset.parquet(
            f"data/train-0000{shard}-of-0000{n_shards}.parquet", mine,
            row_group_size=100, compression="none", use_dictionary=False,
        )  # fmt: skip
        texts += mine
    dataset.push()
    return texts


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def dataset_of(corpus: Corpus, n_tokens: int) -> TokenDataset:
    return build_token_dataset(corpus.documents(), encode, 0, TokenConfig(n_tokens=n_tokens))


def test_streaming_fetches_the_beginning_of_the_first_shard_only(dataset: Dataset) -> None:
    big(dataset)
    size = sum(file.stat().st_size for file in dataset.folder.rglob("*.parquet"))
    before = dataset.hub.n_bytes
    found = dataset_of(corpus_of(), n_tokens=20_000)  # of 2.4 million
    assert found.tokens.size > 20_000
    assert {path for path in dataset.hub.downloads if path.endswith("parquet")} == {
        "data/train-00000-of-00004.parquet"
    }
    assert dataset.hub.n_bytes - before < 0.6 * size / 4  # 64 documents and some blocks
    assert not list((dataset.folder.parent / "hf_home").rglob("*.parquet"))


def test_without_streaming_the_shards_that_are_needed_are_kept(dataset: Dataset) -> None:
    texts = big(dataset, n_shards=3)
    needed = sum(map(len, texts[:310]))  # of 300 in the first shard
    found = dataset_of(corpus_of(streaming=False), needed)
    kept = sorted(path.name for path in (dataset.folder.parent / "hf_home").rglob("*.parquet"))
    assert kept == ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet"]
    n_downloads = len(dataset.hub.downloads)
    again = dataset_of(corpus_of(streaming=False), needed)
    assert len(dataset.hub.downloads) == n_downloads
    assert np.array_equal(found.tokens, again.tokens)


def test_streaming_or_not_the_corpus_is_the_same(dataset: Dataset) -> None:
    texts = big(dataset, n_shards=2)
    streamed, kept = corpus_of(streaming=True), corpus_of(streaming=False)
    assert texts_of(streamed) == texts_of(kept) == texts
    assert streamed.identity() == kept.identity()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(n_tokens=st.integers(1, 400), more=st.integers(1, 400), streaming=st.booleans())
def test_more_tokens_only_append_to_a_hub_corpus(
    dataset: Dataset, n_tokens: int, more: int, streaming: bool
) -> None:
    if not dataset.folder.exists():
        for shard in range(3):
            texts = ["word " * (7 * n + shard) for n in range(5)]
            dataset.parquet(f"data/train-0000{shard}-of-00003.parquet", texts)
        dataset.push()
    config = TokenConfig(context_len=16, min_visible=4)
    small, large = (
        build_token_dataset(
            corpus_of(streaming=streaming).documents(), encode, 0,
            config.model_copy(update={"n_tokens": n}),
        )
        for n in (n_tokens, n_tokens + more)
    )  # fmt: skip
    assert np.array_equal(large.tokens[: small.tokens.size], small.tokens)
    assert large.contexts.head(small.contexts.height).equals(small.contexts)


# Identity


def test_the_identity_is_the_commit_and_the_files_and_reads_none(dataset: Dataset) -> None:
    dataset.parquet("train.parquet", ["a"]).parquet("test.parquet", ["b"])
    first = dataset.push()
    corpus = corpus_of()
    before = corpus.identity()
    assert not [path for path in dataset.hub.downloads if path.endswith("parquet")]
    assert before == corpus_of(revision=first).identity() == corpus_of(split="train").identity()
    assert before != corpus_of(split="test").identity()
    assert before != corpus_of(column="url").identity()
    dataset.parquet("train.parquet", ["c"])
    second = dataset.push()
    assert before == corpus.identity()  # one commit for all that a run does
    assert before != corpus_of().identity() == corpus_of(revision=second).identity()
    assert texts_of(corpus_of(revision=first)) == ["a"]


def test_what_is_known_of_a_commit_is_not_asked_for_again(dataset: Dataset) -> None:
    commit = dataset.parquet("train.parquet", ["a"]).push()
    identity = corpus_of(revision=commit).identity()
    n_asked = len(dataset.hub.asked)
    assert corpus_of(revision=commit).identity() == identity
    assert len(dataset.hub.asked) == n_asked


def test_without_a_network_the_identity_is_still_known(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.parquet("train.parquet", ["a"]).push()
    identity = corpus_of().identity()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = corpus_of()
    assert offline.identity() == identity
    offline.check()
    assert "not in the hub's cache, and the hub is switched off" in complaint(offline)


def test_what_was_downloaded_is_read_without_a_network(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.parquet("train.parquet", ["a"]).push()
    assert texts_of(corpus_of(streaming=False)) == ["a"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert texts_of(corpus_of(streaming=False)) == ["a"]


def test_it_says_where_the_text_is_from(dataset: Dataset) -> None:
    commit = dataset.parquet("data/train.parquet", ["a"]).push(revision="v1")
    about = corpus_of(revision="v1").about()
    size = (dataset.folder / "data/train.parquet").stat().st_size
    assert about == {
        "dataset": REPO, "commit": commit, "revision": "v1", "split": "train", "n_files": 1,
        "n_bytes": size, "column": "text",
    }  # fmt: skip


# What can go wrong


def test_a_missing_dataset_revision_configuration_or_split_is_named(dataset: Dataset) -> None:
    missing = open_corpus(HubCorpusConfig(kind="hub", repo="me/nothing"))
    assert "corpus me/nothing: the hub has no such dataset, or it is private" in complaint(missing)
    dataset.card(
        configs=[
            {"config_name": "en", "data_files": [{"split": "train", "path": "a.parquet"}]},
            {"config_name": "de", "data_files": "b.parquet"},
        ]
    )
    dataset.parquet("a.parquet", ["a"]).parquet("b.parquet", ["b"])
    commit = dataset.push()
    no_revision = complaint(corpus_of(revision="v9"))
    assert (
        f"corpus {REPO}: the dataset has no revision 'v9'. Correct corpus.revision" in no_revision
    )
    no_config = complaint(corpus_of(name="fr"))
    assert no_config.startswith(f"corpus {REPO} at commit {commit}: ")
    assert "configurations en, de, wanted 'fr'. Set corpus.name" in no_config
    assert "configurations en, de, none is the default" in complaint(corpus_of())
    no_split = complaint(corpus_of(name="en", split="test"))
    assert "splits train, wanted 'test'. Set corpus.split" in no_split


def test_a_missing_column_names_those_there_are(dataset: Dataset) -> None:
    commit = dataset.parquet("train.parquet", ["a"]).push()
    message = complaint(corpus_of(column="content"))
    assert message == (
        f"hf://datasets/{REPO}@{commit[:8]}/train.parquet: columns ['id', 'text', 'url'], wanted "
        "'content'. Set corpus.column."
    )
    with pytest.raises(CorpusError, match=r"Set corpus\.column"):
        corpus_of(column="content").check()


def test_a_gated_dataset_says_how_to_get_in(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.parquet("train.parquet", ["a"]).push(gated=True)
    for streaming in (True, False):
        message = complaint(corpus_of(streaming=streaming))
        assert "gated, and this user may not read it. Ask for access on its page" in message
        assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", dataset.hub.token)
    assert texts_of(corpus_of()) == texts_of(corpus_of(streaming=False)) == ["a"]
    assert {a.token for a in dataset.hub.asked if "/large/" in a.path} == {None}


def test_no_network_is_said_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = complaint(corpus_of())
    assert f"corpus {REPO}: not in the hub's cache, and the hub is switched off" in message
    assert "Unset HF_HUB_OFFLINE" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached (ConnectError" in complaint(corpus_of())


def test_a_hub_that_fails_while_a_file_is_read_names_the_file(dataset: Dataset) -> None:
    big(dataset, n_shards=1)
    documents = corpus_of().documents()
    next(documents)
    dataset.hub.failing = 404
    with pytest.raises(CorpusError, match=r"hf://datasets/me/texts@.*: the hub does not give"):
        list(documents)


def test_a_damaged_file_is_named(dataset: Dataset) -> None:
    dataset.text("train.parquet", "no parquet").push()
    message = complaint(corpus_of())
    assert "train.parquet: cannot be read as a Parquet file" in message


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ({"train.csv": "a,b"}, {}, "no files that can be read"),
        ({"train.csv": "a,b"}, {"files": ["*.csv"]}, r"train\.csv cannot be read, wanted"),
        ({"a.txt": "a"}, {"files": ["b/*"]}, r"no file matches b/\*"),
        ({"train.txt": "a", "train.jsonl": "{}"}, {}, r"several formats \(\.jsonl, \.txt\)"),
        ({"en/a.txt": "a"}, {"name": "de"}, r"folders en, wanted 'de'. Set corpus\.name"),
        ({"en/a.csv": "a"}, {"name": "en"}, "no files that can be read"),
        ({"README.md": "---\n[1\n---\n", "a.txt": "a"}, {}, "the card's YAML cannot be read"),
        ({"README.md": "---\n- a\n---\n", "a.txt": "a"}, {}, r"cannot be read \(ValueError: repo"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_meant_are_named(
    dataset: Dataset, files: dict[str, str], config: dict[str, Any], message: str
) -> None:
    for path, content in files.items():
        dataset.text(path, content)
    dataset.push()
    with pytest.raises(CorpusError, match=message):
        list(corpus_of(**config).documents())


def test_a_process_of_its_own_reads_it(dataset: Dataset) -> None:
    dataset.parquet("train.parquet", ["a", "b"]).push()
    code = (
        "from autointerp_dagster.adapters.corpora import open_corpus\n"
        "from autointerp_dagster.core.config import HubCorpusConfig\n"
        f"corpus = open_corpus(HubCorpusConfig(kind='hub', repo={REPO!r}))\n"
        "print([document.text for document in corpus.documents()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=100
    )
    assert done.stdout == "['a', 'b']\n", done.stderr
