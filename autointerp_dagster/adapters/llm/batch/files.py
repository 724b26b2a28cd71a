"""Asking by file: pending requests as an OpenAI batch, and its answers into the journal.

1. An export writes lines that OpenAI's batch API and ``vllm run-batch`` read, under names that end
   in ``.part``. When all is written, what was asked goes into the store and the files get their
   names; an export that ends before leaves neither.
2. Each line's ``custom_id`` is ``<batch>-<call_id>``, so that an answer finds its question,
   whatever became of the study since.
3. An import reads answers line by line; a line that cannot be used is counted, with its reason.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from upath import UPath

from autointerp_dagster.adapters.durable import write_durably, writing
from autointerp_dagster.adapters.llm.batch.records import (
    Question,
    RecordWriter,
    new_batch,
    record_path,
)
from autointerp_dagster.adapters.llm.remote.body import body_of
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError

MAX_REQUESTS = 50_000
"""Per file, as OpenAI takes them."""
MAX_BYTES = 200_000_000
"""Likewise."""


@dataclass(frozen=True, slots=True)
class BatchFile:
    """One file of questions to one model."""

    path: Path
    batch: str
    """Eight hexadecimal digits; names what was asked in the store."""
    config: RemoteLLMConfig
    """The model."""
    n_requests: int
    n_bytes: int


class BatchWriter:
    """Writes questions into as many files as models and limits make it. A context manager.

    The files have their names, and what they ask is in the store, once the context ends without an
    error; after one, nothing is left of any.
    """

    def __init__(
        self,
        root: UPath,
        study: str,
        paths: Iterator[Path],
        *,
        max_requests: int = MAX_REQUESTS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Nothing is written yet.

        Args:
            root: The store.
            study: Its name.
            paths: Where the files go, one after the other.
            max_requests: Per file.
            max_bytes: Per file; a request that is larger by itself gets a file of its own.
        """
        self._root, self._study, self._paths = root, study, paths
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._open: dict[str, _OpenFile] = {}
        """By model."""
        self._begun: list[_OpenFile] = []
        self.files: list[BatchFile] = []
        """Empty before the context has ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Names the files; after an error, also one of its own, it drops them instead."""
        is_whole = False
        try:
            if error is None:
                for file in self._begun:
                    file.close()  # before the first name: a full disk shows here
                for file in self._begun:
                    file.commit()
                self.files = [file.described for file in self._begun]
                is_whole = True
        finally:
            if not is_whole:
                for file in self._begun:
                    file.drop()

    def add(self, question: Question, config: RemoteLLMConfig, identity: str) -> None:
        """Write one question, or only note the block where its file holds it for another.

        Args:
            question: The question.
            config: The model that is asked.
            identity: The model's, as in every ``call_id``.

        Raises:
            StoreError: If a file of that name exists, or a file or the store cannot be written.
        """
        file = self._open.get(identity)
        if file is not None and question.call_id in file.call_ids:
            file.note(question)
            return
        path, body = body_of(question.request, config)
        # All ids of batches are equally long, so a line's length is known before its file is.
        line = _line("0" * 8, question.call_id, path, body)
        if file is not None and not self._has_room(file, len(line)):
            file.close()
            file = None
        if file is None:
            file = self._begin(config, identity)
        file.add(question, _line(file.batch, question.call_id, path, body))

    def _begin(self, config: RemoteLLMConfig, identity: str) -> "_OpenFile":
        about = {"study": self._study, "identity": identity, "config": config.model_dump()}
        batch = new_batch(self._root, {file.batch for file in self._begun})
        file = _OpenFile(record_path(self._root, batch), batch, next(self._paths), config, about)
        self._open[identity] = file
        self._begun.append(file)  # before it is on the disk, or nobody would drop it
        file.open()
        return file

    def _has_room(self, file: "_OpenFile", n_bytes: int) -> bool:
        return file.n_requests < self._max_requests and file.n_bytes + n_bytes <= self._max_bytes


