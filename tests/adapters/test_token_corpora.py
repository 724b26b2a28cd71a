"""Token ids in files become documents, and what is no token id is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file

from autointerp_dagster.adapters.corpora import Corpus, arrays, open_corpus
from autointerp_dagster.core.config import TokenConfig, TokensCorpusConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import TokenisedDocument, build_token_dataset, known_tokens

ROWS = np.array([[5, 6, 7, 8], [9, 5, 0, 0], [6, 0, 7, 7]])


def corpus_of(path: Path, **config: Any) -> Corpus:
    return open_corpus(TokensCorpusConfig(kind="tokens", path=path, **config))


def rows_of(corpus: Corpus) -> dict[str, list[int]]:
    """Tokens by document id."""
    documents = list(corpus.documents())
    assert all(isinstance(document, TokenisedDocument) for document in documents)
    return {
        document.doc_id: document.tokens.tolist()
        for document in documents
        if isinstance(document, TokenisedDocument)
    }


def write_npy(path: Path, array: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), array)


def write_safetensors(path: Path, array: np.ndarray) -> None:
    save_file({"tokens": array}, path.with_suffix(".safetensors"))


def write_parquet(path: Path, array: np.ndarray) -> None:
    kind = pa.from_numpy_dtype(array.dtype)
    values = array.tolist()
    column = pa.array(values, type=kind if array.ndim == 1 else pa.list_(kind))
    pq.write_table(pa.table({"input_ids": column, "n": list(range(len(values)))}),
                   path.with_suffix(".parquet"))  # fmt: skip


WRITERS = {".npy": write_npy, ".safetensors": write_safetensors, ".parquet": write_parquet}


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_row_is_a_document(tmp_path: Path, suffix: str, dtype: type) -> None:
    WRITERS[suffix](tmp_path / "x", ROWS.astype(dtype))
    assert rows_of(corpus_of(tmp_path)) == {
        f"x{suffix}:0": [5, 6, 7, 8], f"x{suffix}:1": [9, 5, 0, 0], f"x{suffix}:2": [6, 0, 7, 7],
    }  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
def test_padding_is_cut_off_the_ends_of_rows_only(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / "x", ROWS)
    found = list(rows_of(corpus_of(tmp_path, padding=0)).values())
    assert found == [[5, 6, 7, 8], [9, 5], [6, 0, 7, 7]]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_separator_parts_the_documents_of_a_row(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / "x", ROWS)
    assert rows_of(corpus_of(tmp_path, separator=0)) == {
        f"x{suffix}:0:0": [5, 6, 7, 8],
        f"x{suffix}:1:0": [9, 5],
        f"x{suffix}:2:0": [6],
        f"x{suffix}:2:2": [7, 7],
    }


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_flat_array_needs_a_separator(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / "x", np.array([0, 5, 6, 0, 0, 7, 8]))
    assert rows_of(corpus_of(tmp_path, separator=0)) == {
        f"x{suffix}:1": [5, 6],
        f"x{suffix}:5": [7, 8],
    }
    with pytest.raises(CorpusError, match=r"a flat array.*Set corpus\.separator"):
        rows_of(corpus_of(tmp_path))


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), max_size=40), block=st.integers(1, 7))
def test_stretches_do_not_depend_on_how_much_is_read_at_once(tokens: list[int], block: int) -> None:
    array = np.array(tokens, dtype=np.int64)
    blocks = [array[i : i + block] for i in range(0, len(array), block)]
    found = [(start, stretch.tolist()) for start, stretch in arrays._stretches(blocks, 0)]
    expected, start = [], 0
    for part in "".join(map(str, tokens)).split("0"):
        if part:
            expected.append((start, [int(digit) for digit in part]))
        start += len(part) + 1
    assert found == expected


def test_a_parquet_row_may_have_any_length_and_any_list_type(tmp_path: Path) -> None:
    for i, kind in enumerate((pa.list_(pa.int64()), pa.large_list(pa.uint16()))):
        column = pa.array([[1, 2, 3], [], None, [4]], type=kind)
        pq.write_table(pa.table({"ids": column}), tmp_path / f"{i}.parquet")
    pq.write_table(
        pa.table({"ids": pa.array([[1, 2]], type=pa.list_(pa.int32(), 2))}), tmp_path / "2.parquet"
    )
    found = rows_of(corpus_of(tmp_path, column="ids"))
    assert list(found.values()) == [[1, 2, 3], [], [], [4]] * 2 + [[1, 2]]


def test_a_tensor_is_found_by_its_name_if_there_are_several(tmp_path: Path) -> None:
    save_file({"mask": np.ones((1, 2), np.int64), "ids": np.array([[3, 4]])},
              tmp_path / "x.safetensors")  # fmt: skip
    assert list(rows_of(corpus_of(tmp_path, column="ids")).values()) == [[3, 4]]
    message = r"x\.safetensors: tensors \['ids', 'mask'\], wanted 'input_ids'\. Set corpus\.column"
    with pytest.raises(CorpusError, match=message):
        rows_of(corpus_of(tmp_path))


def test_a_large_array_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_BLOCK", 10)
    rows = np.arange(1, 301).reshape(100, 3)
    for suffix in (".npy", ".safetensors"):
        WRITERS[suffix](tmp_path / "x", rows)
    for name in ("x.npy", "x.safetensors"):
        assert list(rows_of(corpus_of(tmp_path / name)).values()) == rows.tolist()


def test_the_identity_follows_content_column_separator_and_padding(tmp_path: Path) -> None:
    write_npy(tmp_path / "x", ROWS)
    identities = [
        corpus_of(tmp_path, **config).identity()
        for config in ({}, {"separator": 0}, {"padding": 0}, {"column": "ids"})
    ]
    write_npy(tmp_path / "x", ROWS + 1)
    identities.append(corpus_of(tmp_path).identity())
    assert len(set(identities)) == len(identities)


def test_tokens_of_a_hub_dataset(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "train", ROWS)
    write_npy(folder / "rest", ROWS[:1])
    hub.add("me/tokens", folder, kind="datasets")

    def corpus(**config: Any) -> Corpus:
        return open_corpus(TokensCorpusConfig(kind="tokens", repo="me/tokens", **config))

    for streaming in (True, False):
        found = rows_of(corpus(files=["data/*"], streaming=streaming))
        assert found["data/train.parquet:1"] == [9, 5, 0, 0]
    assert rows_of(corpus(files=["rest.npy"])) == {"rest.npy:0": [5, 6, 7, 8]}


def dataset_tokens(tokens: list[int], bos_id: int | None) -> list[list[int]]:
    """Tokens of each context."""
    document = TokenisedDocument("d", np.array(tokens))
    config = TokenConfig(context_len=8, min_visible=2)
    dataset = build_token_dataset([document], lambda _: [], bos_id, config)
    return [dataset.context_tokens(i).tolist() for i in range(dataset.contexts.height)]


def test_a_document_that_has_its_bos_gets_no_second_one() -> None:
    assert dataset_tokens([0, 5, 6], bos_id=0) == [[0, 5, 6]]
    assert dataset_tokens([5, 6], bos_id=0) == [[0, 5, 6]]
    assert dataset_tokens([0, 0, 5], bos_id=0) == [[0, 0, 5]]  # one of them is text
    assert dataset_tokens([0, 5, 6], bos_id=None) == [[0, 5, 6]]
    # 7 tokens fit behind BOS.
    assert dataset_tokens([0, *range(1, 10)], bos_id=0) == [[0, *range(1, 8)], [0, 8, 9]]


def test_the_hash_of_tokens_does_not_depend_on_their_type() -> None:
    hashes = {
        TokenisedDocument("d", np.array([1, 2, 3], dtype=dtype)).content_hash
        for dtype in (np.uint16, np.int32, np.int64)
    }
    assert len(hashes) == 1
    assert TokenisedDocument("d", np.array([1, 2, 4])).content_hash not in hashes


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 7, 100], "token 100 at position 2, wanted ids from 0 to 99"),
        ([1, -100], "token -100 at position 1"),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused(tokens: list[int], message: str) -> None:
    documents = [
        TokenisedDocument("good", np.array([0, 99])),
        TokenisedDocument("x:3", np.array(tokens)),
    ]
    checked = known_tokens(documents, 100)
    assert next(checked).doc_id == "good"
    with pytest.raises(CorpusError, match=f"document 'x:3': {message}"):
        next(checked)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 2), np.float32), "holds float32, wanted integers"),
        (np.ones((2, 2), bool), "holds bool, wanted integers"),
        (np.ones((1, 2, 3), np.int64), r"an array of shape \(1, 2, 3\), wanted \(document"),
        (np.array([[1], [1, 2]], dtype=object), r"cannot be read as an array of numbers"),
        (np.zeros((0, 4), np.int64), "the file is empty, wanted token ids"),
    ],
)  # fmt: skip
def test_an_array_that_holds_no_tokens_is_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(CorpusError, match=rf"x\.npy: {message}"):
        rows_of(corpus_of(tmp_path))


@pytest.mark.parametrize("content", [b"\x93NUMPY no", b""])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(CorpusError, match=rf"x\{suffix}: cannot be read as"):
        rows_of(corpus_of(tmp_path))


def test_floats_and_nulls_in_a_table_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1.5]]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"holds list<.*double.*>, wanted lists of token ids"):
        rows_of(corpus_of(tmp_path))
    pq.write_table(pa.table({"input_ids": [[1, None]]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"x\.parquet: a token is null, wanted an id"):
        rows_of(corpus_of(tmp_path))
    pq.write_table(pa.table({"tokens": [[1]]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"columns \['tokens'\], wanted 'input_ids'"):
        rows_of(corpus_of(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has a path or a repo"),
        ({"path": "x", "repo": "me/tokens"}, "has a path or a repo"),
        ({"path": "x", "split": "test"}, "split belongs to a repo"),
        ({"repo": "me/t", "files": ["*"], "name": "en"}, "files stands instead of name and split"),
        ({"repo": "tokens"}, "wanted owner and name of a dataset"),
    ],
)  # fmt: skip
def test_a_corpus_of_tokens_is_in_one_place(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokensCorpusConfig(kind="tokens", **config)
