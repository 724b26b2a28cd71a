"""Text files become documents in a fixed order, and a faulty file is named."""

import json
from pathlib import Path

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
    return list(open_corpus(config).documents())


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
    assert "1 text files" in corpus.description


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    write(tmp_path, a_txt=bom + b"one\r\ntwo", b_jsonl=bom + b'{"text": "three"}\r\n')
    assert [d.text for d in documents_in(tmp_path)] == ["one\ntwo", "three"]


def test_the_identity_changes_with_text_id_and_order_only(tmp_path: Path) -> None:
    def identity(name: str, **files: str) -> str:
        folder = write(tmp_path / name, **files)
        return open_corpus(TextFilesConfig(kind="files", path=folder)).identity()

    original = identity("a", x_txt="one", y_txt="two")
    assert identity("b", x_txt="one", y_txt="two") == original
    assert identity("c", x_txt="one", y_txt="two!") != original
    assert identity("d", x_txt="one", z_txt="two") != original
    assert identity("e", x_txt="two", y_txt="one") != original


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
        ({"a_jsonl": '{"text": "\\ud800"}'}, r"line 1: 'text' holds half a surrogate pair"),
        ({"a_md": "text"}, r"1 files, none ends in \.txt or \.jsonl"),
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
