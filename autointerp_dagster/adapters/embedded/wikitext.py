"""Plain prose from MediaWiki markup: the paragraphs of an article, nothing else.

1. Cut the appendices (references, links, ...) off the source.
2. Delete what is not prose: comments, references, templates, tables, files, formulas.
3. Keep the visible words of links and formatting.
4. Keep the lines that are long enough to be paragraphs; headings, lists and captions go.
"""

import html
import re

_APPENDIX = re.compile(
    r"\n==+ *(?:See also|References|External links|Further reading|Notes|Bibliography|Sources"
    r"|Footnotes|Citations|Notes and references|Works cited) *==+",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref(?:\s[^<>]*)?/>|<ref(?:\s[^<>]*)?>.*?</ref\s*>", re.DOTALL | re.I)
_NOT_PROSE = re.compile(
    r"<(math|gallery|timeline|source|table|div|imagemap|score|pre|code|syntaxhighlight|chem)\b"
    r"[^<>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_MEASURE = re.compile(
    r"\{\{\s*(?:convert|cvt)\s*\|\s*([\d.,/+\u2013-]+)\s*\|\s*([^|{}]+)[^{}]*\}\}", re.I
)
_WORDS = re.compile(r"\{\{\s*(?:lang\s*\|[^|{}]*|nowrap|transl\s*\|[^|{}]*)\|([^|{}]*)\}\}", re.I)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]")
_FILE_OR_LANGUAGE_LINK = re.compile(
    r"\[\[\s*:?\s*(?:file|image|category|media|[a-z\-]{2,12}):", re.I
)
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\[\]]*\s*([^\[\]]*)\]")
_URL = re.compile(r"(?:https?|ftp)://\S+")
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_EMPTY_BRACKETS = re.compile(r"\s*\(\s*(?:[,;:/\u2013-]|or|and|&|\s)*\)")
_BRACKET_START = re.compile(r"\((?:\s*[,;:|])*\s*")
_BRACKET_END = re.compile(r"(?:\s*[,;:|])*\s*\)")
_SPACE_BEFORE_STOP = re.compile(r" +([,.;:!?)])")
_LINE_STARTS_OF_MARKUP = ("|", "!", "{", "}", "*", "#", ":", ";", "=", "<")
_MIN_PARAGRAPH_CHARS = 60


def prose(source: str) -> str:
    """Paragraphs of one wikitext page, one a line; empty if the page has none.

    Args:
        source: Wikitext as it stands in a dump, character entities still escaped once.
    """
    text = html.unescape(html.unescape(source)).replace("\u00a0", " ")
    text = _APPENDIX.split(text)[0]
    for markup in (_COMMENT, _REFERENCE, _NOT_PROSE):
        text = markup.sub("", text)
    text = _WORDS.sub(r"\1", _MEASURE.sub(r"\1 \2", text))
    text = drop_balanced(text, "{{", "}}")
    text = drop_balanced(text, "{|", "|}")
    text = drop_balanced(text, "[[", "]]", only=_FILE_OR_LANGUAGE_LINK)
    for _ in range(2):  # a link's words may hold another link
        text = _LINK.sub(r"\1", text)
    text = _URL.sub("", _WEB_LINK.sub(r"\1", text))
    text = _MAGIC_WORD.sub("", _TAG.sub("", re.sub(r"'{2,}", "", text)))
    return "\n".join(_paragraphs(text))


def drop_balanced(
    text: str, opening: str, closing: str, only: re.Pattern[str] | None = None
) -> str:
    """Text without the stretches between two markers, nested ones included.

    Args:
        text: Any text.
        opening: Two characters that open a stretch.
        closing: Two characters that close it.
        only: Drop a stretch, with what is nested in it, only if this matches at its opening.

    Returns:
        The text outside the stretches. One that is never closed ends at the next blank line, as
        a lost marker must not swallow the article.
    """
    kept: list[str] = []
    position = 0
    while (start := text.find(opening, position)) >= 0:
        if only is not None and not only.match(text, start):
            kept.append(text[position : start + len(opening)])
            position = start + len(opening)
            continue
        kept.append(text[position:start])
        position = _end_of_stretch(text, start, opening, closing)
    return "".join((*kept, text[position:]))


def _end_of_stretch(text: str, start: int, opening: str, closing: str) -> int:
    depth = 0
    for marker in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text[start:]):
        depth += 1 if marker.group() == opening else -1
        if depth == 0:
            return start + marker.end()
    blank_line = text.find("\n\n", start)
    return len(text) if blank_line < 0 else blank_line


def _paragraphs(text: str) -> list[str]:
    lines = (line.strip() for line in text.split("\n"))
    paragraphs = []
    for line in lines:
        if len(line) <= _MIN_PARAGRAPH_CHARS or line.startswith(_LINE_STARTS_OF_MARKUP):
            continue
        line = _BRACKET_START.sub("(", _EMPTY_BRACKETS.sub("", line))
        line = re.sub(r"\s+", " ", _BRACKET_END.sub(")", line))
        paragraphs.append(_SPACE_BEFORE_STOP.sub(r"\1", line))
    return paragraphs
