"""What a server says where it refuses, without what it merely repeats of the request.

Servers on FastAPI repeat the whole input, and a corpus speaks of schemas, seeds and context windows
as it likes: only a server's own words may decide what a refusal means.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_LONGEST = 20_000
"""Characters of a complaint that are looked at."""
_DEEPEST = 8
_SAYING = frozenset(
    {"message", "msg", "detail", "details", "error", "errors", "loc", "param", "title", "reason"}
    | {"code", "type", "metadata", "raw"}  # OpenRouter puts the provider's words into these two
)
"""Fields of a complaint that hold the server's own words, or the path to them."""
_SHORTEST_REPEAT = 16
"""Characters; a shorter text of the request's may be one of the server's own words."""
_REPEATS = (
    re.compile(r"input_value=.*?, input_type=", re.DOTALL),  # pydantic's, cut in the middle
    # pydantic's errors, written as Python.
    re.compile(r"""['"]input['"]: .*?(?=\}, \{['"]type['"]: |\n|$)"""),
)


def complaint_of(body: object, sent: Iterable[str], model: str) -> str:
    """The server's own words.

    Args:
        body: Of its response: decoded JSON, or text.
        sent: The texts of the request, which are left out.
        model: The model's name, likewise: some are named after a parameter.
    """
    said = " ".join(_said(body, _DEEPEST)) or str(body)
    for text in sorted(sent, key=len, reverse=True):
        if len(text) >= _SHORTEST_REPEAT:
            for form in _forms(text):
                said = said.replace(form, " ")
    said = re.sub(rf"(?<!\w){re.escape(model)}(?!\w)", " ", said[:_LONGEST])
    for repeat in _REPEATS:
        said = repeat.sub(" ", said)
    return said.strip()


def _said(value: object, n_levels: int) -> Iterator[str]:
    """The strings under the fields that speak, in their order."""
    if isinstance(value, str):
        inner = _decoded(value)
        if inner is None or n_levels == 0:
            yield value
        else:
            yield from _said(inner, n_levels - 1)
    elif n_levels == 0:
        return
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name in _SAYING:
                yield from _said(inner, n_levels - 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _said(inner, n_levels - 1)


def _decoded(text: str) -> Any:
    """A complaint within a complaint, as JSON; null for plain words."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return inner if isinstance(inner, dict | list) else None


def _forms(text: str) -> set[str]:
    """A text as it is, and as it looks within JSON and within Python."""
    within_json = (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return {text, repr(text)[1:-1], *within_json}
