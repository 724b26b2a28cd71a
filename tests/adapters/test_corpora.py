"""Files of text become documents in a fixed order, and a faulty file is named."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autointerp_dagster.adapters.corpora import open_corpus
from autointerp_dagster.core.config import TextFilesConfig
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.tokens import Document


def write(folder: Path, **files: str | bytes) -> Path:
    """Files by name; ``__`` stands for a slash, the last ``_`` for the dot."""
    for key, content in files.items():
        path = folder / ".".join(key.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def documents_in(path: Path, column: str = "text") -> list[Document]:
    config = TextFilesConfig(kind="files", path=path, column=column)
    documents = list(open_corpus(config).documents())
    assert all(isinstance(document, Document) for document in documents)
    return [document for document in documents if isinstance(document, Document)]


def write_parquet(path: Path, texts: list[str | None], **options: object) -> None:
    columns = {"n": list(range(len(texts))), "text": texts}
    pq.write_table(pa.table(columns), path, **options)


def test_files_come_by_relative_path_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, b_txt="two", a__z_txt="one", c_md="no", **{".cache__d_txt": "no"})
    documents = documents_in(tmp_path)
    assert [(d.doc_id, d.text, d.title) for d in documents] == [
        ("a/z.txt", "one", "z"),
        ("b.txt", "two", "b"),
    ]


def test_a_jsonl_file_gives_one_document_per_line(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "first ü"}), "", json.dumps({"body": "second", "n": 1})]
    write(tmp_path, x_jsonl="\n".join(lines) + "\n")
    documents = documents_in(tmp_path, column="body")
    assert [(d.doc_id, d.text) for d in documents] == [
        ("x.jsonl:1", "first ü"),
        ("x.jsonl:3", "second"),
    ]


def test_one_file_is_a_corpus(tmp_path: Path) -> None:
    write(tmp_path, a_txt="text")
    config = TextFilesConfig(kind="files", path=tmp_path / "a.txt")
    corpus = open_corpus(config)
    assert [d.doc_id for d in corpus.documents()] == ["a.txt"]
    assert corpus.about()["n_files"] == 1


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    write(tmp_path, a_txt=bom + b"one\r\ntwo", b_jsonl=bom + b'{"text": "three"}\r\n')
    assert [d.text for d in documents_in(tmp_path)] == ["one\ntwo", "three"]


@pytest.mark.parametrize("row_group_size", [1, 2, 300])
def test_a_parquet_file_gives_one_document_per_row(tmp_path: Path, row_group_size: int) -> None:
    texts = [f"text {i} ü" for i in range(600)]
    write_parquet(tmp_path / "x.parquet", [*texts], row_group_size=row_group_size)
    documents = documents_in(tmp_path)
    assert [document.text for document in documents] == texts
    assert [documents[i].doc_id for i in (0, 599)] == ["x.parquet:0", "x.parquet:599"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)  # fmt: skip
def test_text_of_any_arrow_type_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    text = pa.array(["é", None, "b"]).cast(kind)
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    assert [document.text for document in documents_in(tmp_path)] == ["é", "", "b"]


def test_empty_texts_are_documents_that_a_context_does_not_hold(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["", None, "c"])
    write(tmp_path, b_jsonl='{"text": ""}\n{"text": null}\n{"text": "d"}')
    assert [document.text for document in documents_in(tmp_path)] == ["", "", "c", "", "", "d"]


@pytest.mark.parametrize(("suffix", "codec"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_files_are_read_as_if_they_were_not(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    lines = "".join(json.dumps({"text": f"line {i} ü"}) + "\n" for i in range(5000)).encode()
    for part in (lines[:90_000], lines[90_000:]):  # as written in two goes
        with pa.CompressedOutputStream(
            pa.OSFile(str(tmp_path / f"x.jsonl{suffix}"), "ab"), codec
        ) as file:
            file.write(part)
    with pa.CompressedOutputStream(
        pa.OSFile(str(tmp_path / f"y.txt{suffix}"), "wb"), codec
    ) as file:
        file.write("whole ü".encode())
    documents = documents_in(tmp_path)
    assert [document.text for document in documents[:-1]] == [f"line {i} ü" for i in range(5000)]
    assert documents[-1].text == "whole ü"
    assert documents[-1].title == "y"


def test_a_json_file_in_a_folder_is_about_the_data_unless_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, a_txt="text", info_json='{"text": "line"}\n')
    assert [d.doc_id for d in documents_in(tmp_path)] == ["a.txt"]
    assert [d.text for d in documents_in(tmp_path / "info.json")] == ["line"]


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    n_texts, size = 4000, 10_000  # 40 MB of text in one row group
    texts: list[str | None] = [f"{i:05}".ljust(size, "x") for i in range(n_texts)]
    write_parquet(tmp_path / "x.parquet", texts, row_group_size=n_texts, compression="none",
                  use_dictionary=False)  # fmt: skip
    del texts
    documents = open_corpus(TextFilesConfig(kind="files", path=tmp_path)).documents()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    largest = 0
    for document in documents:
        assert document.size == size
        largest = max(largest, pa.total_allocated_bytes() - before)
    assert largest + tracemalloc.get_traced_memory()[1] < 25e6  # bytes
    tracemalloc.stop()


def test_checking_reads_the_first_document_of_each_file_only(tmp_path: Path) -> None:
    bad_later = '{"text": "a"}\n{'
    write(tmp_path, a_jsonl=bad_later)
    open_corpus(TextFilesConfig(kind="files", path=tmp_path)).check()
    write(tmp_path, b_jsonl="{")
    with pytest.raises(CorpusError, match=r"b\.jsonl, line 1: no JSON"):
        open_corpus(TextFilesConfig(kind="files", path=tmp_path)).check()


def test_the_identity_changes_with_text_id_and_order_only(tmp_path: Path) -> None:
    def identity(name: str, **files: str) -> str:
        folder = write(tmp_path / name, **files)
        return open_corpus(TextFilesConfig(kind="files", path=folder)).identity()

    original = identity("a", x_txt="one", y_txt="two")
    assert identity("b", x_txt="one", y_txt="two") == original
    assert identity("c", x_txt="one", y_txt="two!") != original
    assert identity("d", x_txt="one", z_txt="two") != original
    assert identity("e", x_txt="two", y_txt="one") != original


def test_the_identity_follows_a_file_that_is_written_again(tmp_path: Path) -> None:
    write(tmp_path, x_jsonl='{"text": "one", "body": "two"}')
    corpus = open_corpus(TextFilesConfig(kind="files", path=tmp_path))
    other_column = TextFilesConfig(kind="files", path=tmp_path, column="body")
    before = corpus.identity()
    assert before == corpus.identity()
    assert before != open_corpus(other_column).identity()
    write(tmp_path, x_jsonl='{"text": "once", "body": "two"}')
    assert before != corpus.identity()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a_txt": b"abc\xffdef"}, r"a\.txt: byte 3 is 0xff, not UTF-8"),
        ({"a_jsonl": b'{"text": "a"}\n{"text": "\xfc"}'}, r"a\.jsonl, line 2: byte 24 is 0xfc"),
        ({"a_txt": " \n"}, r"a\.txt: the file is empty"),
        ({"a_jsonl": "\n"}, r"a\.jsonl: the file is empty"),
        ({"a_jsonl": '{"text": "a"}\n{"body": "b"}'}, r"line 2: got keys \['body'\].*'text'"),
        ({"a_jsonl": "[1]"}, r"line 1: got a list"),
        ({"a_jsonl": '{"text": 3}'}, r"line 1: 'text' holds a int"),
        ({"a_jsonl": "{"}, r"line 1: no JSON"),
        ({"a_jsonl": '{"text": ' + 5000 * "1" + "}"}, r"line 1: no JSON"),
        ({"a_jsonl": 100_000 * "["}, r"line 1: no JSON"),
        ({"a_jsonl": '{"text": "\\ud800"}'}, r"line 1: 'text' holds half a surrogate pair"),
        ({"a_jsonl": '{"text": "a"}\n' * 3 + "\xff"}, r"a\.jsonl, line 4: no JSON"),
        (
            {"a.jsonl_gz": gzip.compress(b'{"text": "a"}')[:-12]},
            r"a\.jsonl\.gz: cannot be read as lines",
        ),
        ({"a.jsonl_zst": b"no such thing"}, r"a\.jsonl\.zst: cannot be read as lines of JSON"),
        ({"a_parquet": b"PAR1 and no more"}, r"a\.parquet: cannot be read as a Parquet file"),
        ({"a_parquet": b""}, r"a\.parquet: cannot be read as a Parquet file"),
        ({"a_md": "text"}, r"1 files, none ends in \.parquet, \.txt, "),
    ],
)
def test_a_faulty_file_is_an_error_that_names_the_place(
    tmp_path: Path, files: dict[str, str | bytes], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        documents_in(write(tmp_path, **files))


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere: no such file or folder"):
        documents_in(tmp_path / "nowhere")


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a"])
    message = r"x\.parquet: columns \['n', 'text'\], wanted 'body'\. Set corpus\.column"
    with pytest.raises(CorpusError, match=message):
        documents_in(tmp_path, column="body")


def test_a_column_of_another_type_names_the_type_and_the_kind_of_corpus(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [[1, 2], [3]]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"'text' holds list<.*int64.*>, wanted text.*`tokens`"):
        documents_in(tmp_path)


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a"])
    pq.write_table(pq.read_table(tmp_path / "x.parquet").slice(1), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"x\.parquet: the file is empty"):
        documents_in(tmp_path)


def test_a_row_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"ok", b"caf\xe9"]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"x\.parquet, row 1: byte 3 is 0xe9, not UTF-8"):
        documents_in(tmp_path)


def test_a_parquet_file_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, [f"text {i}" for i in range(1000)], compression="zstd")
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(1).dictionary_page_offset + 60
    content[start : start + 100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x\.parquet: cannot be read as a Parquet file \("):
        documents_in(tmp_path)
