"""Vectors come in the order of the texts; company, order and repetition change nothing."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from autointerp_dagster.adapters.embedded import english_documents, minilm_dir
from autointerp_dagster.adapters.embedders import SentenceEmbedder, VectorCache, open_embedder
from autointerp_dagster.core.config import EmbedderConfig
from autointerp_dagster.core.errors import ModelError

WORDS = ["[PAD]", "[UNK]", "the", "river", "runs", "past", "an", "old", "mill"]
TEXTS = ["the river runs", "an old mill", "the", "the river runs past an old mill", "river"]


@pytest.fixture(scope="module")
def embedder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1-layer BERT with mean pooling."""
    bert, whole = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("embedder")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(bert)
    model = BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "Norm" not in name:
                parameter.normal_(std=0.5, generator=generator)
    model.save_pretrained(bert)
    transformer = models.Transformer(str(bert), max_seq_length=16)
    SentenceTransformer(modules=[transformer, models.Pooling(8)], device="cpu").save_pretrained(
        str(whole), create_model_card=False
    )
    return whole


def config_of(folder: Path, **parameters: object) -> EmbedderConfig:
    return EmbedderConfig.model_validate({"source": str(folder), "device": "cpu", **parameters})


def embedder_at(folder: Path, **parameters: object) -> SentenceEmbedder:
    return open_embedder(config_of(folder, **parameters))


def fresh(folder: Path, **parameters: object) -> SentenceEmbedder:
    """With nothing kept."""
    return SentenceEmbedder(config_of(folder, **parameters))


def test_vectors_come_in_the_order_of_the_texts(embedder_dir: Path) -> None:
    model = SentenceTransformer(str(embedder_dir), device="cpu")
    one_by_one = np.stack([model.encode(text) for text in TEXTS])
    vectors = embedder_at(embedder_dir).embed(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, one_by_one, atol=1e-5)


def test_order_and_repetition_change_nothing(embedder_dir: Path) -> None:
    embedder = embedder_at(embedder_dir, batch_size=2)
    vectors = embedder.embed(TEXTS)
    order = [4, 0, 0, 3, 2, 1, 4]
    assert np.array_equal(embedder.embed([TEXTS[i] for i in order]), vectors[order])


def test_no_texts_give_no_vectors(embedder_dir: Path) -> None:
    assert embedder_at(embedder_dir).embed([]).shape == (0, 8)


def test_the_batch_size_hardly_matters(embedder_dir: Path) -> None:
    one, many = (embedder_at(embedder_dir, batch_size=n).embed(TEXTS) for n in (1, 8))
    np.testing.assert_allclose(one, many, atol=1e-5)


def test_a_texts_bits_do_not_depend_on_what_is_embedded_with_it(embedder_dir: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[2:], size=n)) for n in rng.integers(1, 40, size=60)]
    alone = [fresh(embedder_dir, batch_size=3).embed([text])[0] for text in texts]
    together = fresh(embedder_dir, batch_size=3).embed(texts)
    assert np.array_equal(np.stack(alone), together)
    order = rng.permutation(len(texts))[:25]
    some = fresh(embedder_dir, batch_size=3).embed([texts[i] for i in order])
    assert np.array_equal(some, together[order])


@pytest.mark.slow
def test_windows_of_a_real_model_have_the_same_bits_in_any_company() -> None:
    words = " ".join(document.text for document in islice(english_documents(), 20)).split()
    texts = [" ".join(words[i : i + 16 + i % 24]) for i in range(0, 1200, 40)]
    config = EmbedderConfig(source=str(minilm_dir()), device="cpu")
    together = SentenceEmbedder(config).embed(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    in_parts = SentenceEmbedder(config)
    for part in np.array_split(order, 3):
        found = in_parts.embed([texts[i] for i in part])
        assert np.array_equal(found, together[part])
    assert in_parts.n_embedded == len(set(texts))
    plain = SentenceTransformer(str(minilm_dir()), device="cpu").encode(texts)
    np.testing.assert_allclose(together, plain, atol=1e-6)


def test_each_distinct_text_goes_through_the_model_once(embedder_dir: Path) -> None:
    embedder = fresh(embedder_dir)
    first = embedder.embed([*TEXTS, *TEXTS])
    assert embedder.n_embedded == len(TEXTS)
    again = embedder.embed([TEXTS[3], "past", TEXTS[0]])
    assert embedder.n_embedded == len(TEXTS) + 1
    assert np.array_equal(again[[0, 2]], first[[3, 0]])


def test_a_vector_that_was_dropped_is_made_again_with_the_same_bits(embedder_dir: Path) -> None:
    entry = 8 * 4 + 300  # a vector, and what it costs to keep one
    embedder = SentenceEmbedder(config_of(embedder_dir), cache_bytes=2 * entry)
    first = embedder.embed(TEXTS)
    assert np.array_equal(embedder.embed(TEXTS), first)
    assert embedder.n_embedded == 2 * len(TEXTS) - 2


def test_the_cache_drops_what_was_not_used_for_longest() -> None:
    vectors = VectorCache(2 * (4 * 4 + 300))
    for text in ("a", "b"):
        vectors.keep(text, np.full(4, ord(text), np.float32))
    assert vectors.find("a") is not None
    vectors.keep("c", np.zeros(4, np.float32))
    assert vectors.find("b") is None
    assert vectors.find("a") is not None
    assert vectors.find("c") is not None
    assert vectors.n_bytes == 2 * (4 * 4 + 300)


def test_callers_cannot_change_what_is_kept(embedder_dir: Path) -> None:
    embedder = fresh(embedder_dir)
    before = embedder.embed(["river"]).copy()
    embedder.embed(["river"])[:] = 0
    assert np.array_equal(embedder.embed(["river"]), before)


def test_the_models_own_default_prompt_is_not_put_before_texts(
    embedder_dir: Path, tmp_path: Path
) -> None:
    prompted = SentenceTransformer(
        str(embedder_dir),
        device="cpu",
        prompts={"query": "the old mill ", "document": "past an "},
        default_prompt_name="document",
    )
    prompted.save_pretrained(str(tmp_path), create_model_card=False)
    plain = fresh(embedder_dir).embed(TEXTS)
    assert np.array_equal(fresh(tmp_path).embed(TEXTS), plain)
    # the prompt would have been seen: sentence-transformers itself adds it
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert not np.allclose(loaded.encode(TEXTS), plain, atol=1e-3)


def test_empty_and_very_long_texts_are_embedded(embedder_dir: Path) -> None:
    vectors = fresh(embedder_dir).embed(["", "river " * 10_000, "river " * 16, "\n"])
    assert vectors.shape == (4, 8)
    assert np.array_equal(vectors[1], vectors[2])  # cut at the model's 16 tokens


def test_the_identity_is_that_of_the_weights(embedder_dir: Path) -> None:
    embedder = embedder_at(embedder_dir, query_prefix="query: ")
    assert embedder.query_prefix == "query: "
    assert embedder.identity == embedder_at(embedder_dir, batch_size=3).identity


def test_opening_reads_nothing_and_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    embedder = embedder_at(tmp_path / "later")
    with pytest.raises(ModelError, match=r"later': no such folder"):
        embedder.embed(["text"])
