"""Every distinct window is embedded once, whatever stops a run, and however the corpus grows."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer, models
from sentence_transformers.models.tokenizer import WhitespaceTokenizer

from autointerp_dagster.adapters.datasets import write_dataset
from autointerp_dagster.adapters.embedders import SentenceEmbedder
from autointerp_dagster.adapters.manifests import Manifest, Provenance, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.window_vectors import get_vectors, unit_vectors
from autointerp_dagster.core.config import EmbedderConfig, TokenConfig
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import WholeStudy
from autointerp_dagster.resources.embedding_windows import WindowEmbedding
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit
from autointerp_dagster.study import Study

WORDS = [f"w{i}" for i in range(9)]
CONTEXT_LEN, WINDOW_LEN = 13, 4


class Words:
    """Token i is word i; 0 is BOS."""

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [f" {WORDS[token - 1]}" for token in tokens.tolist()]


class KilledError(Exception):
    """As a kill."""


class Run:
    """Runs the stage on a corpus of one store."""

    def __init__(self, folder: Path, embedder: Path) -> None:
        self.store = Store(folder / "store")
        self.config = EmbedderConfig(source=str(embedder), query_prefix="", device="cpu")

    def study(self, max_windows: int | None) -> Study:
        return Study.model_validate(
            {
                "name": "s",
                "models": {
                    "subject": {"source": "none"},
                    "explainer": {"source": "none"},
                    "embedder": self.config.model_dump(),
                },
                "corpus": {"kind": "embedded"},
                "coders": {"sae": {"path": "none"}},
                "layers": ["h.0"],
                "max_num_latents": 10,
                "explainers": {"default": {"kind": "default"}},
                "tokens": {"context_len": 16},
                "sampling": {"window_len": WINDOW_LEN, "negative_kinds": ["similar"]},
                "window_embeddings": {"max_windows": max_windows},
            }
        )

    def __call__(
        self,
        dataset: TokenDataset,
        max_windows: int | None = None,
        dies_after: int | None = None,
        segment_len: int = 8,
    ) -> Commit:
        """One run in a new process, as far as the embedder knows."""
        embedder = SentenceEmbedder(self.config)
        stage = StageInputs.of(
            self.store,
            self.study(max_windows),
            "window_embeddings",
            models={"embedder": embedder.identity},
        )
        blobs = tuple(write_dataset(self.store, dataset))
        manifest = Manifest(
            stage="token_dataset", stage_version="1", cell="all", input_fingerprint="f",
            content_hash=content_hash_of(blobs, "ok"), complete=True, parameters={}, upstream=(),
            blobs=blobs,
            provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0),
        )  # fmt: skip
        stage.take("token_dataset", WholeStudy(), manifest)

        def progress(items: Iterable[Any], **_: Any) -> Iterable[Any]:
            for number, item in enumerate(items):
                if number == dies_after:
                    raise KilledError
                yield item

        work = WindowEmbedding(
            stage, self.study(max_windows), Words(), embedder, progress, segment_len
        )
        commit = work.made()
        self._make_current(stage, commit)
        return commit

    def _make_current(self, stage: StageInputs, commit: Commit) -> None:
        blobs = tuple(commit.blobs)
        manifest = self.store.commit(
            Manifest(
                stage="window_embeddings", stage_version=stage.stage.version, cell="all",
                input_fingerprint="f", content_hash=content_hash_of(blobs, "ok"), complete=True,
                parameters=stage.parameters, upstream=(), blobs=blobs,
                provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0),
            )
        )  # fmt: skip
        self.store.set_head("s", "window_embeddings", "all", manifest)

    def vectors(self, commit: Commit) -> np.ndarray:
        blobs = [blob for blob in commit.blobs if blob.name.startswith("vectors/")]
        assert [blob.name for blob in blobs] == [f"vectors/{i:05d}" for i in range(len(blobs))]
        return np.concatenate([get_vectors(self.store, blob) for blob in blobs])

    def ids(self, commit: Commit) -> np.ndarray:
        return self.store.tensors(commit.blobs[0])["embedded_windows"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts as the mean of their words' vectors; the last word's is zero."""
    folder = tmp_path_factory.mktemp("embedder")
    weights = np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32)
    weights[-1] = 0
    tokenizer = WhitespaceTokenizer(WORDS, stop_words=[], do_lower_case=False)
    words = models.WordEmbeddings(tokenizer, weights.tolist())
    whole = SentenceTransformer(modules=[words, models.Pooling(5)], device="cpu")
    whole.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def run(tmp_path: Path, embedder: Path) -> Run:
    return Run(tmp_path, embedder)


