"""The store: content-addressed blobs, immutable manifests, and one-line heads.

    blobs/<aa>/<sha256>.<parquet|safetensors>        written to a temporary name, then renamed
    <stage>/<input_fingerprint>/<manifest_hash>.json  written last: it is the commit
    parts/<stage>/<part_fingerprint>.json             one finished piece of a cell (one explainer)
    heads/<study>/<asset>/<cell>                      points at a manifest; swapped last of all

A reader follows head -> manifest -> blobs, so nothing half-written is ever read, and an old
manifest keeps its blobs and its upstream manifests when newer runs move the heads.
"""

import hashlib
import io
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files, look_at
from autointerp_dagster.adapters.durable import (
    copying,
    here,
    read_whole,
    reading,
    sync_folder,
    temporary_file,
    write_durably,
    writing,
)
from autointerp_dagster.adapters.hashing import HASH_BLOCK, file_checksum, table_hash, tensors_hash
from autointerp_dagster.adapters.local_files import remove_forgotten
from autointerp_dagster.adapters.manifests import (
    Blob,
    Manifest,
    Part,
    checked_manifest,
    is_manifest,
)
from autointerp_dagster.adapters.parquet import (
    FilePart,
    WrittenTable,
    digest_of,
    encodings,
    write_frames,
)
from autointerp_dagster.adapters.remote import is_local, open_root, store_errors
from autointerp_dagster.adapters.renewing import is_reusable, renew
from autointerp_dagster.adapters.tensor_files import mapped_tensors
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import Table

_logger = logging.getLogger(__name__)


class StoredFrames(NamedTuple):
    """A table that was written frame by frame."""

    blob: Blob
    file: WrittenTable
    """Where its row groups lie."""


