"""Asking by file: pending requests as an OpenAI batch, and its answers into the journal.

1. An export writes lines that OpenAI's batch API and ``vllm run-batch`` read. What was asked is
   kept beside the journal, under ``batches/<batch>.parquet``, before the lines get their name.
2. Each line's ``custom_id`` is ``<batch>-<call_id>``, so that an answer finds its question,
   whatever became of the study since.
3. An import reads answers line by line; a line that cannot be used is counted, with its reason.
"""

import io
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from autointerp_dagster.adapters.llm.journal.durable import write_durably
from autointerp_dagster.adapters.llm.remote.body import body_of
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import (
    Answer,
    Choice,
    Continuation,
    FreeText,
    JournalBlock,
    LabelList,
    Message,
    PromptScores,
    Request,
)

MAX_REQUESTS = 50_000
"""Per file, as OpenAI takes them."""
MAX_BYTES = 200_000_000
"""Likewise."""
_ROWS_AT_ONCE = 1024
_ANSWERS: Mapping[str, Callable[..., Answer]] = {
    kind.__name__: kind for kind in (FreeText, LabelList, Choice, Continuation, PromptScores)
}
_SCHEMA = pa.schema(
    {
        "call_id": pa.string(),
        "stage": pa.string(),
        "coder_hash": pa.string(),
        "block": pa.int64(),
        "shared": pa.string(),
        "own": pa.string(),
        "prompt": pa.string(),
        "parameters": pa.string(),
    }
)
"""Of ``batches/<batch>.parquet``; ``shared`` and ``own`` are messages as JSON. Model, prices and
study are in the file's metadata."""
_ABOUT = b"autointerp_batch"
_BATCH = re.compile(r"[0-9a-f]{8}")


class Question(NamedTuple):
    """One call that was asked by file."""

    call_id: str
    request: Request


@dataclass(frozen=True, slots=True)
class BatchFile:
    """One file of questions to one model."""

    path: Path
    batch: str
    """Eight hexadecimal digits; names what was asked in the store."""
    model: str
    """The name that the server knows the model by."""
    n_requests: int
    n_bytes: int


