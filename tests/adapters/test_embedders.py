"""Vectors come in the order of the texts, and order and repetition change nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from autointerp_dagster.adapters.embedders import SentenceEmbedder, open_embedder
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


def embedder_at(folder: Path, **parameters: object) -> SentenceEmbedder:
    content = {"source": str(folder), "device": "cpu", **parameters}
    return open_embedder(EmbedderConfig.model_validate(content))


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


def test_the_identity_is_that_of_the_weights(embedder_dir: Path) -> None:
    embedder = embedder_at(embedder_dir, query_prefix="query: ")
    assert embedder.query_prefix == "query: "
    assert embedder.identity == embedder_at(embedder_dir, batch_size=3).identity


def test_opening_reads_nothing_and_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    embedder = embedder_at(tmp_path / "later")
    with pytest.raises(ModelError, match=r"later': no such folder"):
        embedder.embed(["text"])
