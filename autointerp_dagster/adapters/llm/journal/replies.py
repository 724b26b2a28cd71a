"""A block's sealed replies: an index in memory and columns, of which a lookup decodes one row.

Where memory is short the columns move to a file without a name; lookups do not notice.
Where a call was answered more than once, the earliest answer counts, for everybody and for good.
"""

from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.journal.entries import Entry, messages_of
from autointerp_dagster.adapters.llm.journal.segments import REPLY_SCHEMA, read_each, read_replies
from autointerp_dagster.adapters.llm.journal.spill import mapped
from autointerp_dagster.adapters.llm.journal.templates import TemplateStore
from autointerp_dagster.core.llm import Token, Usage

_BYTES_PER_KEY = 300
"""Of the index: a 32-character string, a tuple, a place in a dictionary, a time."""
_BYTES_PER_TEXT = 60
"""Of a string, besides what it says."""


Place = tuple["ReplyBatch", int]
"""A batch and a row of it; decoding waits until it is wanted."""


class _Texts(NamedTuple):
    """A column of strings, each distinct one once."""

    codes: np.ndarray
    """Per row the index into ``distinct``; -1, the last, for null."""
    distinct: list[str | None]

    @classmethod
    def of(cls, column: pa.Array) -> "_Texts":
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return cls(codes, [*encoded.dictionary.to_pylist(), None])


class _Columns(NamedTuple):
    """What a reply is decoded from; larger items first, see :func:`.spill.mapped`."""

    numbers: np.ndarray
    """Per row: text, finish reason, counts, and where its tokens and candidates are."""
    usd: np.ndarray
    token_logprobs: np.ndarray
    top_logprobs: np.ndarray
    token_codes: np.ndarray
    top_codes: np.ndarray
    n_top: np.ndarray


