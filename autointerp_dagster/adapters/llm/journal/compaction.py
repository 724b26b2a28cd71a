"""Compaction: many small segments of a block become few, whoever reads or writes meanwhile.

1. Choose segments of about one size (``due``) or all (``everything``).
2. Write their calls as one segment; of several answers to a call only the earliest.
3. Once that is durable, delete the others.

Killed anywhere, this leaves calls that are there twice, never calls that are gone. The same holds
for two compactors at once: what one deletes is in a segment of its own, and whoever deletes that
one has written its calls again.
"""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files, remove
from autointerp_dagster.adapters.llm.journal.replies import BlockReplies, ReplyBatch
from autointerp_dagster.adapters.llm.journal.segments import (
    ROWS_PER_GROUP,
    in_order,
    opened,
    put_segment,
    read_replies,
    segment_writer,
)

MERGE_FROM = 16
"""Segments of one size class before they are merged; a class spans a factor of 16 in bytes, so a
call is rewritten once per factor of 16."""
MAX_BYTES = 256 * 2**20
"""A merged segment is no larger, unless one of its parts was."""
_GROUP_BYTES = 64 * 2**20


class SizedSegment(NamedTuple):
    """A segment before it is opened."""

    path: UPath
    n_bytes: int
    """On disk."""


Rule = Callable[[list[SizedSegment]], list[list[SizedSegment]]]
"""Which segments of a block should each become one."""


def due(segments: list[SizedSegment]) -> list[list[SizedSegment]]:
    """Every size class that has at least :data:`MERGE_FROM` segments."""
    classes: dict[int, list[SizedSegment]] = defaultdict(list)
    for segment in segments:
        classes[math.frexp(segment.n_bytes)[1] // 4].append(segment)
    full = [members for members in classes.values() if len(members) >= MERGE_FROM]
    return [group for members in full for group in _within_limit(members)]


def everything(segments: list[SizedSegment]) -> list[list[SizedSegment]]:
    """All segments, in as few groups as :data:`MAX_BYTES` allows."""
    return _within_limit(segments)


def compact(folder: UPath, rule: Rule) -> None:
    """Merge a block's segments where ``rule`` says so. Whoever does the same meanwhile is no harm.

    Raises:
        StoreError: If a segment cannot be read; nothing that was in it is deleted.
        OSError: If the store cannot be written.
    """
    try:
        for group in rule(_sized(folder)):
            _merge(folder, [segment.path for segment in group])
    except FileNotFoundError:  # another process compacts this block
        return


def _within_limit(segments: list[SizedSegment]) -> list[list[SizedSegment]]:
    groups: list[list[SizedSegment]] = [[]]
    n_bytes = 0
    for segment in segments:
        if n_bytes + segment.n_bytes > MAX_BYTES and groups[-1]:
            groups.append([])
            n_bytes = 0
        groups[-1].append(segment)
        n_bytes += segment.n_bytes
    return [group for group in groups if len(group) > 1]


def _sized(folder: UPath) -> list[SizedSegment]:
    found = sorted(list_files(folder, "").items())
    return [
        SizedSegment(folder / name, f.n_bytes) for name, f in found if name.endswith(".parquet")
    ]


def _merge(folder: UPath, parts: list[UPath]) -> None:
    sink = io.BytesIO()
    with segment_writer(sink) as writer:
        for calls in _row_groups(_surviving(parts)):
            writer.write_table(in_order(calls), row_group_size=ROWS_PER_GROUP)
    merged = put_segment(folder, sink)
    files, names = list_files(folder, ""), {part.name for part in parts} - {merged.name}
    remove(folder, {name: files[name] for name in names & files.keys()})


def _surviving(parts: list[UPath]) -> Iterator[pa.Table]:
    """The calls of all parts, each call once, in bounded pieces."""
    block = BlockReplies()
    batches: list[list[ReplyBatch]] = []
    for part in parts:
        batches.append([ReplyBatch(batch) for batch in read_replies(part)])
        for replies in batches[-1]:
            block.add(replies)
    for part, in_part in zip(parts, batches, strict=True):
        keep = np.concatenate([block.counts(replies) for replies in in_part])
        start = 0
        with opened(part) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
                stop = start + batch.num_rows
                yield pa.Table.from_batches([batch]).filter(pa.array(keep[start:stop]))
                start = stop


def _row_groups(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables that are worth a row group of their own."""
    gathered: list[pa.Table] = []
    for piece in (piece for piece in pieces if piece.num_rows):
        gathered.append(piece)
        n_rows = sum(table.num_rows for table in gathered)
        if n_rows >= ROWS_PER_GROUP or sum(table.nbytes for table in gathered) >= _GROUP_BYTES:
            yield pa.concat_tables(gathered)
            gathered = []
    if gathered:
        yield pa.concat_tables(gathered)
