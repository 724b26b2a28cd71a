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
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from upath import UPath

from autointerp_dagster.adapters.hashing import table_hash, tensors_hash
from autointerp_dagster.adapters.manifests import Blob, Manifest, Part
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import Table

_ROW_GROUP = 131_072

_logger = logging.getLogger(__name__)


class Store:
    """Blobs, manifests and heads under one root: a local folder, s3://, gs:// or memory://."""

    def __init__(self, root: str | Path | UPath) -> None:
        """Opens the store; nothing is read or written yet.

        Args:
            root: Folder or URL; made when the first blob is written.
        """
        self.root = UPath(root)

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
        pq.write_table(frame.to_arrow(), data, row_group_size=_ROW_GROUP, **_encodings(frame))
        return self._put_blob(
            name or table.name, data.getvalue(), "parquet", table_hash(frame), frame.height
        )

    def put_tensors(self, name: str, tensors: Mapping[str, np.ndarray]) -> Blob:
        """Writes named arrays; equal bytes are stored once.

        Raises:
            StoreError: If the store cannot be written.
        """
        arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        return self._put_blob(name, save_tensors(arrays), "safetensors", tensors_hash(arrays), None)

    def table(self, blob: Blob, where: pc.Expression | None = None) -> pl.DataFrame:
        """Reads a table back.

        Args:
            blob: The table.
            where: Only the rows for which this holds; the others are never all in memory.

        Raises:
            StoreError: If the blob is missing or its bytes are not those that were written.
        """
        frame = pl.from_arrow(
            pq.read_table(pa.BufferReader(self._verified_bytes(blob)), filters=where)
        )
        assert isinstance(frame, pl.DataFrame)
        return frame

    def tensors(self, blob: Blob) -> dict[str, np.ndarray]:
        """Reads named arrays back.

        Raises:
            StoreError: If the blob is missing or its bytes are not those that were written.
        """
        return load_tensors(self._verified_bytes(blob))

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
        data = self._read(path)
        if hashlib.sha256(data).hexdigest()[:32] != Path(path).stem:
            raise StoreError(
                f"{self.root}/{path}: the content does not match the manifest's name. It was "
                "changed or damaged; delete it and materialize the cell again."
            )
        try:
            return Manifest.from_json(data).stored_at(path)
        except ValueError as error:
            raise StoreError(
                f"{self.root}/{path}: a manifest of another version of this package: {error}. "
                "Use that version, or materialize the cell again."
            ) from error

    def find(self, stage: str, input_fingerprint: str) -> Manifest | None:
        """The newest complete manifest of any study with these inputs, or null.

        One that cannot be read, or whose blobs are not all there, counts as absent: what was
        damaged and deleted is made again.
        """
        folder = self.root / stage / input_fingerprint
        if not folder.is_dir():
            return None
        paths = [f"{stage}/{input_fingerprint}/{path.name}" for path in folder.glob("*.json")]
        found = [manifest for path in paths if (manifest := self._readable(path)) is not None]
        complete = [m for m in found if m.complete and all(self._has(blob) for blob in m.blobs)]
        return max(complete, key=lambda m: (m.provenance.finished, m.path or ""), default=None)

    def put_part(self, stage: str, part: Part) -> None:
        """Remembers a finished piece of a cell, so that a rerun does not make it again."""
        self._write(f"parts/{stage}/{part.fingerprint}.json", part.to_json())

    def find_part(self, stage: str, fingerprint: str) -> Part | None:
        """The finished piece with these inputs, or null.

        One that cannot be read, or that lacks its blob, counts as absent.
        """
        path = f"parts/{stage}/{fingerprint}.json"
        if not (self.root / path).exists():
            return None
        try:
            part = Part.from_json(self._read(path))
        except ValueError as error:
            _logger.warning("%s/%s: cannot be read, made again: %s", self.root, path, error)
            return None
        return part if self._has(part.blob) else None

    def set_head(self, study: str, asset: str, cell: str, manifest: Manifest) -> None:
        """Makes ``manifest`` the current one of a cell."""
        if manifest.path is None:
            raise ValueError(f"{study}/{asset}/{cell}: commit the manifest before pointing at it.")
        self._write(f"heads/{study}/{asset}/{cell}", f"{manifest.path}\n".encode())

    def head(self, study: str, asset: str, cell: str) -> Manifest | None:
        """The current manifest of a cell, or null if it was never materialized."""
        path = f"heads/{study}/{asset}/{cell}"
        if not (self.root / path).exists():
            return None
        return self.manifest(self._read(path).decode().strip())

    def _readable(self, path: str) -> Manifest | None:
        try:
            return self.manifest(path)
        except StoreError as error:
            _logger.warning("taken as absent: %s", error)
            return None

    def _has(self, blob: Blob) -> bool:
        return (self.root / blob.path).exists()

    def _put_blob(
        self, name: str, data: bytes, suffix: str, content_hash: str, n_rows: int | None
    ) -> Blob:
        checksum = hashlib.sha256(data).hexdigest()
        path = f"blobs/{checksum[:2]}/{checksum}.{suffix}"
        if not (self.root / path).exists():
            self._write(path, data)
        return Blob(
            name=name,
            path=path,
            content_hash=content_hash,
            checksum=checksum,
            n_bytes=len(data),
            n_rows=n_rows,
        )

    def _verified_bytes(self, blob: Blob) -> bytes:
        data = self._read(blob.path)
        if hashlib.sha256(data).hexdigest() != blob.checksum:
            raise StoreError(
                f"{self.root}/{blob.path} ({blob.name}): the checksum is not the one in its "
                "manifest. The file is damaged; delete it and materialize its cell again."
            )
        return data

    def _read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.root}/{path}: missing. Materialize the cell that wrote it again."
            ) from error
        except OSError as error:
            raise StoreError(f"{self.root}/{path}: cannot be read: {error}.") from error

    def _write(self, path: str, data: bytes) -> None:
        target = self.root / path
        try:
            if self.root.protocol in ("", "file"):
                _write_locally(Path(target.path), data)
            else:
                target.fs.pipe_file(target.path, data)  # one PUT: all or nothing
        except OSError as error:
            raise StoreError(
                f"{self.root}/{path}: cannot be written: {error}. Nothing of it will be read; "
                "free space or fix the permissions and run again."
            ) from error


def _write_locally(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _encodings(frame: pl.DataFrame) -> dict[str, Any]:
    """Parquet options: sorted integers and floats shrink 2x against the default encodings."""
    encodings: dict[str, str] = {}
    for name, kind in frame.schema.items():
        if kind.is_integer():
            encodings[name] = "DELTA_BINARY_PACKED"
        elif kind.is_float():
            encodings[name] = "BYTE_STREAM_SPLIT"
    dictionary = [name for name in frame.columns if name not in encodings]
    return {
        "compression": "zstd",
        "use_dictionary": dictionary or False,
        "column_encoding": encodings or None,
    }