class ReplyBatch:
    """Some replies, row by row."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        """Take over the columns of :data:`REPLY_SCHEMA`; strings may be dictionary-encoded."""
        self.call_ids: list[str] = batch["call_id"].to_pylist()
        self._time = batch["time"]
        text, finish_reason = _Texts.of(batch["text"]), _Texts.of(batch["finish_reason"])
        self._texts, self._finish_reasons = text.distinct, finish_reason.distinct
        tokens, tops = batch["token_text"], batch["top_text"]
        token_offsets, top_offsets = tokens.offsets.to_numpy(), tops.offsets.to_numpy()
        has_tokens = tokens.is_valid().to_numpy(zero_copy_only=False)
        numbers = np.column_stack(
            [
                text.codes,
                finish_reason.codes,
                *(batch[name].to_numpy() for name in _COUNTS),
                np.where(has_tokens, token_offsets[:-1], -1),
                token_offsets[1:],
                top_offsets[:-1],
                top_offsets[1:],
            ]
        )
        token_codes, self._token_texts = _Texts.of(tokens.values)
        top_codes, self._top_texts = _Texts.of(tops.values)
        self._columns = _Columns(
            numbers=numbers,
            usd=batch["usd"].to_numpy(),
            token_logprobs=batch["token_logprob"].values.to_numpy(),
            top_logprobs=batch["top_logprob"].values.to_numpy(),
            token_codes=token_codes,
            top_codes=top_codes,
            n_top=batch["n_top"].values.to_numpy(),
        )
        self.column_bytes = sum(column.nbytes for column in self._columns)
        """Of memory that :meth:`move_to_disk` frees."""
        self.n_bytes = self.column_bytes + _BYTES_PER_KEY * batch.num_rows
        """About what it takes in memory before that."""
        for texts in (self._texts, self._token_texts, self._top_texts):
            self.n_bytes += sum(map(len, filter(None, texts))) + _BYTES_PER_TEXT * len(texts)

    def move_to_disk(self, folder: Path) -> None:
        """Keep the columns in a file without a name. Others may decode replies meanwhile.

        Raises:
            OSError: If it cannot be written; the columns stay in memory.
        """
        self._columns = _Columns(*mapped(self._columns, folder))

    def time(self, row: int) -> str:
        """When the call was answered, ISO 8601 in UTC."""
        return self._time[row].as_py()

    def reply(self, row: int) -> Reply:
        """One reply, decoded."""
        columns = self._columns
        text, finish_reason, prompt, cached, completion, estimated, *places = columns.numbers[
            row
        ].tolist()
        return Reply(
            self._texts[text],
            self._finish_reasons[finish_reason],  # pyright: ignore[reportArgumentType] # not null
            self._tokens(columns, *places),
            Usage(prompt, cached, completion, float(columns.usd[row]), estimated),
        )

    def _tokens(
        self, columns: _Columns, start: int, stop: int, first: int, last: int
    ) -> tuple[Token, ...] | None:
        if start < 0:
            return None
        texts, top_texts = self._token_texts, self._top_texts
        candidates = zip(
            map(top_texts.__getitem__, columns.top_codes[first:last].tolist()),
            columns.top_logprobs[first:last].tolist(),
            strict=True,
        )
        return tuple(
            [
                Token(texts[code], logprob, tuple(islice(candidates, n_top)))  # pyright: ignore[reportArgumentType] # not null
                for code, logprob, n_top in zip(
                    columns.token_codes[start:stop].tolist(),
                    columns.token_logprobs[start:stop].tolist(),
                    columns.n_top[start:stop].tolist(),
                    strict=True,
                )
            ]
        )


_REST = ["model", "parameters", "template", "roles", "contents", "prompt"]
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "estimated_tokens")


class BlockReplies:
    """The sealed replies of one block, by call."""

    def __init__(self) -> None:
        """Start with none."""
        self._places: dict[str, Place] = {}
        self._in_memory: list[ReplyBatch] = []
        self.n_bytes = 0
        """About what it takes in memory."""

    @classmethod
    def read(cls, folder: UPath) -> "BlockReplies":
        """All segments in a block's folder.

        Raises:
            StoreError: If a segment cannot be read.
        """
        block = cls()
        for batches in read_each(folder, read_replies):
            for batch in batches:
                block.add(ReplyBatch(batch))
        return block

    def get(self, call_id: str) -> Place | None:
        """Where the reply to a call is, if it is sealed; see :meth:`ReplyBatch.reply`."""
        return self._places.get(call_id)

    def add(self, replies: ReplyBatch) -> None:
        """Take over sealed replies."""
        self.n_bytes += replies.n_bytes
        self._in_memory.append(replies)
        places = dict(zip(replies.call_ids, _places(replies), strict=True))
        if len(places) == len(replies.call_ids) and self._places.keys().isdisjoint(places):
            self._places.update(places)
        else:
            self._settle(replies)

    def move_to_disk(self, folder: Path) -> None:
        """Free memory: all but the index goes to a file without a name.

        Others may look up and decode meanwhile, but not add.

        Raises:
            OSError: If it cannot be written; what is left stays in memory.
        """
        while self._in_memory:
            replies = self._in_memory[-1]
            replies.move_to_disk(folder)
            self._in_memory.pop()
            self.n_bytes -= replies.column_bytes

    def counts(self, replies: ReplyBatch) -> np.ndarray:
        """Whether each of some replies that were added is the one that counts for its call."""
        held = map(self._places.__getitem__, replies.call_ids)
        return np.array(
            [batch is replies and at == row for row, (batch, at) in enumerate(held)],
            dtype=bool,
        )

    def _settle(self, replies: ReplyBatch) -> None:
        for call_id, place in zip(replies.call_ids, _places(replies), strict=True):
            other = self._places.get(call_id)
            if other is None or _rank(place) < _rank(other):
                self._places[call_id] = place


def batches_of(calls: pa.Table) -> Iterator[ReplyBatch]:
    """The replies of calls, in their order; columns beyond :data:`REPLY_SCHEMA` are ignored."""
    for batch in calls.select(REPLY_SCHEMA.names).to_batches():
        yield ReplyBatch(batch)


def entry_of(call: pa.Table, templates: TemplateStore) -> Entry:
    """The entry in a table of one row with all columns of a segment.

    Raises:
        StoreError: If its template cannot be read.
    """
    (replies,) = batches_of(call)
    (row,) = call.select(_REST).to_pylist()
    shared = () if row["template"] is None else templates.get(row["template"])
    own = messages_of(list(zip(row["roles"], row["contents"], strict=True)))
    return Entry(
        call_id=replies.call_ids[0],
        model=row["model"],
        messages=shared + own,
        parameters=row["parameters"],
        reply=replies.reply(0),
        time=replies.time(0),
        prompt=row["prompt"],
        n_shared=len(shared),
    )


def _places(replies: ReplyBatch) -> Iterator[Place]:
    return zip(repeat(replies), range(len(replies.call_ids)))  # the first is endless


def _rank(place: Place) -> tuple[str, str]:
    """Of several answers to one call, the one of the lowest rank counts."""
    replies, row = place
    return replies.time(row), repr(replies.reply(row))
