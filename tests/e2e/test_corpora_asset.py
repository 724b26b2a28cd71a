"""A study takes its text from the hub or as tokens, and says which version of it was read."""

import json
import shutil
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from bench import Bench
from hub_server import HubServer

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.subject_models import open_subject_model
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.study.stages import STAGES

REPO = "me/texts"
HUB = {"kind": "hub", "repo": REPO, "path": None}


@pytest.fixture
def files(tmp_path: Path, world: Path, instance: dg.DagsterInstance) -> Bench:
    """On the folder of text."""
    return Bench(tmp_path / "files", world, "http://127.0.0.1:9/v1", instance)


@pytest.fixture
def published(files: Bench, hub: HubServer, tmp_path: Path) -> Path:
    """A folder with the corpus, as it lies on the hub; to be changed and published again."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    shutil.copy(files.world / "corpus" / "texts.jsonl", folder / "train.jsonl")
    hub.add(REPO, folder, kind="datasets")
    return folder


def with_corpus(bench: Bench, folder: Path, **corpus: object) -> Bench:
    return Bench(folder, bench.world, bench.base_url, bench.instance, {"corpus": corpus})


def made(bench: Bench) -> Manifest:
    """The token dataset, of which no model was asked."""
    bench.run(until="token_dataset")
    return bench.heads()["token_dataset", "all"]


def dataset_of(bench: Bench) -> TokenDataset:
    return read_dataset(bench.store, made(bench))


def test_the_same_files_on_the_hub_are_the_same_token_dataset(
    files: Bench, hub: HubServer, tmp_path: Path
) -> None:
    commit = hub.add(REPO, files.world / "corpus", kind="datasets")
    on_hub = with_corpus(files, tmp_path / "hub", **HUB)
    assert made(on_hub).content_hash == made(files).content_hash
    about = made(on_hub).summary["corpus"]
    assert about["dataset"] == REPO
    assert about["commit"] == commit
    assert made(files).summary["corpus"]["n_files"] == 1


def test_a_commit_that_leaves_the_text_alone_makes_nothing_downstream_stale(
    files: Bench, hub: HubServer, published: Path, tmp_path: Path
) -> None:
    bench = with_corpus(files, tmp_path / "hub", **HUB)
    before = made(bench)
    (published / "README.md").write_text("About.")
    commit = hub.add(REPO, published, kind="datasets")
    after = made(bench)
    assert after.summary["corpus"]["commit"] == commit
    assert after.input_fingerprint != before.input_fingerprint
    assert after.content_hash == before.content_hash


def test_the_tokens_are_of_the_commit_that_is_recorded_though_the_branch_has_moved(
    files: Bench, hub: HubServer, published: Path, tmp_path: Path
) -> None:
    study = with_corpus(files, tmp_path / "hub", **HUB).study
    corpus, model = Corpora().of(study), open_subject_model(study.models.subject)
    identity = corpus.identity()
    text = (published / "train.jsonl").read_text()
    (published / "train.jsonl").write_text(text.replace("the", "another"))
    hub.add(REPO, published, kind="datasets")
    found = Corpora().tokens(corpus, model, study.tokens)
    assert np.array_equal(found.tokens, dataset_of(files).tokens)
    assert Corpora().of(study).identity() != identity


def test_what_is_made_needs_no_network(
    files: Bench, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files.world / "corpus", kind="datasets")
    bench = with_corpus(files, tmp_path / "hub", **HUB)
    before = made(bench)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert made(bench) == before


def test_the_corpus_asset_shows_where_the_text_is_from(
    files: Bench, hub: HubServer, tmp_path: Path
) -> None:
    commit = hub.add(REPO, files.world / "corpus", kind="datasets")
    bench = with_corpus(files, tmp_path / "hub", **HUB)
    bench.observe("corpus")
    key = asset_key(bench.study, STAGES["corpus"])
    (record,) = bench.instance.fetch_observations(key, limit=1).records
    assert record.asset_observation is not None
    metadata = record.asset_observation.metadata
    assert metadata["dataset"].value == REPO
    assert metadata["commit"].value == commit
    made(bench)
    assert len(bench.instance.fetch_observations(key, limit=9).records) == 1  # the same version


def test_a_run_says_whose_tokens_these_are_in_the_observation_and_the_manifest(
    files: Bench,
) -> None:
    about = open_subject_model(files.study.models.subject).about()
    assert {"source", "weights_sha256", "dtype"} <= set(about)
    assert made(files).provenance.execution["subject_model"] == about
    key = asset_key(files.study, STAGES["subject_model"])
    (record,) = files.instance.fetch_observations(key, limit=9).records
    assert record.asset_observation is not None
    shown = record.asset_observation.metadata
    assert {name: shown[name].value for name in about} == about
    key = asset_key(files.study, STAGES["corpus"])
    (record,) = files.instance.fetch_observations(key, limit=9).records
    assert record.asset_observation is not None
    assert record.asset_observation.metadata["n_files"].value == 1


def test_tokens_of_the_models_own_tokenizer_give_the_same_contexts(
    files: Bench, tmp_path: Path
) -> None:
    model = open_subject_model(files.study.models.subject)
    lines = (files.world / "corpus" / "texts.jsonl").read_text().splitlines()
    rows = [
        [model.bos_id, *ids] for ids in model.encode([json.loads(line)["text"] for line in lines])
    ]
    width = max(map(len, rows)) + 2
    padded = np.array([row + [-100] * (width - len(row)) for row in rows])
    np.save(tmp_path / "rows.npy", padded)
    tokens = {"kind": "tokens", "path": str(tmp_path / "rows.npy")}
    as_tokens = with_corpus(files, tmp_path / "tokens", **tokens, padding=-100)
    found, expected = dataset_of(as_tokens), dataset_of(files)
    assert np.array_equal(found.tokens, expected.tokens)
    assert found.contexts.equals(expected.contexts)
    with pytest.raises(CorpusError, match=r"token -100 at position .* set corpus\.padding"):
        made(with_corpus(files, tmp_path / "unpadded", **tokens))