def corpus(n_contexts: int, n_words: int = len(WORDS), seed: int = 0) -> TokenDataset:
    """Contexts of three windows each and an end that is in none; few words, so texts repeat."""
    rng = np.random.default_rng(seed)
    stretches = rng.integers(1, n_words + 1, (n_contexts, CONTEXT_LEN - 1))
    texts = [Document(f"{i}", f"{i}") for i in range(n_contexts)]
    config = TokenConfig(n_tokens=10**9, context_len=16, min_visible=8)
    return build_token_dataset(
        texts, lambda batch: [stretches[int(text)].tolist() for text in batch], 0, config
    )


def texts_of(dataset: TokenDataset) -> list[str]:
    """What each window shows, in order; BOS left out."""
    return [
        "".join(Words().pieces(dataset.context_tokens(c)[max(start, 1) : start + WINDOW_LEN]))
        for c in range(len(dataset.offsets) - 1)
        for start in range(0, CONTEXT_LEN - WINDOW_LEN + 1, WINDOW_LEN)
    ]


def test_every_distinct_window_is_embedded_once_as_plain_text_without_bos(run: Run) -> None:
    dataset = corpus(40, n_words=2)
    commit = run(dataset)
    texts = texts_of(dataset)
    n_distinct = len(set(texts))
    assert n_distinct < 30 < len(texts) == 120
    assert commit.summary == {"n_windows": 120, "n_distinct": n_distinct, "n_embedded": n_distinct}
    expected = unit_vectors(SentenceEmbedder(run.config).embed(texts))
    np.testing.assert_array_equal(run.vectors(commit), expected)
    assert run.ids(commit).tolist() == [c << 16 | s for c in range(40) for s in (0, 4, 8)]


def test_a_second_run_and_another_study_embed_nothing(run: Run) -> None:
    dataset = corpus(20)
    first = run(dataset)
    assert first.summary["n_embedded"] > 0
    again = run(dataset)
    assert again.summary["n_embedded"] == 0
    assert [b.content_hash for b in again.blobs] == [b.content_hash for b in first.blobs]


@pytest.mark.parametrize("dies_after", range(8))
def test_a_killed_run_goes_on_where_it_was_and_ends_as_one_that_was_not(
    run: Run, tmp_path: Path, embedder: Path, dies_after: int
) -> None:
    dataset = corpus(20, n_words=3)  # 60 windows: 8 segments
    with pytest.raises(KilledError):
        run(dataset, dies_after=dies_after)
    rest = run(dataset)
    texts = texts_of(dataset)
    done = set(texts[: 8 * dies_after])
    assert rest.summary["n_embedded"] == len(set(texts) - done)
    whole = Run(tmp_path / "other", embedder)(dataset)
    assert [b.checksum for b in rest.blobs] == [b.checksum for b in whole.blobs]


def test_a_corpus_that_grows_pays_for_new_segments_only(run: Run) -> None:
    small, large = corpus(16), corpus(24)  # 48 of 72 windows: 6 of 9 segments
    run(small)
    grown = run(large)
    texts = texts_of(large)
    assert texts[:48] == texts_of(small)
    assert grown.summary["n_embedded"] == len(set(texts) - set(texts[:48])) > 0
    expected = unit_vectors(SentenceEmbedder(run.config).embed(texts))
    np.testing.assert_array_equal(run.vectors(grown), expected)