class _OpenFile:
    """A batch file under way, with its record of what was asked beside it."""

    def __init__(
        self,
        target: UPath,
        batch: str,
        path: Path,
        config: RemoteLLMConfig,
        about: Mapping[str, Any],
    ) -> None:
        check_free(path)
        self.batch = batch
        self._target, self._path, self._config = target, path, config
        about = {**about, "file": str(path.absolute())}
        self._part = path.with_name(f"{path.name}.part")
        self._record_part = path.with_name(f"{path.name}.record.part")
        self._lines: BinaryIO | None = None
        self._record: RecordWriter | None = RecordWriter(about)
        self._is_committing = self._is_named = False
        self.n_requests = self.n_bytes = 0
        self.call_ids: set[str] = set()
        """Of its lines."""

    @property
    def described(self) -> BatchFile:
        return BatchFile(self._path, self.batch, self._config, self.n_requests, self.n_bytes)

    def open(self) -> None:
        with _writing(self._path):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._lines = self._part.open("wb")

    def add(self, question: Question, line: bytes) -> None:
        assert self._lines is not None  # opened at once
        with _writing(self._path):
            self._lines.write(line)
        self.note(question)
        self.call_ids.add(question.call_id)
        self.n_requests += 1
        self.n_bytes += len(line)

    def note(self, question: Question) -> None:
        """That the answer to a line is wanted in this question's block."""
        assert self._record is not None  # still open
        self._record.add(question)

    def close(self) -> None:
        """The lines and their record are on the disk, under names that nobody reads."""
        if self._record is None or self._lines is None:
            return
        with _writing(self._path):
            self._lines.close()
            self._record_part.write_bytes(self._record.finish())
        self._record = None
        self.call_ids = set()

    def commit(self) -> None:
        """The record first: a file with a name can be answered."""
        self._is_committing = True
        with writing(self._target.parent, self._target.name):
            write_durably(self._target, self._record_part.read_bytes())
        check_free(self._path)  # somebody else may have taken it meanwhile
        with _writing(self._path):
            self._part.replace(self._path)
            self._is_named = True
            self._record_part.unlink()

    def drop(self) -> None:
        """Nothing is left, as far as the disk lets go of it."""
        if self._lines is not None:
            with suppress(OSError):  # what was not written yet may not fit
                self._lines.close()
        named = (self._path,) if self._is_named else ()
        for path in (self._part, self._record_part, *named):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if self._is_committing:
            with suppress(OSError):
                self._target.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Writing a file of questions, which is in no store.

    Raises:
        StoreError: If it cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StoreError(f"{path}: cannot be written: {reason}.") from error


def check_free(path: Path) -> None:
    """Raises StoreError if there is a file of this name, or nobody can tell."""
    with _writing(path):
        if path.exists():
            raise StoreError(f"{path}: exists already. Name another file with --out.")


def check_series_free(first: Path) -> None:
    """Raises StoreError if there is any file that an export to ``first`` may need."""
    check_free(first)
    with _writing(first):
        beside = sorted(first.parent.iterdir()) if first.parent.is_dir() else []
    numbered = re.compile(rf"{re.escape(first.stem)}-\d+{re.escape(first.suffix)}")
    for path in beside:
        if numbered.fullmatch(path.name):
            check_free(path)


def numbered_paths(first: Path) -> Iterator[Path]:
    """``first``, then the same with ``-2``, ``-3``, ... before its suffix."""
    number = 1
    while True:
        yield first if number == 1 else first.with_stem(f"{first.stem}-{number}")
        number += 1


def free_paths(first: Path) -> Iterator[Path]:
    """Those of :func:`numbered_paths` that neither exist nor have a file of answers."""
    return (p for p in numbered_paths(first) if not (p.exists() or answers_path(p).exists()))


def answers_path(path: Path) -> Path:
    """Where the answers to a file are expected."""
    return path.with_name(f"{path.stem}-answers.jsonl")


def _line(batch: str, call_id: str, path: str, body: Mapping[str, Any]) -> bytes:
    content = {
        "custom_id": f"{batch}-{call_id}",
        "method": "POST",
        "url": f"/v1{path}",
        "body": body,
    }
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"
