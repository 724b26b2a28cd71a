"""Corpus text in the UI is shown, never obeyed."""

import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from autointerp_dagster.resources.plots import PREVIEW_ROWS, escaped, histogram, preview

HARMLESS = {
    "table_open", "table_close", "thead_open", "thead_close", "tbody_open", "tbody_close",
    "tr_open", "tr_close", "th_open", "th_close", "td_open", "td_close", "inline", "text",
    "text_special",
}  # fmt: skip

EVIL = [
    "a | b",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "two\nlines\r\nand\ta tab",
    "`code` and ``more``",
    "![pixel](http://x.example/a.png)",
    "[click](javascript:alert(1))",
    "[click][ref]",
    "<http://x.example>",
    "*em* **strong** _em_ ~~gone~~",
    "# heading",
    "- item\n- item",
    "\\| \\<b>",
    "&lt;script&gt; &#124; &amp;",
    "$x^2$ :smile: [^1]",
    "---|---",
]


def rendered(markdown: str) -> list[Token]:
    """All tokens, inner ones too, of a page that allows HTML and tables."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    outer = tokens.parse(markdown)
    return [inner for token in outer for inner in (token, *(token.children or []))]


def cells(markdown: str) -> list[str]:
    """The text of each cell of the body."""
    outer = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    texts = [token.children for token in outer if token.type == "inline"]
    return ["".join(child.content for child in children or []) for children in texts]


def shown(text: str) -> str:
    """What a reader should see of a text: itself, on one line."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text).strip(" ")


def visible(text: str) -> str:
    return text.replace("\N{ZERO WIDTH SPACE}", "").strip(" ")


@pytest.mark.parametrize("text", EVIL)
def test_corpus_text_is_neither_markup_nor_html_and_reads_as_it_is(text: str) -> None:
    page = preview(pl.DataFrame({"text": [text], "n": [1]})).value
    assert isinstance(page, str)
    assert {token.type for token in rendered(page)} <= HARMLESS
    assert [visible(cell) for cell in cells(page)] == ["text", "n", shown(text), "1"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30))
def test_any_text_is_one_cell_of_plain_text(text: str) -> None:
    page = f"| a | b |\n|---|---|\n| {escaped(text)} | end |"
    assert {token.type for token in rendered(page)} <= HARMLESS
    assert cells(page)[-1] == "end"
    assert len(cells(page)) == 4


@pytest.mark.parametrize(
    "text", ["https://x.example/a", "see HTTP://x", "www.x.example", "a@b.com"]
)
def test_bare_addresses_do_not_become_links(text: str) -> None:
    """Dagster's pages link them after character references are resolved, by these patterns."""
    (_, cell) = cells(preview(pl.DataFrame({"text": [text]})).value)  # type: ignore[arg-type]
    assert not re.search(r"(https?://|www(?=\.))[-.\w]+", cell, re.IGNORECASE)
    assert not re.search(r"[-.\w+]+@[-\w]+\.[-\w]+", cell)
    assert visible(cell) == text


def test_long_texts_and_long_tables_are_cut() -> None:
    page = preview(pl.DataFrame({"text": ["x" * 1000] * 50})).value
    assert isinstance(page, str)
    body = page.splitlines()[2:]
    assert len(body) == PREVIEW_ROWS
    assert body[0] == "| " + "x" * 199 + "… |"


def test_a_cut_never_leaves_half_an_escape() -> None:
    page = preview(pl.DataFrame({"text": ["|" * 1000]})).value
    assert cells(page)[-1] == "|" * 199 + "…"  # type: ignore[arg-type]


def test_numbers_are_short_and_null_is_empty() -> None:
    frame = pl.DataFrame({"value": [1 / 3, None], "n": [7, None], "is": [True, None]})
    assert cells(preview(frame).value)[3:] == ["0.333", "7", "True", "", "", ""]  # type: ignore[arg-type]


def test_an_empty_table_shows_its_columns() -> None:
    assert preview(pl.DataFrame({"a": [], "b": []})).value == "| a | b |\n|---|---|"


@pytest.mark.parametrize("values", [[], [3], [1, 1, 1], [1, 10, 100_000]])
@pytest.mark.parametrize("log", [True, False])
def test_a_histogram_is_an_inline_picture_even_of_nothing(values: list[int], log: bool) -> None:
    picture = histogram(pl.Series(values, dtype=pl.UInt64), "tokens", log=log).value
    assert isinstance(picture, str)
    assert picture.startswith("![tokens](data:image/png;base64,iVBOR")
