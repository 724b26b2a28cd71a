"""The journal: every completed call, durable before its result is used, so nothing is paid twice.

1. A call is appended to this process's write-ahead log. What arrives during an fsync shares the
   next one.
2. Sealing, in a thread of its own, starts a new log and writes what the old one holds as immutable
   segments, one per block; then the old log goes, and small segments are merged.
3. Opening a journal seals the logs of processes that are gone.

See ``docs/design/004-journal.md``.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future
from pathlib import Path
from typing import Self

import pyarrow as pa
from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.journal.compaction import compact, due, everything
from autointerp_dagster.adapters.llm.journal.entries import Entry, to_line
from autointerp_dagster.adapters.llm.journal.replies import BlockReplies, batches_of, entry_of
from autointerp_dagster.adapters.llm.journal.sealing import Generation, Sealer, Write, unwritable
from autointerp_dagster.adapters.llm.journal.segments import (
    block_folder,
    block_folders,
    read_call,
    read_each,
)
from autointerp_dagster.adapters.llm.journal.templates import TemplateStore, template_of
from autointerp_dagster.adapters.llm.journal.wal import Line, orphaned_logs, set_aside
from autointerp_dagster.adapters.remote import is_local
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock

__all__ = ["Entry", "Journal"]

SEAL_AFTER = 2048
"""Calls in the log before it is sealed by itself."""
SEAL_EVERY_S = 10.0
"""Likewise seconds, if the store is remote: a lost machine loses no more than that. Also the pause
before a sealing that failed is tried again."""
BLOCKS_BYTES = 2**30
"""Of sealed replies kept in memory. Beyond it all but the indices of the blocks that were not used
for longest moves to this machine's disk; only if that is not enough a block is forgotten, to be
read again. The block in use stays, whatever its size."""

logger = logging.getLogger(__name__)


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
        self._templates = TemplateStore(root)
        self._sealer = Sealer(root, self._templates)
        # Taken in this order; only the last is taken by those who look up or record.
        self._sealing = threading.RLock()  # who seals or compacts
        self._reading = threading.Lock()  # who adds sealed replies to memory
        self._writing = threading.Lock()  # who writes the log
        self._state = threading.Lock()  # who touches what is below; held briefly
        self._work = threading.Condition(self._state)
        self._seal_work = threading.Condition(self._state)
        self._queue: list[Write] = []
        self._open = Generation(self._wal_folder)
        self._rotated: deque[Generation] = deque()
        self._retry_s = 0.0
        self._blocks: OrderedDict[JournalBlock, BlockReplies] = OrderedDict()
        self._is_recovered = False
        self._threads: tuple[threading.Thread, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def n_bytes(self) -> int:
        """About what sealed replies take in memory."""
        with self._state:
            return sum(held.n_bytes for held in self._blocks.values())

    def load(self, block: JournalBlock) -> None:
        """Read a block's sealed replies, so that lookups do not touch the store.

        Raises:
            StoreError: If the block's segments cannot be read.
        """
        with self._state:
            is_loaded = block in self._blocks
        if not is_loaded:
            self._load(block)

    def lookup(self, block: JournalBlock, call_id: str) -> Reply | None:
        """The durable reply to a call; null if it was never completed.

        Raises:
            StoreError: If the block's segments cannot be read.
        """
        while True:
            with self._state:
                sealed = self._blocks.get(block)
                if sealed is not None:
                    self._blocks.move_to_end(block)
                    place = sealed.get(call_id)
                    entry = None if place is not None else self._unsealed(block, call_id)
                    break
            self._load(block)
        if place is not None:
            replies, row = place
            return replies.reply(row)
        return None if entry is None else entry.reply

    def find(self, call_id: str, block: JournalBlock | None = None) -> Entry | None:
        """A durable call with its whole prompt; without ``block`` every segment is searched.

        Raises:
            StoreError: If a segment cannot be read.
        """
        self._recover()
        with self._state:  # before the segments are read, for they may be sealed meanwhile
            generations = [*self._rotated, self._open]
            blocks = [b for g in generations for b in g.calls if block is None or b == block]
            unsealed = [entry for b in blocks if (entry := self._unsealed(b, call_id)) is not None]
        folder = self._root / "journal" if block is None else block_folder(self._root, block)
        rows = read_each(folder, lambda path: read_call(path, call_id))
        sealed = [entry_of(row, self._templates) for row in rows if row.num_rows]
        return min(sealed or unsealed, key=lambda e: (e.time, repr(e.reply)), default=None)

    def record(self, block: JournalBlock, entry: Entry) -> Future[None]:
        """Keep a call. The future is done once the call survives a crash of this process.

        The future raises StoreError if the call could not be written.
        """
        self._recover()
        template = template_of(entry.shared)
        address = None if template is None else template.address
        line = Line(to_line(block, entry, address), template)
        write = Write(block, entry, line, Future())
        write.done.set_running_or_notify_cancel()  # a waiter may leave, the call is kept
        with self._work:
            self._queue.append(write)
            if not self._threads:
                self._start()
            self._work.notify()
        return write.done

    def flush(self) -> None:
        """Seal every call recorded so far. If the log could not take one, its future raises.

        Raises:
            StoreError: If a segment cannot be written; the log keeps the calls.
        """
        self._commit()
        self._seal()

    def compact(self) -> None:
        """Merge the segments of every block into as few as their sizes allow.

        Blocks in use are merged by themselves, see :data:`.compaction.MERGE_FROM`.

        Raises:
            StoreError: If a segment cannot be read or written; nothing of it is lost.
        """
        self._recover()
        self.flush()
        for folder in block_folders(self._root):
            with self._sealing:
                try:
                    compact(folder, everything)
                except OSError as error:
                    raise unwritable(self._root, error) from error

    def close(self) -> None:
        """Seal, and end the background threads; the journal may be used again.

        Raises:
            StoreError: If a segment cannot be written; the log keeps the calls for whoever opens
                the journal next, in this process or another.
        """
        with self._state:
            threads, self._threads = self._threads, ()
            self._work.notify_all()
            self._seal_work.notify_all()
        for thread in threads:
            thread.join()
        try:
            self.flush()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Give up the locks of the logs, and with them what they hold."""
        with self._sealing, self._reading, self._writing, self._state:
            left = [generation for generation in (*self._rotated, self._open) if generation.n_calls]
            if self._open not in left:  # what it may hold was never acknowledged
                self._open.log.discard()
            for generation in left:
                generation.log.close()
            if left:
                self._rotated.clear()
                self._open = Generation(self._wal_folder)
                self._blocks.clear()
                self._is_recovered = False  # before anything is looked up

    def _unsealed(self, block: JournalBlock, call_id: str) -> Entry | None:
        """A call that only the logs hold, the earliest; with the state's lock held."""
        for generation in self._rotated:
            entry = generation.get(block, call_id)
            if entry is not None:
                return entry
        return self._open.get(block, call_id)

    def _load(self, block: JournalBlock) -> None:
        self._recover()
        with self._reading:  # sealing ends before or after, never between reading and keeping
            with self._state:
                if block in self._blocks or not self._is_recovered:
                    return  # who looks up tries again
            replies = BlockReplies.read(block_folder(self._root, block))
            with self._state:
                self._blocks[block] = replies
            self._make_room()

    def _make_room(self) -> None:
        """Keep within :data:`BLOCKS_BYTES`; by who adds sealed replies."""
        with self._state:
            held = list(self._blocks.values())
        for replies in held:
            if self.n_bytes <= BLOCKS_BYTES:
                return
            try:
                replies.move_to_disk(self._wal_folder)
            except OSError as error:
                logger.warning("sealed replies will be read again: %s", error)
                break
        with self._state:
            n_bytes = sum(replies.n_bytes for replies in self._blocks.values())
            while n_bytes > BLOCKS_BYTES and len(self._blocks) > 1:
                n_bytes -= self._blocks.popitem(last=False)[1].n_bytes

    def _recover(self) -> None:
        """Seal the logs of processes that are gone, once."""
        if self._is_recovered:
            return
        with self._sealing:
            if self._is_recovered:
                return
            with orphaned_logs(self._wal_folder) as logs:
                for path, records in logs:
                    if self._sealer.seal_records(records):
                        set_aside(path)
            self._is_recovered = True

    def _start(self) -> None:
        self._threads = tuple(
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in [
                (self._commit_forever, "journal-commit"),
                (self._seal_forever, "journal-seal"),
            ]
        )
        for thread in self._threads:
            thread.start()

    def _commit_forever(self) -> None:
        me = threading.current_thread()
        while True:
            with self._work:
                self._work.wait_for(lambda: self._queue or me not in self._threads)
                if me not in self._threads:
                    return
            self._commit()

    def _commit(self) -> None:
        """Make all queued calls durable, together."""
        with self._writing:
            with self._state:
                writes, self._queue = self._queue, []
            if not writes:
                return
            try:
                self._open.log.append([write.line for write in writes])
            except Exception as error:  # noqa: BLE001 somebody waits for each of these calls
                failure = StoreError(
                    f"{self._wal_folder}: the journal cannot be written: {error}. Free space there "
                    "or fix the permissions, and run again: earlier answers are not paid again."
                )
            else:
                failure = None
                with self._state:
                    self._open.add(writes)
                    self._seal_work.notify()
        for write in writes:
            write.done.set_exception(failure) if failure else write.done.set_result(None)

    def _seal_forever(self) -> None:
        me = threading.current_thread()
        while True:
            with self._seal_work:
                while me in self._threads and (wait_s := self._seal_wait_s()) != 0:
                    self._seal_work.wait(wait_s)
                if me not in self._threads:
                    return
            try:
                self._seal()
            except StoreError as error:  # the calls are safe in the log; flush() raises it
                logger.warning("sealing is put off: %s", error)
            except Exception:  # without this thread the log would grow for as long as this runs
                logger.exception("sealing is put off")

    def _seal_wait_s(self) -> float | None:
        """Seconds until something is to be sealed; null: no time by itself makes it so."""
        now = time.monotonic()
        waits = [0.0] if self._open.n_calls >= SEAL_AFTER else []
        if self._is_remote and self._open.n_calls:
            waits.append(max(0.0, self._open.born_s + SEAL_EVERY_S - now))
        if self._rotated:
            waits.append(max(0.0, self._retry_s - now))
        return min(waits, default=None)

    def _seal(self) -> None:
        """Move the log's calls into segments; each log goes when all of its calls are durable."""
        with self._sealing:
            with self._writing, self._state:
                self._retry_s = time.monotonic() + SEAL_EVERY_S
                if self._open.n_calls:
                    self._rotated.append(self._open)
                    self._open = Generation(self._wal_folder)
            while self._rotated:
                generation = self._rotated[0]
                sealed = {
                    block: self._sealer.seal(block, list(entries.values()))
                    for block, entries in generation.calls.items()
                }
                self._publish({block: calls for block, (calls, _) in sealed.items()})
                if any(n_odd for _, n_odd in sealed.values()):
                    generation.log.set_aside()
                else:
                    generation.log.discard()
                for block in sealed:
                    self._compact_if_due(block)

    def _publish(self, sealed: dict[JournalBlock, pa.Table]) -> None:
        """Let lookups find the oldest generation among the sealed calls."""
        with self._reading:
            batches = {block: list(batches_of(calls)) for block, calls in sealed.items()}
            with self._state:
                self._rotated.popleft()
                for block, held in self._blocks.items():
                    for replies in batches.get(block, ()):
                        held.add(replies)
            self._make_room()

    def _compact_if_due(self, block: JournalBlock) -> None:
        try:
            compact(block_folder(self._root, block), due)
        except Exception as error:  # noqa: BLE001 nothing is lost; the next sealing tries again
            logger.warning("compaction is put off: %s: %s", type(error).__name__, error)
