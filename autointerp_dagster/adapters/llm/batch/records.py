"""What was asked by file, as the store keeps it: ``batches/<batch>.parquet``.

Beside it, ``batches/<batch>.<digest>.failed`` names the questions that an import found without an
answer, as bytes of their ids: those are to be asked again, the others may still be answered.
"""

import hashlib
import io
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files, look_at, read_files
from autointerp_dagster.adapters.durable import (
    here,
    is_damage,
    read_whole,
    reading,
    write_durably,
    writing,
)
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import (
    Answer,
    Choice,
    Continuation,
    FreeText,
    IntegerList,
    JournalBlock,
    LabelList,
    Message,
    PromptScores,
    Request,
)

_FOLDER = "batches"
_ROWS_AT_ONCE = 1024
_ID_BYTES = 16
"""Of a ``call_id``, which is written in hexadecimal digits."""
_ANSWERS: Mapping[str, Callable[..., Answer]] = {
    kind.__name__: kind
    for kind in (FreeText, LabelList, IntegerList, Choice, Continuation, PromptScores)
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
"""Of ``batches/<batch>.parquet``; ``shared`` and ``own`` are messages as JSON. Model, prices, study
and file are in the metadata."""
_ABOUT = b"autointerp_batch"
_BATCH = re.compile(r"[0-9a-f]{8}")


class Question(NamedTuple):
    """One call that was asked by file."""

    call_id: str
    request: Request


class RecordWriter:
    """Makes the record of a batch, in memory: compressed, it is much smaller than its file."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        """Start the record.

        Args:
            about: ``study``, ``identity``, ``config`` and ``file``.
        """
        schema = _SCHEMA.with_metadata({_ABOUT: json.dumps(about).encode()})
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, question: Question) -> None:
        """Write one question."""
        self._rows.append(_row_of(question))
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def finish(self) -> memoryview:
        """The whole record."""
        self._flush()
        self._writer.close()
        return self._sink.getbuffer()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
        self._rows = []


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch file asked, as the store keeps it."""

    root: UPath
    name: str
    study: str
    identity: str
    """The model's, as it was."""
    config: RemoteLLMConfig
    """As it was; its prices count."""
    _table: pa.Table = field(repr=False)
    _rows_of: dict[str, list[int]] = field(repr=False)

    @classmethod
    def find(cls, roots: Iterable[UPath], batch: str) -> "Batch | None":
        """The record of a batch in the first of some stores that has it; null if none has.

        Raises:
            StoreError: If it cannot be read.
        """
        if _BATCH.fullmatch(batch) is None:  # it becomes a part of a path
            return None
        for root in roots:
            path = record_path(root, batch)
            if look_at(root, f"{_FOLDER}/{path.name}") is not None:
                return cls._read(root, batch, path)
        return None

    @classmethod
    def _read(cls, root: UPath, name: str, path: UPath) -> "Batch":
        with reading(root, f"{_FOLDER}/{path.name}"):
            content = read_whole(path)
        with _decoding(path):
            table = pq.read_table(io.BytesIO(content))
            about = json.loads((table.schema.metadata or {})[_ABOUT])
            config = RemoteLLMConfig.model_validate(about["config"])
            rows_of: dict[str, list[int]] = {}
            for row, call_id in enumerate(table["call_id"].to_pylist()):
                rows_of.setdefault(call_id, []).append(row)
            return cls(root, name, about["study"], about["identity"], config, table, rows_of)

    def __len__(self) -> int:
        return self._table.num_rows

    def questions(self, call_id: str) -> list[Question]:
        """What was asked under an id, once for each block that asked; empty if nothing was."""
        rows = self._rows_of.get(call_id, ())
        return [_question_of(self._table.slice(row, 1).to_pylist()[0]) for row in rows]


class Outstanding:
    """The questions of every batch of a store that no import has found without an answer.

    Some may be in the journal by now. Takes 20 bytes per question.
    """

    def __init__(self, root: UPath) -> None:
        """Read the ids of every batch.

        Raises:
            StoreError: If a record cannot be read.
        """
        files = sorted(list_files(root, _FOLDER))
        paths = [path for path in files if path.endswith(".parquet")]
        self._names: list[str] = []
        """How people know a batch: its name and file."""
        ids, owners = [np.empty(0, _ID)], [np.empty(0, np.uint32)]
        for number, path in enumerate(paths):
            failed = [f for f in files if f.endswith(".failed") and f.startswith(path[:-7])]
            came_back = [ids for _, ids in read_files(root, failed) if ids]
            with reading(root, path), here(root / path) as file, _decoding(root / path):
                name, mine = _ids_of(Path(path).stem, file, came_back)
            self._names.append(name)
            ids.append(mine)
            owners.append(np.full(len(mine), number, np.uint32))
        every = np.concatenate(ids)
        order = np.argsort(every, kind="stable")
        self._ids, self._owners = every[order], np.concatenate(owners)[order]

    def batch_of(self, question: Question) -> str | None:
        """Name and file of the batch that asked for the same block of the journal.

        Null if none did, or it came back without an answer.
        """
        block = question.request.block
        place_id = _place_id(question.call_id, block.stage, block.coder_hash, block.block)
        asked = np.array([place_id], _ID)[0]
        place = int(np.searchsorted(self._ids, asked))
        is_there = place < len(self._ids) and self._ids[place] == asked
        return self._names[int(self._owners[place])] if is_there else None


def note_failed(root: UPath, batch: str, call_ids: Collection[str]) -> None:
    """Keeps that questions of a batch came back without an answer.

    Raises:
        StoreError: If the store cannot be written.
    """
    content = b"".join(sorted(bytes.fromhex(call_id) for call_id in call_ids))
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    path = f"{_FOLDER}/{batch}.{digest}.failed"
    with writing(root, path):
        write_durably(root / path, content)


def split_custom_id(custom_id: str) -> tuple[str, str] | None:
    """Batch and call of a line's ``custom_id``; null if this package did not write it."""
    batch, _, call_id = custom_id.partition("-")
    return (batch, call_id) if _BATCH.fullmatch(batch) and call_id else None


def record_path(root: UPath, batch: str) -> UPath:
    """Where the record of a batch is."""
    return root / _FOLDER / f"{batch}.parquet"


def new_batch(root: UPath, taken: Collection[str]) -> str:
    """A name that no batch of the store has, and none of ``taken``."""
    while True:
        batch = secrets.token_hex(4)
        name = record_path(root, batch).name
        if batch not in taken and look_at(root, f"{_FOLDER}/{name}") is None:
            return batch


_ID = np.dtype(f"S{_ID_BYTES}")
"""Padded with zeros, which numpy drops from both sides of a comparison."""


def _ids_of(batch: str, path: Path, failed: Iterable[bytes]) -> tuple[str, np.ndarray]:
    """How people know a batch, and the ids of its questions that did not fail."""
    table = pq.read_table(path, columns=["call_id", "stage", "coder_hash", "block"])
    about = json.loads((table.schema.metadata or {})[_ABOUT])
    calls = _as_ids(bytes.fromhex("".join(table["call_id"].to_pylist())))
    columns = [column.to_pylist() for column in table.columns]
    asked = _as_ids(b"".join(_place_id(*row) for row in zip(*columns, strict=True)))
    for ids in failed:
        is_open = ~np.isin(calls, _as_ids(ids))
        calls, asked = calls[is_open], asked[is_open]
    file_name = about.get("file")
    return (f"{batch} ({file_name})" if file_name else batch), asked


def _place_id(call_id: str, stage: str, coder_hash: str, block: int) -> bytes:
    """Of a call in a block of the journal; the same call may be wanted in several."""
    place = f"{call_id}/{stage}/{coder_hash}/{block}"
    return hashlib.blake2b(place.encode(), digest_size=_ID_BYTES).digest()


def _as_ids(content: bytes) -> np.ndarray:
    return np.frombuffer(content, _ID)


@contextmanager
def _decoding(path: UPath) -> Iterator[None]:
    """Making something of a record's bytes; a system that cannot read them now is passed on."""
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if not is_damage(error):
            raise
        raise StoreError(
            f"{path}: not a readable record of a batch ({type(error).__name__}). Restore it "
            "from a copy of the store, or delete it, export and ask again."
        ) from error


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
