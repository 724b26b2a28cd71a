"""The answers of a batch file, as OpenAI and ``vllm run-batch`` write them, into the journal."""

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from upath import UPath

from autointerp_dagster.adapters.llm.backend import CallError, Reply
from autointerp_dagster.adapters.llm.batch.records import (
    Batch,
    Question,
    note_failed,
    split_custom_id,
)
from autointerp_dagster.adapters.llm.factory import open_journal
from autointerp_dagster.adapters.llm.journal.entries import Entry
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.remote.errors import RefusedError, declined
from autointerp_dagster.adapters.llm.remote.reply import reply_of
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import JournalBlock, Usage

MAX_UNSAVED = 4096
"""Answers on their way to the disk at once."""
MAX_BATCHES = 2
"""Whose questions are in memory at once: a file of answers goes through one after the other."""
MAX_SHOWN = 20
"""Faults kept with their reason; the others are counted."""
_LONGEST_REASON = 200

FindBatch = Callable[[str], Batch | None]
"""From a batch's name to what it asked; null if no store knows it."""


class Fault(NamedTuple):
    """A line that could not be used."""

    line: int
    """The first is 1."""
    reason: str
    """May quote the file: not to be trusted as markup."""


@dataclass(slots=True)
class Imported:
    """What became of the lines of a file."""

    n_recorded: int = 0
    """New in the journal."""
    n_known: int = 0
    """The journal had an answer already, which stays."""
    n_failed: int = 0
    """No answer in them; the next export asks again."""
    n_unknown: int = 0
    """Not asked from any store that was looked at."""
    usage: Usage = field(default_factory=Usage)
    """Of the answers that were recorded."""
    faults: list[Fault] = field(default_factory=list)
    """The first failed and unknown lines."""
    studies: set[str] = field(default_factory=set)
    """Whose questions were answered."""

    @property
    def n_usable(self) -> int:
        """Lines with an answer."""
        return self.n_recorded + self.n_known

    def note(self, line: int, reason: str) -> None:
        """Keep why a line was not used, if there is room."""
        if len(self.faults) < MAX_SHOWN:
            self.faults.append(Fault(line, reason[:_LONGEST_REASON]))


_Place = tuple[str, JournalBlock]
"""A call, and where its answer is kept."""


def _place(question: Question) -> _Place:
    return question.call_id, question.request.block


class _UnusableError(Exception):
    """A line without an answer; says why."""


def import_answers(lines: Iterable[bytes], find_batch: FindBatch) -> Imported:
    """Records every answer that the journal lacks.

    Args:
        lines: Of the file.
        find_batch: Asked once per batch.

    Returns:
        When everything counted as recorded is durable.

    Raises:
        StoreError: If a store cannot be read or written.
    """
    imported = Imported()
    with ExitStack() as open_journals:
        importer = _Importer(imported, find_batch, open_journals)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                importer.take(number, line)
        importer.wait(0)
        importer.note_failed()
    return imported


