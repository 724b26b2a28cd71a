"""The journal: every completed call, durable before its result is used, so nothing is paid twice.

1. A call is appended to this process's write-ahead log; calls that come together share an fsync.
2. Sealing writes what the log holds as immutable segments, one per block, then deletes the log.
3. Opening a journal seals the logs of processes that are gone.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, Self

from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.entries import Entry, to_line
from autointerp_dagster.adapters.llm.segments import (
    BlockReplies,
    find_entry,
    is_local,
    write_segment,
)
from autointerp_dagster.adapters.llm.wal import Record, WriteAheadLog, orphaned_logs
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock

__all__ = ["Entry", "Journal"]

COMMIT_EVERY_S = 0.05
"""At most one fsync in this time."""
SEAL_AFTER = 2048
"""Calls in the log before it is sealed by itself."""
SEAL_EVERY_S = 10.0
"""Likewise seconds, if the store is remote: a lost machine loses no more than that."""
BLOCKS_IN_MEMORY = 16

logger = logging.getLogger(__name__)


class _Write(NamedTuple):
    """A call that waits for the next commit."""

    block: JournalBlock
    entry: Entry
    line: bytes
    done: Future[None]


class Journal:
    """Completed calls below ``root``; safe to use from many threads and many processes at once."""

    def __init__(self, root: UPath, *, wal_dir: Path | None = None) -> None:
        """Describe a journal; nothing is read or written yet.

        Args:
            root: The store; segments go to ``root/journal``.
            wal_dir: A folder of this machine for write-ahead logs, which may serve many roots.
                Null: ``root/journal-wal``, if ``root`` is local.

        Raises:
            StoreError: If ``root`` is remote and ``wal_dir`` is null.
        """
        if wal_dir is None and not is_local(root):
            raise StoreError(
                f"journal {root}: a remote store needs a local folder for its write-ahead logs, "
                "got none. Pass wal_dir."
            )
        self._root = root
        self._is_remote = not is_local(root)
        if wal_dir is None:
            self._wal_folder = Path(root.path) / "journal-wal"
        else:
            address = hashlib.blake2b(str(root).encode(), digest_size=8).hexdigest()
            self._wal_folder = Path(wal_dir) / address
        self._wal = WriteAheadLog(self._wal_folder)
        self._state = threading.RLock()  # guards what is in memory; held briefly
        self._writing = threading.RLock()  # guards the log and sealing
        self._work = threading.Condition(self._state)
        self._queue: list[_Write] = []
        self._unsealed: dict[JournalBlock, dict[str, Entry]] = {}
        self._blocks: OrderedDict[JournalBlock, BlockReplies] = OrderedDict()
        self._is_recovered = False
        self._committer: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def load(self, block: JournalBlock) -> None:
        """Read a block's sealed replies, so that lookups do not touch the store."""
        self._replies(block)

    def lookup(self, block: JournalBlock, call_id: str) -> Reply | None:
        """The durable reply to a call; null if it was never completed.

        Raises:
            StoreError: If the block's segments cannot be read.
        """
        with self._state:
            entry = self._unsealed.get(block, {}).get(call_id)
            return entry.reply if entry is not None else self._replies(block).get(call_id)

    def find(self, call_id: str, block: JournalBlock | None = None) -> Entry | None:
        """A durable call with its prompt; without ``block`` every segment is searched.

        Raises:
            StoreError: If a segment cannot be read.
        """
        self._recover()
        with self._state:
            entries = [e for b, e in self._unsealed.items() if block is None or b == block]
        unsealed = [found[call_id] for found in entries if call_id in found]
        return unsealed[0] if unsealed else find_entry(self._root, call_id, block)

    def record(self, block: JournalBlock, entry: Entry) -> Future[None]:
        """Keep a call. The future is done once the call survives a crash of this process.

        The future raises StoreError if the call could not be written.
        """
        self._recover()
        write = _Write(block, entry, to_line(block, entry), Future())
        write.done.set_running_or_notify_cancel()  # a waiter may leave, the call is kept
        with self._work:
            self._queue.append(write)
            if self._committer is None:
                self._committer = threading.Thread(
                    target=self._commit_forever, name="journal", daemon=True
                )
                self._committer.start()
            self._work.notify()
        return write.done

    def flush(self) -> None:
        """Seal every call recorded so far.

        Raises:
            StoreError: If the log or a segment cannot be written.
        """
        self._commit()
        with self._writing:
            self._seal()

    def close(self) -> None:
        """Seal, and end the background thread; the journal may be used again."""
        self.flush()
        with self._work:
            thread, self._committer = self._committer, None
            self._work.notify()
        if thread is not None:
            thread.join()

    def _replies(self, block: JournalBlock) -> BlockReplies:
        self._recover()
        with self._state:
            replies = self._blocks.get(block)
            if replies is None:
                replies = self._blocks[block] = BlockReplies(self._root, block)
            self._blocks.move_to_end(block)
            while len(self._blocks) > BLOCKS_IN_MEMORY:
                self._blocks.popitem(last=False)
            return replies

    def _recover(self) -> None:
        """Seal the logs of processes that are gone, once."""
        if self._is_recovered:
            return
        with self._writing:
            if self._is_recovered:
                return
            with orphaned_logs(self._wal_folder) as records:
                for block, entries in _by_block(records).items():
                    write_segment(self._root, block, list(entries.values()))
            self._is_recovered = True

    def _commit_forever(self) -> None:
        me = threading.current_thread()
        sealed = time.monotonic()
        while True:
            with self._work:
                self._work.wait_for(
                    lambda: self._queue or self._committer is not me,
                    timeout=SEAL_EVERY_S if self._is_remote else None,
                )
                if self._committer is not me:
                    return
            started = time.monotonic()
            self._commit()
            is_due = self._is_remote and started - sealed >= SEAL_EVERY_S
            if self._n_unsealed() >= (1 if is_due else SEAL_AFTER):
                self._seal_if_possible()
                sealed = time.monotonic()
            time.sleep(max(0.0, COMMIT_EVERY_S - (time.monotonic() - started)))

    def _n_unsealed(self) -> int:
        with self._state:
            return sum(len(entries) for entries in self._unsealed.values())

    def _commit(self) -> None:
        """Make all queued calls durable, together."""
        with self._writing:
            with self._state:
                batch, self._queue = self._queue, []
            if not batch:
                return
            try:
                self._wal.append([write.line for write in batch])
            except OSError as error:
                failure = StoreError(f"{self._wal_folder}: the journal cannot be written: {error}.")
                for write in batch:
                    write.done.set_exception(failure)
                return
            with self._state:
                for write in batch:
                    entries = self._unsealed.setdefault(write.block, {})
                    entries.setdefault(write.entry.call_id, write.entry)
            for write in batch:
                write.done.set_result(None)

    def _seal_if_possible(self) -> None:
        try:
            with self._writing:
                self._seal()
        except StoreError as error:  # the calls are safe in the log; flush() raises it
            logger.warning("sealing is put off: %s", error)

    def _seal(self) -> None:
        """Move the log's calls into segments; the log goes when all of them are durable."""
        for block, entries in list(self._unsealed.items()):
            try:
                write_segment(self._root, block, list(entries.values()))
            except OSError as error:
                raise StoreError(f"{self._root}: a segment cannot be written: {error}.") from error
            with self._state:
                if block in self._blocks:
                    self._blocks[block].add(list(entries.values()))
        with self._state:
            self._unsealed.clear()
        self._wal.discard()


def _by_block(records: list[Record]) -> dict[JournalBlock, dict[str, Entry]]:
    blocks: dict[JournalBlock, dict[str, Entry]] = {}
    for block, entry in records:
        blocks.setdefault(block, {}).setdefault(entry.call_id, entry)
    return blocks
