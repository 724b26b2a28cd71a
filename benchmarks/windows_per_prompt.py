"""Does a judge err more when it labels several windows in one answer than one at a time?

Descriptions whose truth a regular expression decides, on windows of real English, half of them
fitting. The judge labels the same windows with 1 and with several per prompt; the accuracies are
compared pairwise. The judge is the embedded model, or what the environment variable
``AUTOINTERP_JUDGE`` describes, e.g. ``{"base_url": "http://127.0.0.1:8000/v1", "model": "..."}``.
A judge that cannot tell such windows one at a time says nothing about this question; then nothing
is measured.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from upath import UPath

from autointerp_dagster.adapters.embedded import english_documents
from autointerp_dagster.adapters.llm import open_journal, open_llm
from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.core import highlight
from autointerp_dagster.core.config.models import LLMConfig
from autointerp_dagster.core.llm import JournalBlock, LabelList, Request
from autointerp_dagster.core.prompts import detection_prompt
from benchmarks.measure import NotMeasured, Result

RULES = {
    "numbers written in digits": r"\d",
    "questions that end in a question mark": r"\?",
    "speech or words in double quotation marks": r"[\"“”]",
    "exclamations that end in an exclamation mark": r"!",
    'the word "he" or "she"': r"\b[Ss]?[Hh]e\b",
    'the word "and" twice or more': r"\band\b.*\band\b",
    'the word "not"': r"\bnot\b",
    "parentheses": r"[()]",
    "a semicolon": r";",
    "words that end in -ing": r"\w+ing\b",
}
"""Description and rule."""

WORDS_PER_WINDOW = 24
N_FIRST = 400
"""Windows that decide whether the judge is good enough to measure."""
N_WINDOWS = 10_000
GOOD_ENOUGH = 0.65
SEVERAL = (5, 25)
POINTS = 1.0


@dataclass(frozen=True)
class Shown:
    """A window, the description that it is judged by, and the truth."""

    description: str
    text: str
    fits: bool


def run() -> list[Result | NotMeasured]:
    """Points of accuracy lost against one window per prompt; negative: gained."""
    described = json.loads(os.environ.get("AUTOINTERP_JUDGE", "null"))
    described = described or {"source": "embedded:smollm2-135m-instruct"}
    config: LLMConfig = TypeAdapter(LLMConfig).validate_python(described)
    windows = balanced_windows(N_WINDOWS)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_journal(UPath(Path(folder))) as journal,
        open_llm(config, journal=journal) as llm,
    ):
        first = right(llm, windows[:: len(windows) // N_FIRST], 1).mean()
        if first < GOOD_ENOUGH:
            reason = f"{llm.identity}: accuracy {first:.2f} one at a time, wanted {GOOD_ENOUGH}"
            return [NotMeasured("accuracy lost by several windows per prompt", reason)]
        alone = right(llm, windows, 1)
        return [_loss(alone, right(llm, windows, several), several) for several in SEVERAL]


def _loss(alone: np.ndarray, together: np.ndarray, several: int) -> Result:
    lost = 100 * float((alone.astype(float) - together).mean())
    name = f"accuracy lost by {several} windows per prompt ({len(alone)} windows)"
    return Result(name, lost, POINTS, "points", is_cost=True)


def right(llm: JournaledLLM, windows: Sequence[Shown], windows_per_prompt: int) -> np.ndarray:
    """Whether each window was labelled rightly; an answer that cannot be read is wrong."""
    places: dict[int, list[int]] = {}
    requests = []
    for description in RULES:
        mine = [i for i, window in enumerate(windows) if window.description == description]
        for start in range(0, len(mine), windows_per_prompt):
            group = mine[start : start + windows_per_prompt]
            requests.append(_request([windows[i] for i in group], windows_per_prompt))
            places[id(requests[-1])] = group
    is_right = np.zeros(len(windows), dtype=bool)
    for request, completion in llm.answer(requests):
        answer = LabelList(len(places[id(request)]))
        readings = answer.read(completion.text or "", completion.tokens) or []
        for i, reading in zip(places[id(request)], readings, strict=False):
            is_right[i] = reading.prediction == windows[i].fits
    return is_right


def _request(group: Sequence[Shown], windows_per_prompt: int) -> Request:
    texts = [highlight.escape(window.text) for window in group]
    chat = detection_prompt(group[0].description, texts, windows_per_prompt)
    return Request(
        messages=chat.messages,
        answer=LabelList(len(group)),
        unit=group[0].description,
        block=JournalBlock("benchmark", "none", 0),
        n_shared=chat.n_shared,
        max_tokens=16 + 4 * len(group),
    )


def balanced_windows(n: int) -> list[Shown]:
    """Windows in drawn order: for each rule as many that fit as do not."""
    texts = list(_texts())
    rng = np.random.default_rng(0)
    per_class = n // (2 * len(RULES))
    windows: list[Shown] = []
    for description, rule in RULES.items():
        fits = np.array([re.search(rule, text) is not None for text in texts])
        for value in (True, False):
            found = np.flatnonzero(fits == value)
            drawn = rng.choice(found, size=min(per_class, len(found)), replace=False)
            windows += [Shown(description, texts[i], value) for i in drawn]
    return [windows[i] for i in rng.permutation(len(windows))]


def _texts() -> Iterator[str]:
    for document in english_documents():
        words = document.text.split()
        for start in range(0, len(words) - WORDS_PER_WINDOW, WORDS_PER_WINDOW):
            yield " ".join(words[start : start + WORDS_PER_WINDOW])
