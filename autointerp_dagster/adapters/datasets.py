"""The token dataset in the store: tokens as arrays, contexts and documents as tables."""

from functools import lru_cache

import numpy as np
import polars as pl

from autointerp_dagster.adapters.manifests import Blob, Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS
from autointerp_dagster.core.tokens import TokenDataset

_BOS = "bos_id"


def write_dataset(store: Store, dataset: TokenDataset) -> list[Blob]:
    """Stores a token dataset; the tokens are stored once, whoever refers to them."""
    arrays = {"tokens": dataset.tokens, "offsets": dataset.offsets}
    if dataset.bos_id is not None:
        arrays[_BOS] = np.array([dataset.bos_id], dtype=np.int64)
    return [
        store.put_tensors("tokens", arrays),
        store.put_table(CONTEXTS, dataset.contexts),
        store.put_table(DOCUMENTS, dataset.documents),
    ]


def read_dataset(store: Store, manifest: Manifest) -> TokenDataset:
    """Reads back what :func:`write_dataset` stored; the last one read is kept.

    Of a local store's dataset only the tables are in memory: the operating system reads tokens
    when they are used, and may forget them again.

    Raises:
        StoreError: If a blob is missing or damaged.
    """
    return _read(store, manifest.content_hash, manifest.blobs)


@lru_cache(maxsize=1)
def _read(store: Store, content_hash: str, blobs: tuple[Blob, ...]) -> TokenDataset:
    del content_hash  # part of the cache key alone
    manifest_blob = {blob.name: blob for blob in blobs}
    arrays = store.mapped_tensors(manifest_blob["tokens"])
    return TokenDataset(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        contexts=store.table(manifest_blob[CONTEXTS.name]),
        documents=store.table(manifest_blob[DOCUMENTS.name]),
        bos_id=int(arrays[_BOS][0]) if _BOS in arrays else None,
    )


def document_of(dataset: TokenDataset, context: int) -> dict[str, object]:
    """The row of the document that a context was cut from."""
    document = dataset.contexts.row(context, named=True)["document"]
    return dataset.documents.filter(pl.col("document") == document).row(0, named=True)
