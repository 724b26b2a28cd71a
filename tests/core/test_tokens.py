"""Documents become contexts: one document each, BOS first, more tokens only append."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import (
    Document,
    TokenDataset,
    TokenisedDocument,
    build_token_dataset,
    content_hash,
    context_batches,
)

BOS = 0
T = TypeVar("T")


def encode(texts: list[str]) -> list[list[int]]:
    """Token id = code point, so that tokens can be read back."""
    return [[ord(letter) for letter in text] for text in texts]


def dataset_of(
    texts: list[str],
    n_tokens: int = 10_000,
    context_len: int = 8,
    min_visible: int = 3,
    bos_id: int | None = BOS,
) -> TokenDataset:
    documents = [Document(f"d{i}", text, title=f"T{i}") for i, text in enumerate(texts)]
    config = TokenConfig(n_tokens=n_tokens, context_len=context_len, min_visible=min_visible)
    return build_token_dataset(documents, encode, bos_id, config)


def text_of(dataset: TokenDataset, context: int) -> str:
    tokens = dataset.context_tokens(context)[dataset.first_visible :]
    return "".join(chr(token) for token in tokens)


def test_every_context_begins_with_bos_even_if_bos_is_token_0() -> None:
    dataset = dataset_of(["abcdefghijklmnopq"])  # 17 letters: 7 + 7 + 3
    assert dataset.first_visible == 1
    assert [text_of(dataset, i) for i in range(3)] == ["abcdefg", "hijklmn", "opq"]
    assert dataset.tokens[dataset.offsets[:-1]].tolist() == [BOS, BOS, BOS]
    assert dataset.contexts["offset"].to_list() == [0, 7, 14]
    assert dataset.contexts["n_tokens"].to_list() == [8, 8, 4]


def test_without_bos_a_context_holds_one_more_visible_token() -> None:
    dataset = dataset_of(["abcdefghijk"], bos_id=None)
    assert dataset.first_visible == 0
    assert [text_of(dataset, i) for i in range(2)] == ["abcdefgh", "ijk"]


def test_a_last_shorter_context_is_kept_only_if_it_holds_a_window() -> None:
    assert dataset_of(["abcdefg" + "hij"]).contexts.height == 2
    assert dataset_of(["abcdefg" + "hi"]).contexts.height == 1


def test_a_full_context_is_kept_where_bos_takes_the_windows_last_token() -> None:
    # A window as long as the context: with BOS, 7 visible tokens are all there can be.
    assert dataset_of(["abcdefghijklm"], min_visible=8).contexts.height == 1


def test_contexts_never_cross_documents_and_short_documents_are_listed() -> None:
    dataset = dataset_of(["aaaaaaaaaa", "bb", "ccccc"])
    assert [text_of(dataset, i) for i in range(3)] == ["aaaaaaa", "aaa", "ccccc"]
    assert dataset.contexts["document"].to_list() == [0, 0, 2]
    assert dataset.documents["n_tokens"].to_list() == [10, 0, 5]
    assert dataset.documents["content_hash"].to_list()[1] == content_hash("bb")


def test_the_corpus_is_left_at_the_end_of_the_context_that_fills_the_quota() -> None:
    dataset = dataset_of(["aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc"], n_tokens=12)
    # 7 + 3 of a, then 7 of b reach 17 >= 12; c is not read.
    assert [text_of(dataset, i) for i in range(3)] == ["aaaaaaa", "aaa", "bbbbbbb"]
    assert dataset.documents["n_tokens"].to_list() == [10, 7]


def test_tokens_are_counted_by_source_without_bos() -> None:
    documents = [Document(f"d{i}", "a" * 8, source=s) for i, s in enumerate(["x", "y", "x"])]
    config = TokenConfig(context_len=8, min_visible=1)
    dataset = build_token_dataset(documents, encode, BOS, config)
    assert dataset.n_tokens_by_source() == {"x": 16, "y": 8}


def test_of_many_sources_the_largest_are_told() -> None:
    documents = [Document(f"d{i}", "a" * (8 + i), source=f"s{i}") for i in range(30)]
    dataset = build_token_dataset(documents, encode, BOS, TokenConfig(context_len=8, min_visible=1))
    assert list(dataset.n_tokens_by_source()) == [f"s{i}" for i in range(29, 9, -1)]


def test_no_more_is_read_or_tokenised_at_once_than_a_batch() -> None:
    read: list[str] = []
    batches: list[list[str]] = []

    def documents() -> Iterator[Document]:
        for i, size in enumerate([600_000, 600_000, *[10] * 200]):
            read.append(f"d{i}")
            yield Document(f"d{i}", "a" * size)

    def encode_noting(texts: list[str]) -> list[list[int]]:
        batches.append([f"{len(text)}" for text in texts])
        return encode([text[:10] for text in texts])

    config = TokenConfig(context_len=8, min_visible=3, n_tokens=21)
    build_token_dataset(documents(), encode_noting, BOS, config)
    # 7 + 3 tokens of each document: the third is the first of the second batch.
    assert batches == [["600000", "600000"], ["10"] * 64]
    assert len(read) == 66


class Shown:
    """A ``Progress`` that notes what it was given."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.n_steps = 0
        self.notes: list[str] = []

    def __call__(
        self,
        items: Iterable[T],
        *,
        total: int,
        description: str,
        unit: str = "it",
        note: Callable[[], str] | None = None,
    ) -> Iterator[T]:
        self.totals.append(total)
        for item in items:
            yield item
            self.n_steps += 1
            assert note is not None
            self.notes.append(note())


