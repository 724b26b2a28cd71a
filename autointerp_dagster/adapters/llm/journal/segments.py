"""Sealed journal segments: immutable Parquet files, named by their content, in one block's folder.

Layout: ``<root>/journal/<stage>/<coder_hash>/<block>/<content hash>.parquet``.
Compaction may replace segments at any time, so a reader lists, reads, and lists again.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.durable import here, is_damage, write_durably
from autointerp_dagster.adapters.llm.journal.entries import Entry
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock, Token

T = TypeVar("T")


def _list(of: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", of))  # the name that Parquet gives it


REPLY_SCHEMA = pa.schema(
    {
        "call_id": pa.string(),
        "time": pa.string(),
        "text": pa.string(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int64(),
        "cached_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "estimated_tokens": pa.int64(),
        "usd": pa.float64(),
        # The reply's tokens side by side; null where there are none. Candidates of all of them
        # follow each other, ``n_top`` says how many are each token's.
        "token_text": _list(pa.string()),
        "token_logprob": _list(pa.float64()),
        "n_top": _list(pa.int32()),
        "top_text": _list(pa.string()),
        "top_logprob": _list(pa.float64()),
    }
)
"""What a lookup needs; the prompts stay on disk."""

SCHEMA = pa.schema(
    [
        *REPLY_SCHEMA,
        pa.field("model", pa.string()),
        pa.field("parameters", pa.string()),
        pa.field("template", pa.string()),
        pa.field("roles", _list(pa.string())),
        pa.field("contents", _list(pa.string())),
        pa.field("prompt", pa.string()),
    ]
)
"""Columns of a segment."""

ROWS_PER_GROUP = 8192
_ITEM = ".list.element"
_PLAIN = {"call_id", "time", "contents", "prompt", "token_logprob", "top_logprob"}
_MAX_LISTINGS = 100
_DICTIONARY_BYTES = 2**30  # never given up half-way: Arrow could not read such a nested column


def _leaf(field: pa.Field) -> str:
    return f"{field.name}{_ITEM}" if pa.types.is_list(field.type) else field.name


_DICTIONARY_READ = ["text", "finish_reason", f"token_text{_ITEM}", f"top_text{_ITEM}"]
_DICTIONARY = [_leaf(field) for field in SCHEMA if field.name not in _PLAIN]
_FLOATS = [f"token_logprob{_ITEM}", f"top_logprob{_ITEM}"]


def table_of(entries: list[Entry], templates: list[str | None]) -> pa.Table:
    """Entries as rows of a segment, in their order.

    Args:
        entries: The calls.
        templates: For each the address of its shared messages, or null.
    """
    replies = [entry.reply for entry in entries]
    usages = [reply.usage for reply in replies]
    own = [entry.own for entry in entries]
    arrays: dict[str, Any] = {
        "call_id": [entry.call_id for entry in entries],
        "time": [entry.time for entry in entries],
        "text": [reply.text for reply in replies],
        "finish_reason": [reply.finish_reason for reply in replies],
        "prompt_tokens": [usage.prompt_tokens for usage in usages],
        "cached_tokens": [usage.cached_tokens for usage in usages],
        "completion_tokens": [usage.completion_tokens for usage in usages],
        "estimated_tokens": [usage.estimated_tokens for usage in usages],
        "usd": [usage.usd for usage in usages],
        **_token_columns([reply.tokens for reply in replies]),
        "model": [entry.model for entry in entries],
        "parameters": [entry.parameters for entry in entries],
        "template": templates,
        "roles": [[message.role for message in messages] for messages in own],
        "contents": [[message.content for message in messages] for messages in own],
        "prompt": [entry.prompt for entry in entries],
    }
    return pa.Table.from_pydict(arrays, schema=SCHEMA)


def write_segment(folder: UPath, calls: pa.Table) -> UPath:
    """Write calls as one segment of a block and return its path once it is durable.

    The same calls give the same name, so writing them twice leaves one segment.

    Raises:
        OSError: If it cannot be written.
    """
    sink = io.BytesIO()
    with segment_writer(sink) as writer:
        writer.write_table(in_order(calls), row_group_size=ROWS_PER_GROUP)
    return put_segment(folder, sink)


@contextmanager
def segment_writer(sink: io.BytesIO) -> Iterator[pq.ParquetWriter]:
    """A writer of tables with :data:`SCHEMA`, each of which becomes its own row groups."""
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression="zstd",
        compression_level=3,
        dictionary_pagesize_limit=_DICTIONARY_BYTES,
        use_dictionary=_DICTIONARY,  # pyright: ignore[reportArgumentType] # names are taken too
        column_encoding=dict.fromkeys(_FLOATS, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        yield writer


def put_segment(folder: UPath, content: io.BytesIO) -> UPath:
    """Keep a finished file under the name of its content; return its path once it is durable."""
    view = content.getbuffer()
    target = folder / f"{hashlib.blake2b(view, digest_size=16).hexdigest()}.parquet"
    write_durably(target, view)
    return target


def in_order(calls: pa.Table) -> pa.Table:
    """Calls of a unit next to each other, so that what their prompts share compresses well."""
    return calls.take(
        pc.sort_indices(  # pyright: ignore[reportAttributeAccessIssue] # made at run time
            calls, [("parameters", "ascending"), ("call_id", "ascending")]
        )
    )


def block_folder(root: UPath, block: JournalBlock) -> UPath:
    """Where a block's segments lie."""
    return root / "journal" / block.stage / block.coder_hash / str(block.block)


