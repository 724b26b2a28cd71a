"""The token dataset in the store: tokens as arrays, contexts and documents as tables."""

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
    """Reads back what :func:`write_dataset` stored.

    Raises:
        StoreError: If a blob is missing or damaged.
    """
    arrays = store.tensors(manifest.blob("tokens"))
    return TokenDataset(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        contexts=store.table(manifest.blob(CONTEXTS.name)),
        documents=store.table(manifest.blob(DOCUMENTS.name)),
        bos_id=int(arrays[_BOS][0]) if _BOS in arrays else None,
    )


def document_of(dataset: TokenDataset, context: int) -> dict[str, object]:
    """The row of the document that a context was cut from."""
    document = dataset.contexts.row(context, named=True)["document"]
    return dataset.documents.filter(pl.col("document") == document).row(0, named=True)