@pytest.mark.parametrize(("n_tokens", "n_steps"), [(2500, 2), (10_000, 4)])
def test_progress_is_shown_in_thousands_of_tokens(n_tokens: int, n_steps: int) -> None:
    documents = [Document(f"d{i}", "a" * 1400) for i in range(3)]  # 4200 tokens
    config = TokenConfig(context_len=8, min_visible=3, n_tokens=n_tokens)
    shown = Shown()
    dataset = build_token_dataset(documents, encode, BOS, config, shown)
    assert shown.totals == [n_tokens // 1000]
    assert shown.n_steps == n_steps
    assert shown.notes[-1] == f"{dataset.documents.height} documents"


def test_two_documents_with_one_id_are_an_error_that_names_it() -> None:
    documents = [Document("same", "abcdefgh"), Document("same", "ijklmnop")]
    with pytest.raises(CorpusError, match="'same' occurs twice"):
        build_token_dataset(documents, encode, BOS, TokenConfig(context_len=8))


def test_a_corpus_without_a_context_is_an_error() -> None:
    with pytest.raises(CorpusError, match="2 documents, none with 3 tokens"):
        dataset_of(["ab", ""])


texts = st.lists(st.text(alphabet="abcdef", max_size=30), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(texts=texts, n_tokens=st.integers(1, 60), more=st.integers(1, 60))
def test_more_tokens_only_append(texts: list[str], n_tokens: int, more: int) -> None:
    texts = ["abcdefgh", *texts]
    small, large = dataset_of(texts, n_tokens), dataset_of(texts, n_tokens + more)
    assert np.array_equal(large.tokens[: small.tokens.size], small.tokens)
    assert np.array_equal(large.offsets[: small.offsets.size], small.offsets)
    assert large.contexts.head(small.contexts.height).equals(small.contexts)
    stable = pl.exclude("n_tokens")
    assert (
        large.documents.head(small.documents.height)
        .select(stable)
        .equals(small.documents.select(stable))
    )


@settings(max_examples=60, deadline=None)
@given(texts=texts, n_tokens=st.integers(1, 60), has_bos=st.booleans())
def test_documents_that_are_tokens_already_give_the_same_contexts(
    texts: list[str], n_tokens: int, has_bos: bool
) -> None:
    texts = ["abcdefgh", *texts]
    documents = [
        TokenisedDocument(f"d{i}", np.array([BOS] * has_bos + ids, dtype=np.uint32), f"T{i}")
        for i, ids in enumerate(encode(texts))
    ]
    config = TokenConfig(n_tokens=n_tokens, context_len=8, min_visible=3)
    found = build_token_dataset(documents, encode, BOS, config)
    expected = dataset_of(texts, n_tokens)
    assert np.array_equal(found.tokens, expected.tokens)
    assert found.contexts.equals(expected.contexts)
    assert found.documents.drop("content_hash").equals(expected.documents.drop("content_hash"))


@settings(max_examples=60, deadline=None)
@given(texts=texts)
def test_contexts_equal_a_plain_loop(texts: list[str]) -> None:
    texts = ["abcdefgh", *texts]
    dataset = dataset_of(texts)
    expected = []
    for text in texts:
        for start in range(0, len(text), 7):
            stretch = text[start : start + 7]
            if len(stretch) >= 3:
                expected.append(stretch)
    assert [text_of(dataset, i) for i in range(dataset.contexts.height)] == expected


@settings(max_examples=40, deadline=None)
@given(texts=texts, batch_size=st.integers(1, 9))
def test_batches_hold_every_context_once_and_only_equal_lengths(
    texts: list[str], batch_size: int
) -> None:
    dataset = dataset_of(["abcdefgh", *texts])
    batches = context_batches(dataset, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(dataset.contexts.height))
    lengths = np.diff(dataset.offsets)
    for batch in batches:
        assert 1 <= batch.size <= batch_size
        assert (np.diff(batch) > 0).all()
        assert np.unique(lengths[batch]).size == 1


def test_a_batch_size_below_1_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        context_batches(dataset_of(["abcdefgh"]), 0)