def block_folders(root: UPath) -> list[UPath]:
    """The folders of all blocks that have segments, by name."""
    folders = {str(path.parent): path.parent for path in _listed(root / "journal")}
    return [folders[name] for name in sorted(folders)]


def segments_of(folder: UPath) -> list[UPath]:
    """A block's segments as of now, by name; none if there is no such folder."""
    return sorted(_listed(folder), key=str)


def read_each(folder: UPath, read: Callable[[UPath], T]) -> list[T]:
    """What ``read`` makes of every segment below a folder.

    A segment that was replaced while this ran may be read as well as its replacement.

    Raises:
        StoreError: If a segment cannot be read.
    """
    seen: set[str] = set()
    results: list[T] = []
    for _ in range(_MAX_LISTINGS):
        new = [path for path in segments_of(folder) if str(path) not in seen]
        if not new:
            return results
        for path in new:
            seen.add(str(path))
            with suppress(FileNotFoundError):  # compacted: its replacement is in the next listing
                results.append(read(path))
    raise StoreError(
        f"{folder}: got new segments at each of {_MAX_LISTINGS} listings. Try again later."
    )


def read_replies(path: UPath) -> list[pa.RecordBatch]:
    """The columns that a lookup needs, row group by row group.

    Raises:
        FileNotFoundError: If there is no such segment any more.
        StoreError: If it cannot be read.
    """
    with opened(path, _DICTIONARY_READ) as file:
        groups = range(file.num_row_groups)
        tables = [file.read_row_group(group, columns=REPLY_SCHEMA.names) for group in groups]
    return [batch for table in tables for batch in table.to_batches()]


def read_call(path: UPath, call_id: str) -> pa.Table:
    """The rows of one call, usually one or none; raises as :func:`read_replies`."""
    with opened(path) as file:
        start = 0
        row = pc.index(file.read(columns=["call_id"])["call_id"], call_id).as_py()
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            if start <= row < stop:
                return file.read_row_group(group).slice(row - start, 1)
            start = stop
    return SCHEMA.empty_table()


@contextmanager
def opened(path: UPath, dictionary: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """A segment open for reading; raises as :func:`read_replies`.

    Args:
        path: The segment.
        dictionary: Columns to read as dictionary-encoded.
    """
    try:
        with (
            _copied(path) as copy,
            copy.open("rb") as file,
            pq.ParquetFile(
                file, read_dictionary=list(dictionary), page_checksum_verification=True
            ) as segment,
        ):
            yield segment
    except FileNotFoundError:
        raise
    except (OSError, KeyError, pa.ArrowException) as error:  # KeyError: other columns than ours
        if not is_damage(error):
            raise _unreachable(path, error) from error
        raise StoreError(
            f"{path}: not a readable journal segment ({error}). Delete it to pay again."
        ) from error


@contextmanager
def _copied(path: UPath) -> Iterator[Path]:
    """A segment on this machine, so that what fails on its way is not taken for damage."""
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(here(path))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreachable(path, error) from error
        yield copy


def _listed(folder: UPath) -> list[UPath]:
    try:
        return [folder / path for path in list_files(folder, "") if path.endswith(".parquet")]
    except StoreError as error:
        raise _unreachable(folder, error) from error


def _unreachable(path: UPath, error: Exception) -> StoreError:
    what = str(error) if isinstance(error, OSError | StoreError) else type(error).__name__
    return StoreError(
        f"{path}: the journal cannot be read ({what}). Run again when the store answers; nothing "
        "is paid twice."
    )


def _token_columns(replies: list[tuple[Token, ...] | None]) -> dict[str, pa.Array]:
    tokens = [token for reply in replies for token in reply or ()]
    tops = [token.top for token in tokens]
    has_none = [reply is None for reply in replies]
    starts = [0, *accumulate(len(reply or ()) for reply in replies)]
    top_ends = [0, *accumulate(len(top) for top in tops)]
    top_starts = [top_ends[start] for start in starts]
    candidates = list(chain.from_iterable(tops))
    columns = {
        "token_text": (starts, [token.text for token in tokens]),
        "token_logprob": (starts, [token.logprob for token in tokens]),
        "n_top": (starts, [len(top) for top in tops]),
        "top_text": (top_starts, [text for text, _ in candidates]),
        "top_logprob": (top_starts, [logprob for _, logprob in candidates]),
    }
    mask = pa.array(has_none, pa.bool_())
    return {
        name: pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()),
            pa.array(values, SCHEMA.field(name).type.value_type),
            mask=mask,
        )
        for name, (offsets, values) in columns.items()
    }