class _Importer:
    def __init__(self, imported: Imported, find_batch: FindBatch, opened: ExitStack) -> None:
        self._imported = imported
        self._find_batch = find_batch
        self._opened = opened
        self._batches: OrderedDict[str, Batch | None] = OrderedDict()
        self._journals: dict[UPath, Journal] = {}
        self._unsaved: deque[tuple[_Place, Future[None]]] = deque()
        self._unsaved_ids: set[_Place] = set()  # a file may hold an answer twice
        self._failed: dict[tuple[UPath, str], set[str]] = {}

    def take(self, number: int, line: bytes) -> None:
        """Use one line, or note why not."""
        try:
            content = _content_of(line)
        except _UnusableError as error:
            self._imported.n_failed += 1
            self._imported.note(number, str(error))
            return
        found = self._question(content.get("custom_id"))
        if found is None:
            self._imported.n_unknown += 1
            custom_id = content.get("custom_id")
            shown = repr(custom_id) if isinstance(custom_id, str) else "no custom_id"
            self._imported.note(number, f"asked by no store here: {shown}")
            return
        batch, questions = found
        try:
            reply = _reply(content, questions[0], batch)
        except (_UnusableError, RecursionError) as error:  # an error may be nested deeply, too
            self._imported.n_failed += 1
            self._imported.note(number, str(error))
            self._failed.setdefault((batch.root, batch.name), set()).add(questions[0].call_id)
            return
        self._record(batch, questions, reply)

    def wait(self, n_left: int) -> None:
        """Return once at most ``n_left`` answers are not yet durable."""
        while len(self._unsaved) > n_left:
            place, saved = self._unsaved.popleft()
            saved.result()
            self._unsaved_ids.discard(place)

    def note_failed(self) -> None:
        """Let the next export ask again what came back without an answer."""
        for (root, batch), call_ids in self._failed.items():
            note_failed(root, batch, call_ids)

    def _record(self, batch: Batch, questions: list[Question], reply: Reply) -> None:
        """The answer goes into every block that asked; it counts, and was paid, once."""
        journal = self._journal(batch.root)
        fresh = [question for question in questions if self._is_new(journal, question)]
        if not fresh:
            self._imported.n_known += 1
            return
        for question in fresh:
            entry = Entry.of(question.call_id, batch.identity, question.request, reply)
            place = _place(question)
            self._unsaved.append((place, journal.record(question.request.block, entry)))
            self._unsaved_ids.add(place)
        self._imported.n_recorded += 1
        self._imported.usage += reply.usage
        self._imported.studies.add(batch.study)
        self.wait(MAX_UNSAVED)

    def _is_new(self, journal: Journal, question: Question) -> bool:
        if _place(question) in self._unsaved_ids:
            return False
        return journal.lookup(question.request.block, question.call_id) is None

    def _question(self, custom_id: object) -> tuple[Batch, list[Question]] | None:
        parts = split_custom_id(custom_id) if isinstance(custom_id, str) else None
        if parts is None:
            return None
        name, call_id = parts
        batch = self._batch(name)
        questions = [] if batch is None else batch.questions(call_id)
        return (batch, questions) if batch is not None and questions else None

    def _batch(self, name: str) -> Batch | None:
        if name not in self._batches:
            if len(self._batches) >= MAX_BATCHES:
                self._batches.popitem(last=False)
            self._batches[name] = self._find_batch(name)
        self._batches.move_to_end(name)
        return self._batches[name]

    def _journal(self, root: UPath) -> Journal:
        if root not in self._journals:
            self._journals[root] = self._opened.enter_context(open_journal(root))
        return self._journals[root]


def _content_of(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError, OverflowError) as error:
        raise _UnusableError("not JSON; the file may be cut short") from error
    if not isinstance(content, dict):
        raise _UnusableError("not a JSON object")
    return content


def _reply(content: dict[str, Any], question: Question, batch: Batch) -> Reply:
    """The reply in a line; one that the server declined for good is a reply, too."""
    try:
        return _answer(content, question, batch)
    except RefusedError as refused:
        reply = declined(refused)
        if reply is not None:
            return reply
        raise _UnusableError(f"{refused.what}: {refused.words}") from refused
    except (CallError, LLMError) as problem:
        raise _UnusableError(str(problem)) from problem


def _answer(content: dict[str, Any], question: Question, batch: Batch) -> Reply:
    response, error = content.get("response"), content.get("error")
    response = response if isinstance(response, dict) else {}
    status, body = response.get("status_code"), response.get("body")
    if error is not None or status != 200:
        raise RefusedError(_status_of(status), [error, body], question.request, batch.config)
    return reply_of(body, question.request, batch.config)


def _status_of(status: object) -> int:
    """The status of a line that holds no answer; 500 where it names none."""
    return status if isinstance(status, int) and status >= 400 else 500