class BatchWriter:
    """Writes questions to one model into as many files as the limits make it. A context manager.

    A file has its name once it is whole and what it asks is in the store.
    """

    def __init__(
        self,
        root: UPath,
        study: str,
        config: RemoteLLMConfig,
        identity: str,
        paths: Iterator[Path],
        *,
        max_requests: int = MAX_REQUESTS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Nothing is written yet.

        Args:
            root: The store.
            study: Its name.
            config: The model.
            identity: The model's, as in every ``call_id``.
            paths: Where the files go, one after the other.
            max_requests: Per file.
            max_bytes: Per file; a request that is larger by itself gets a file of its own.
        """
        self._root = root
        self._about = {"study": study, "identity": identity, "config": config.model_dump()}
        self._config = config
        self._paths = paths
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._open: _OpenFile | None = None
        self.files: list[BatchFile] = []
        """Those that are whole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Completes the last file; after an error it is dropped instead."""
        if error is None:
            self._finish()
        elif self._open is not None:
            self._open.drop()

    def add(self, question: Question) -> None:
        """Write one question.

        Raises:
            StoreError: If a file of that name exists, or the store cannot be written.
        """
        path, body = body_of(question.request, self._config)
        # All ids of batches are equally long, so a line's length is known before its file is.
        line = _line("0" * 8, question.call_id, path, body)
        if self._open is not None and not self._has_room(self._open, len(line)):
            self._finish()
        if self._open is None:
            self._open = _OpenFile(self._root, next(self._paths), self._about)
        self._open.add(question, _line(self._open.batch, question.call_id, path, body))

    def _has_room(self, file: "_OpenFile", n_bytes: int) -> bool:
        return file.n_requests < self._max_requests and file.n_bytes + n_bytes <= self._max_bytes

    def _finish(self) -> None:
        if self._open is not None:
            file, self._open = self._open, None
            self.files.append(file.finish(self._config.model))


class _OpenFile:
    """A batch file under way, with its record of what was asked."""

    def __init__(self, root: UPath, path: Path, about: dict[str, Any]) -> None:
        if path.exists():
            raise StoreError(f"{path}: exists already. Name another file with --out.")
        self._root = root
        self.batch = _new_batch(root)
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines: BinaryIO = self._part.open("wb")
        self._record = io.BytesIO()
        schema = _SCHEMA.with_metadata({_ABOUT: json.dumps(about).encode()})
        self._writer = pq.ParquetWriter(self._record, schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self.n_requests = self.n_bytes = 0

    def add(self, question: Question, line: bytes) -> None:
        self._lines.write(line)
        self._rows.append(_row_of(question))
        self.n_requests += 1
        self.n_bytes += len(line)
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def finish(self, model: str) -> BatchFile:
        self._flush()
        self._writer.close()
        self._lines.close()
        target = _record_path(self._root, self.batch)
        try:
            write_durably(target, self._record.getbuffer())
        except OSError as error:
            raise StoreError(f"{target}: cannot be written: {error}.") from error
        self._part.replace(self._path)
        return BatchFile(self._path, self.batch, model, self.n_requests, self.n_bytes)

    def drop(self) -> None:
        self._lines.close()
        self._part.unlink(missing_ok=True)

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
        self._rows = []


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch file asked, as the store keeps it."""

    root: UPath
    study: str
    identity: str
    """The model's, as it was."""
    config: RemoteLLMConfig
    """As it was; its prices count."""
    _table: pa.Table = field(repr=False)
    _row_of: dict[str, int] = field(repr=False)

    @classmethod
    def find(cls, roots: Iterable[UPath], batch: str) -> "Batch | None":
        """The record of a batch in the first of some stores that has it; null if none has.

        Raises:
            StoreError: If it cannot be read.
        """
        if _BATCH.fullmatch(batch) is None:  # it becomes a part of a path
            return None
        for root in roots:
            path = _record_path(root, batch)
            if path.exists():
                return cls._read(root, path)
        return None

    @classmethod
    def _read(cls, root: UPath, path: UPath) -> "Batch":
        try:
            table = pq.read_table(io.BytesIO(path.read_bytes()))
            about = json.loads((table.schema.metadata or {})[_ABOUT])
            config = RemoteLLMConfig.model_validate(about["config"])
            row_of = {call_id: row for row, call_id in enumerate(table["call_id"].to_pylist())}
            return cls(root, about["study"], about["identity"], config, table, row_of)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise StoreError(
                f"{path}: not a readable record of a batch ({type(error).__name__}). Restore it "
                "from a copy of the store, or export and ask again."
            ) from error

    def __len__(self) -> int:
        return self._table.num_rows

    def question(self, call_id: str) -> Question | None:
        """What was asked under an id; null if nothing was."""
        row = self._row_of.get(call_id)
        return None if row is None else _question_of(self._table.slice(row, 1).to_pylist()[0])


def split_custom_id(custom_id: str) -> tuple[str, str] | None:
    """Batch and call of a line's ``custom_id``; null if this package did not write it."""
    batch, _, call_id = custom_id.partition("-")
    return (batch, call_id) if _BATCH.fullmatch(batch) and call_id else None


def numbered_paths(first: Path) -> Iterator[Path]:
    """``first``, then the same with ``-2``, ``-3``, ... before its suffix."""
    number = 1
    while True:
        yield first if number == 1 else first.with_stem(f"{first.stem}-{number}")
        number += 1


def _line(batch: str, call_id: str, path: str, body: Mapping[str, Any]) -> bytes:
    content = {
        "custom_id": f"{batch}-{call_id}",
        "method": "POST",
        "url": f"/v1{path}",
        "body": body,
    }
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _record_path(root: UPath, batch: str) -> UPath:
    return root / "batches" / f"{batch}.parquet"


def _new_batch(root: UPath) -> str:
    while True:
        batch = secrets.token_hex(4)
        if not _record_path(root, batch).exists():
            return batch


def _row_of(question: Question) -> dict[str, Any]:
    request = question.request
    parameters = {
        "answer": [type(request.answer).__name__, asdict(request.answer)],
        "unit": request.unit,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "top_logprobs": request.top_logprobs,
        "seed": request.seed,
        "attempt": request.attempt,
        "sample": request.sample,
    }
    return {
        "call_id": question.call_id,
        **asdict(request.block),
        "shared": _messages_text(request.messages[: request.n_shared]),
        "own": _messages_text(request.messages[request.n_shared :]),
        "prompt": request.prompt,
        "parameters": json.dumps(parameters),
    }


def _question_of(row: Mapping[str, Any]) -> Question:
    parameters: dict[str, Any] = json.loads(row["parameters"])
    kind, fields = parameters.pop("answer")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    shared, own = _messages_in(row["shared"]), _messages_in(row["own"])
    request = Request(
        messages=shared + own,
        answer=_ANSWERS[kind](**values),
        block=JournalBlock(row["stage"], row["coder_hash"], row["block"]),
        prompt=row["prompt"],
        n_shared=len(shared),
        **parameters,
    )
    return Question(row["call_id"], request)


def _messages_text(messages: Iterable[Message]) -> str:
    return json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False)


def _messages_in(text: str) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in json.loads(text))