class Store:
    """Blobs, manifests and heads under one root: a local folder, s3://, gs:// or memory://."""

    def __init__(self, root: str | Path | UPath) -> None:
        """Opens the store; nothing is read or written yet.

        Args:
            root: Folder or URL; made when the first blob is written.

        Raises:
            StoreError: If no such URL can be opened here.
        """
        self.root = open_root(root)

    def put_table(self, table: Table, frame: pl.DataFrame, *, name: str | None = None) -> Blob:
        """Writes a table; equal bytes are stored once.

        Args:
            table: Its declaration; ``frame`` must already conform (``Table.conform``).
            frame: The rows.
            name: What the manifest calls it; the table's name by default.

        Raises:
            StoreError: If the store cannot be written, e.g. a full disk.
        """
        data = io.BytesIO()
        pq.write_table(frame.to_arrow(), data, row_group_size=HASH_BLOCK, **encodings(frame))
        return self._put_blob(
            name or table.name, data.getvalue(), "parquet", table_hash(frame), frame.height
        )

    def put_frames(
        self, table: Table, frames: Iterable[pl.DataFrame], *, name: str | None = None
    ) -> StoredFrames:
        """Writes a table that comes in frames; only a part of it is ever in memory.

        The blob is that of :meth:`put_table` on all frames together. It is written to a temporary
        file first: beside the blobs of a local store, else in Python's ``tempfile.gettempdir()``
        (``$TMPDIR``). What a killed process left there is removed a day later.

        Args:
            table: Its declaration.
            frames: Rows in the order of ``table.key`` over all frames; cut anywhere.
            name: As in :meth:`put_table`.

        Raises:
            StoreError: If the store cannot be written, e.g. a full disk.
            ValueError: If rows are not in order, repeat a key, or have other columns.
        """
        on_disk = is_local(self.root)
        temporary = temporary_file(Path(self.root.path) / "blobs" if on_disk else None)
        try:
            with writing(self.root, "blobs") if on_disk else copying():
                temporary.parent.mkdir(parents=True, exist_ok=True)
                remove_forgotten(temporary.parent)
                with temporary.open("wb") as file:
                    written = write_frames(file, table, frames)
                    file.flush()
                    os.fsync(file.fileno())
            path = f"blobs/{written.checksum[:2]}/{written.checksum}.parquet"
            with writing(self.root, path):
                self._take(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        blob = Blob(
            name=name or table.name,
            path=path,
            content_hash=written.content_hash,
            checksum=written.checksum,
            n_bytes=written.n_bytes,
            n_rows=written.n_rows,
        )
        return StoredFrames(blob, written)

    def put_tensors(
        self,
        name: str,
        tensors: Mapping[str, np.ndarray],
        content: Collection[str] | None = None,
    ) -> Blob:
        """Writes named arrays; equal bytes are stored once.

        Args:
            name: What the manifest calls it.
            tensors: The arrays.
            content: The arrays that say something; the others only tell how something happens to
                be stored, and are not part of the content hash. Null: all.

        Raises:
            StoreError: If the store cannot be written.
        """
        arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        hashed = {key: arrays[key] for key in (arrays if content is None else content)}
        return self._put_blob(name, save_tensors(arrays), "safetensors", tensors_hash(hashed), None)

    def table(self, blob: Blob, where: pc.Expression | None = None) -> pl.DataFrame:
        """Reads a table back.

        Args:
            blob: The table.
            where: Only the rows for which this holds; the others are never all in memory.

        Raises:
            StoreError: If the blob is missing or its bytes are not those that were written.
        """
        data = pa.BufferReader(self.verified_bytes(blob))
        frame = pl.from_arrow(pq.read_table(data, filters=where))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def verified_bytes(self, blob: Blob) -> bytes:
        """All bytes of a blob; raises as :meth:`table`."""
        data = self._read(blob.path)
        if hashlib.sha256(data).hexdigest() != blob.checksum:
            raise self._damaged(blob, "the checksum is")
        return data

    def tensors(self, blob: Blob) -> dict[str, np.ndarray]:
        """Reads named arrays back.

        Raises:
            StoreError: If the blob is missing or its bytes are not those that were written.
        """
        return load_tensors(self.verified_bytes(blob))

    def mapped_tensors(self, blob: Blob) -> dict[str, np.ndarray]:
        """Named arrays for reading, in memory only as a file cache.

        A remote file is copied for it, into Python's ``tempfile.gettempdir()``.

        Raises:
            StoreError: As :meth:`tensors`; all bytes are compared before this returns.
        """
        with reading(self.root, blob.path), here(self.root / blob.path) as path:
            if file_checksum(path) != blob.checksum:
                raise self._damaged(blob, "the checksum is")
            return mapped_tensors(path)

    def read_parts(self, blob: Blob, parts: Sequence[FilePart]) -> bytes:
        """Reads and checks part of a blob; nothing else of it is read.

        Args:
            blob: The blob.
            parts: Which of its bytes: parts that follow each other without a gap, at least one.

        Raises:
            StoreError: If the blob is missing or damaged there.
        """
        path, start, stop = self.root / blob.path, parts[0].start, parts[-1].stop
        data: Any = None
        with reading(self.root, blob.path):
            if is_local(self.root):
                with Path(path.path).open("rb") as file:
                    file.seek(start)
                    data = file.read(stop - start)
            else:
                with store_errors(path):
                    data = path.fs.cat_file(path.path, start=start, end=stop)
        for part in parts:
            if digest_of(memoryview(data)[part.start - start : part.stop - start]) != part.digest:
                raise self._damaged(blob, f"bytes {part.start} to {part.stop} are")
        return data

    def commit(self, manifest: Manifest) -> Manifest:
        """Writes a manifest, which makes its blobs part of the store, and returns it as stored.

        Raises:
            StoreError: If the store cannot be written.
        """
        data = manifest.to_json()
        manifest_hash = hashlib.sha256(data).hexdigest()[:32]
        path = f"{manifest.stage}/{manifest.input_fingerprint}/{manifest_hash}.json"
        self._write(path, data)
        return manifest.stored_at(path)

    def manifest(self, path: str) -> Manifest:
        """Reads the manifest at a path relative to the root.

        Raises:
            StoreError: If it is missing, was changed after it was written, or has a format that
                this version does not read.
        """
        return checked_manifest(self.root, path, self._read(path))

    def find(self, stage: str, input_fingerprint: str) -> Manifest | None:
        """The newest complete manifest of any study with these inputs, or null.

        One that is damaged, or whose blobs are not all there, counts as absent: what was damaged
        and deleted is made again.

        Raises:
            StoreError: If the store does not answer, or one of them cannot be read now.
        """
        paths = [p for p in list_files(self.root, f"{stage}/{input_fingerprint}") if is_manifest(p)]
        found = [manifest for path in paths if (manifest := self._readable(path)) is not None]
        complete = [m for m in found if m.complete and all(self._has(blob) for blob in m.blobs)]
        return max(complete, key=lambda m: (m.provenance.finished, m.path or ""), default=None)

    def put_part(self, stage: str, part: Part) -> None:
        """Remembers a finished piece of a cell, so that a rerun does not make it again."""
        self._write(f"parts/{stage}/{part.fingerprint}.json", part.to_json())

    def take_part(self, stage: str, fingerprint: str) -> Part | None:
        """As :meth:`find_part`, for use in a manifest to come: until then nobody prunes it."""
        part = self.find_part(stage, fingerprint)
        path = f"parts/{stage}/{fingerprint}.json"
        with writing(self.root, path):
            return part if part is not None and renew(self.root, path) else None

    def find_part(self, stage: str, fingerprint: str) -> Part | None:
        """The finished piece with these inputs, or null.

        One that cannot be read, or that lacks its blob, counts as absent.
        """
        path = f"parts/{stage}/{fingerprint}.json"
        data = self._read_if_there(path)
        if data is None:
            return None
        try:
            part = Part.from_json(data)
        except ValueError as error:
            _logger.warning("%s/%s: cannot be read, made again: %s", self.root, path, error)
            return None
        return part if self._has(part.blob) else None

    def set_head(self, study: str, asset: str, cell: str, manifest: Manifest) -> None:
        """Makes ``manifest``, which was just committed, the current one of a cell.

        The one before becomes young: from now on it is kept for as long as superseded ones are.

        Raises:
            StoreError: If the store cannot be written.
        """
        if manifest.path is None:
            raise ValueError(f"{study}/{asset}/{cell}: commit the manifest before pointing at it.")
        before = self._pointer(study, asset, cell)
        if before == manifest.path:
            return
        if before is not None and is_manifest(before):
            with writing(self.root, before):
                renew(self.root, before)
        self._write(f"heads/{study}/{asset}/{cell}", f"{manifest.path}\n".encode())

    def link(self, study: str, asset: str, cell: str, manifest: Manifest) -> bool:
        """As :meth:`set_head`, with a manifest that was there before; false if it is gone.

        Raises:
            StoreError: If the store cannot be written.
        """
        path = manifest.path or ""
        if self._pointer(study, asset, cell) != path:
            with writing(self.root, path):
                if not renew(self.root, path):
                    return False
            self.set_head(study, asset, cell, manifest)
        return True

    def head(self, study: str, asset: str, cell: str) -> Manifest | None:
        """The current manifest of a cell, or null if it was never materialized."""
        path = self._pointer(study, asset, cell)
        return None if path is None else self.manifest(path)

    def _pointer(self, study: str, asset: str, cell: str) -> str | None:
        data = self._read_if_there(f"heads/{study}/{asset}/{cell}")
        return None if data is None else data.decode(errors="replace").strip()

    def _readable(self, path: str) -> Manifest | None:
        data = self._read_if_there(path)
        try:
            return None if data is None else checked_manifest(self.root, path, data)
        except StoreError as error:
            _logger.warning("taken as absent: %s", error)
            return None

    def _has(self, blob: Blob) -> bool:
        return look_at(self.root, blob.path) is not None

    def _put_blob(
        self, name: str, data: bytes, suffix: str, content_hash: str, n_rows: int | None
    ) -> Blob:
        checksum = hashlib.sha256(data).hexdigest()
        path = f"blobs/{checksum[:2]}/{checksum}.{suffix}"
        if not is_reusable(self.root, path):
            self._write(path, data)
        return Blob(
            name=name,
            path=path,
            content_hash=content_hash,
            checksum=checksum,
            n_bytes=len(data),
            n_rows=n_rows,
        )

    def _damaged(self, blob: Blob, what: str) -> StoreError:
        return StoreError(
            f"{self.root}/{blob.path} ({blob.name}): {what} not what its manifest says. "
            "The file is damaged; delete it and materialize its cell again."
        )

    def _read(self, path: str) -> bytes:
        with reading(self.root, path):
            return read_whole(self.root / path)

    def _read_if_there(self, path: str) -> bytes | None:
        with reading(self.root, path), suppress(FileNotFoundError):
            return read_whole(self.root / path)
        return None

    def _write(self, path: str, data: bytes) -> None:
        with writing(self.root, path):
            write_durably(self.root / path, data)

    def _take(self, temporary: Path, path: str) -> None:
        """Makes a finished local file the one at ``path``, unless it is there already."""
        if is_reusable(self.root, path):
            return
        target = self.root / path
        if is_local(self.root):
            Path(target.path).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target.path)
            sync_folder(Path(target.path).parent)
        else:
            with store_errors(target):
                target.fs.put_file(str(temporary), target.path)  # seen when it is whole