def test_a_sample_is_drawn_by_window_and_a_larger_one_holds_it(run: Run) -> None:
    dataset = corpus(40)
    some, more = run(dataset, max_windows=10), run(dataset, max_windows=30)
    ids, larger = run.ids(some), run.ids(more)
    assert (len(ids), len(larger)) == (10, 30)
    assert set(ids.tolist()) < set(larger.tolist())
    assert (np.diff(larger.astype(np.int64)) > 0).all()
    place = {
        c << 16 | s: i for i, (c, s) in enumerate((c, s) for c in range(40) for s in (0, 4, 8))
    }
    texts = [texts_of(dataset)[place[i]] for i in larger.tolist()]
    expected = unit_vectors(SentenceEmbedder(run.config).embed(texts))
    np.testing.assert_array_equal(run.vectors(more), expected)
    assert run.ids(run(dataset, max_windows=10**6)).tolist() == run.ids(run(dataset)).tolist()


def test_another_sample_embeds_only_the_texts_that_it_does_not_share(run: Run) -> None:
    dataset = corpus(60)
    some = run(dataset, max_windows=50)
    more = run(dataset, max_windows=51)  # every segment behind the new window is another one
    assert more.summary["n_embedded"] <= 1
    other = corpus(66)
    grown = run(other, max_windows=51)
    place = {
        c << 16 | s: i for i, (c, s) in enumerate((c, s) for c in range(66) for s in (0, 4, 8))
    }
    texts = [texts_of(other)[place[i]] for i in run.ids(grown).tolist()]
    before = {texts_of(dataset)[place[i]] for i in run.ids(more).tolist()}
    assert 0 < grown.summary["n_embedded"] == len(set(texts) - before) < 10
    expected = unit_vectors(SentenceEmbedder(run.config).embed(texts))
    np.testing.assert_array_equal(run.vectors(grown), expected)
    assert run(dataset, max_windows=50).summary["n_embedded"] == 0
    assert len(run.ids(some)) == 50


def test_vectors_of_another_embedder_or_damaged_ones_are_not_taken(
    run: Run, tmp_path: Path
) -> None:
    dataset = corpus(30)
    first = run(dataset, max_windows=40)
    for blob in first.blobs:
        if blob.name.startswith("vectors/"):
            (tmp_path / "store" / blob.path).unlink()
    again = run(dataset, max_windows=41)
    assert again.summary["n_embedded"] == again.summary["n_distinct"]
    other = tmp_path / "other_embedder"
    shutil.copytree(run.config.source, other)
    weights = next(other.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0?")
    run.config = run.config.model_copy(update={"source": str(other)})
    changed = run(dataset, max_windows=42)
    assert changed.summary["n_embedded"] == changed.summary["n_distinct"]


def test_a_text_without_a_vector_and_a_corpus_without_windows_are_no_error(run: Run) -> None:
    rng = np.random.default_rng(0)
    config = TokenConfig(n_tokens=10**9, context_len=16, min_visible=1)
    zeros = build_token_dataset(
        [Document("a", "a")], lambda batch: [[9] * 8 + rng.integers(1, 9, 4).tolist()], 0, config
    )
    vectors = run.vectors(run(zeros))
    assert [bool(v.any()) for v in vectors] == [False, False, True]
    short = build_token_dataset([Document("a", "a")], lambda batch: [[1, 2]], 0, config)
    commit = run(short)
    assert commit.summary == {"n_windows": 0, "n_distinct": 0, "n_embedded": 0}
    assert [blob.name for blob in commit.blobs] == ["embedded_windows"]


def test_a_segment_is_named_by_its_texts_and_the_embedder_wherever_it_stands(run: Run) -> None:
    dataset = corpus(16)  # 6 segments, of which 3 change places with the others
    run(dataset)
    half = len(dataset.tokens) // 2
    moved = replace(dataset, tokens=np.roll(dataset.tokens, half))
    assert run(moved).summary["n_embedded"] == 0
    assert run(corpus(16, seed=1)).summary["n_embedded"] > 0
